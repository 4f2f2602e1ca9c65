# hvd_lbt in a container: Horovod with MPI and NCCL, DALI, the extension with CUDA kernels.
#
#   docker build -t hvd_lbt .                                                      with CUDA
#   docker build -t hvd_lbt --build-arg BASE=ubuntu:24.04 --build-arg CUDA=0 .     CPU only
#   docker run --rm --gpus all --shm-size 1g hvd_lbt launch/local 1 train digits
#
# The base needs nvcc (an image called "devel"); building needs no GPU.
ARG BASE=nvidia/cuda:13.0.2-devel-ubuntu24.04
# hadolint ignore=DL3006
FROM ${BASE}
ARG CUDA=1
ENV DEBIAN_FRONTEND=noninteractive HVD_LBT_CUDA=${CUDA} CUDA_HOME=/usr/local/cuda
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# hadolint ignore=DL3008
RUN apt-get update \
  && apt-get install -y --no-install-recommends \
    g++ git libopenmpi-dev make openmpi-bin openssh-client python3-dev python3-venv \
  && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/hvd_lbt
COPY . .
RUN launch/setup && rm -rf "${HOME}/.cache"
ENV PATH=/opt/hvd_lbt/.venv/bin:${PATH}
CMD ["hvd_lbt", "doctor"]
