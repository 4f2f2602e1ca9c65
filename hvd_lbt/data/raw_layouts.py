"""Well-known data sets as they are downloaded: what a folder is, and how to make it a split."""

from itertools import islice
from pathlib import Path

WANTED = "Needed are train/CLASS/FILE and test/CLASS/FILE (or val/CLASS/FILE), or shards"
ARRAYS = "its images must be written as files first"
# What a folder is, the files that show it (patterns below DATA), and what to do.
LAYOUTS = (
    (
        "Kaggle's tree of ImageNet",
        ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC", "LOC_val_solution.csv"),
        (
            "give --data ILSVRC/Data/CLS-LOC, and first sort its val/, in that folder: "
            "tail -n +2 ../../../LOC_val_solution.csv | while IFS=, read -r f l; "
            'do mkdir -p "val/${l%% *}" && mv "val/$f.JPEG" "val/${l%% *}/"; done'
        ),
    ),
    (
        "ImageNet's own archives (a tar of tars for training, one without classes for val)",
        ("ILSVRC2012_img_*.tar", "*/ILSVRC2012_img_*.tar"),
        (
            "unpack the training images with: mkdir train && tar xf ILSVRC2012_img_train.tar "
            "-C train "
            '&& cd train && for t in *.tar; do mkdir "${t%.tar}" && tar xf "$t" -C "${t%.tar}" && '
            'rm "$t"; done; and val into val/CLASS/FILE by the labels of its development kit'
        ),
    ),
    (
        "ImageNet's validation images without their classes",
        tuple(f"{split}/ILSVRC2012_val_*.JPEG" for split in ("val", "test", "validation")),
        (
            "move each into val/CLASS/ by the labels of the development kit, or of Kaggle's "
            "LOC_val_solution.csv"
        ),
    ),
    (
        "tiny-imagenet as it is downloaded",
        ("val/val_annotations.txt",),
        (
            'move the images up with: for c in train/*/; do mv "$c"images/* "$c" && rmdir '
            '"$c"images; '
            'done; cd val && while read -r f c _; do mkdir -p "$c" && mv images/"$f" "$c/"; '
            "done < val_annotations.txt && rmdir images && cd .. && mv test test-without-labels"
        ),
    ),
    (
        "CIFAR's pickles",
        ("data_batch_1", "*/data_batch_1", "batches.meta", "*/batches.meta", "cifar-100-python"),
        ARRAYS,
    ),
    ("CIFAR's binary files", ("data_batch_1.bin", "*/data_batch_1.bin", "train.bin"), ARRAYS),
    (
        "MNIST's idx files",
        ("*-images-idx3-ubyte*", "*/*-images-idx3-ubyte*", "*-images.idx3-ubyte*"),
        ARRAYS,
    ),
    ("Parquet files", ("*.parquet", "*/*.parquet"), ARRAYS),
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
                return f"{data} has {what} ({name}), which are not read: {advice}. {WANTED}."
    return ""
