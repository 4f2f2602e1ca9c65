"""Well-known data sets as they are downloaded: what a folder is, and how to make it a split."""

from itertools import islice
from pathlib import Path

WANTED = "Needed are train/CLASS/FILE and test/CLASS/FILE (or val/CLASS/FILE), or shards"
ARRAYS = "its images must be written as files first"
CONVERT = "convert it: hvd_lbt data convert {data} OUT"
# What a folder is, the files that show it (patterns below DATA), and what to do.
LAYOUTS = (
    (
        "Kaggle's tree of ImageNet",
        ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC", "LOC_val_solution.csv"),
        CONVERT,
    ),
    (
        "ImageNet's own archives (a tar of tars for training, one without classes for val)",
        ("ILSVRC2012_img_*.tar", "*/ILSVRC2012_img_*.tar"),
        f"{CONVERT}; the development kit must lie beside them",
    ),
    (
        "ImageNet's validation images without their classes",
        tuple(f"{split}/ILSVRC2012_val_*.JPEG" for split in ("val", "test", "validation")),
        f"{CONVERT}; the development kit or Kaggle's LOC_val_solution.csv must lie in {{data}}",
    ),
    ("tiny-imagenet as it is downloaded", ("val/val_annotations.txt",), CONVERT),
    (
        "CIFAR's pickles",
        ("data_batch_1", "*/data_batch_1", "batches.meta", "*/batches.meta", "cifar-100-python"),
        "give --data the archive (cifar-10-python.tar.gz) or the folder with all its files",
    ),
    (
        "CIFAR's binary files",
        ("data_batch_1.bin", "*/data_batch_1.bin", "train.bin"),
        "give --data the archive (cifar-10-binary.tar.gz) or the folder with all its files",
    ),
    (
        "MNIST's idx files",
        ("*-images-idx3-ubyte*", "*/*-images-idx3-ubyte*", "*-images.idx3-ubyte*"),
        "give --data the folder with all four files, images and labels of train and t10k",
    ),
    ("Parquet files", ("*.parquet", "*/*.parquet"), CONVERT),
    ("Arrow files", ("*.arrow", "*/*.arrow"), ARRAYS),
    ("HDF5 files", ("*.h5", "*.hdf5", "*/*.h5", "*/*.hdf5"), ARRAYS),
    ("an LMDB database", ("data.mdb", "*/data.mdb", "*.lmdb", "*.mdb"), ARRAYS),
    ("FFCV files", ("*.beton", "*/*.beton"), ARRAYS),
    ("shards of MosaicML Streaming", ("*.mds*", "*/*.mds*"), ARRAYS),
    ("NumPy arrays", ("*.npy", "*.npz", "*/*.npy", "*/*.npz"), ARRAYS),
    ("zip archives", ("*.zip", "*/*.zip"), "unpack each with: unzip -q FILE.zip"),
    (
        "compressed tar archives",
        tuple(f"{at}*.{end}" for at in ("", "*/") for end in ("tar.*", "tgz", "tbz2", "txz")),
        "unpack each with: tar xf FILE",
    ),
)


def raw_layout(data: Path) -> str:
    """What DATA is of LAYOUTS, with what is needed; "" if it is none of them or cannot be read."""
    for what, patterns, advice in LAYOUTS:
        for pattern in patterns:
            try:
                found = next(islice(data.glob(pattern), 1), None)
            except OSError:
                return ""
            if found is not None:
                name = found.relative_to(data)
                advice = advice.format(data=data)
                return f"{data} has {what} ({name}), which is not read so: {advice}. {WANTED}."
    return ""
