"""Large-batch training for PyTorch on Horovod: grow the batch instead of decaying the learning rate."""
