"""Small data sets with the structure that the published archives have."""

import functools
import gzip
import io
import json
import pickle
import struct
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from data_sets import encoded
from scipy.io import savemat

# The ILSVRC2012_IDs of the development kit are not in the order of the WNIDs.
ID_OF = {"n01440764": 3, "n01443537": 1, "n02105855": 2}
WNIDS = tuple(sorted(ID_OF))
TRAIN = {
    f"{wnid}/{wnid}_{number}.JPEG": encoded("JPEG", 10 * ID_OF[wnid] + number, (30, 24))
    for wnid in WNIDS
    for number in (10, 2, 1)
}
TRUTH = ("n02105855", "n01440764", "n02105855", "n01443537")  # of validation image 1, 2, 3, 4
VAL = {
    f"ILSVRC2012_val_{number:08}.JPEG": encoded("JPEG", 100 + number, (30, 24))
    for number in range(1, 5)
}


def tar_of(files: dict[str, bytes], mode: str = "w") -> bytes:
    """A tar of these files, in this order."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode=mode) as archive:
        for name, data in files.items():
            about = tarfile.TarInfo(name)
            about.size = len(data)
            archive.addfile(about, io.BytesIO(data))
    return packed.getvalue()


def write(folder: Path, files: dict[str, bytes | str]) -> Path:
    """FOLDER/NAME for each."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data.encode() if isinstance(data, str) else data)
    return folder


def inner_tars(train: dict[str, bytes] = TRAIN) -> dict[str, bytes]:
    """WNID.tar with the class's images, in the order in which they are listed."""
    by_class: dict[str, dict[str, bytes]] = {}
    for name, data in train.items():
        wnid, _, file = name.partition("/")
        by_class.setdefault(wnid, {})[file] = data
    return {f"{wnid}.tar": tar_of(its) for wnid, its in reversed(by_class.items())}


@functools.cache  # its header has the time
def meta_mat(counts: int = 3) -> bytes:
    """data/meta.mat: the classes, and one synset above them."""
    kind = [
        ("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O"),
        ("num_children", "O"), ("children", "O"), ("wordnet_height", "O"),
        ("num_train_images", "O"),
    ]  # fmt: skip
    rows = [
        (number, wnid, f"words of {wnid}", "a gloss", 0, np.zeros((1, 0)), 0, counts)
        for wnid, number in sorted(ID_OF.items(), key=lambda item: item[1])
    ]
    rows.append((1001, "n00001740", "entity", "", 3, np.arange(1, 4), 1, 0))
    file = io.BytesIO()
    savemat(file, {"synsets": np.array(rows, dtype=kind).reshape(-1, 1)})
    return file.getvalue()


def devkit(truth: str | None = None) -> bytes:
    """ILSVRC2012_devkit_t12.tar.gz."""
    lines = truth or "".join(f"{ID_OF[wnid]}\n" for wnid in TRUTH)
    return tar_of(
        {
            "ILSVRC2012_devkit_t12/readme.txt": b"...",
            "ILSVRC2012_devkit_t12/data/meta.mat": meta_mat(),
            "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt": lines.encode(),
        },
        "w:gz",
    )


def archives() -> dict[str, bytes | str]:
    """The three original archives of ImageNet."""
    return {
        "ILSVRC2012_img_train.tar": tar_of(inner_tars()),
        "ILSVRC2012_img_val.tar": tar_of(dict(reversed(VAL.items()))),
        "ILSVRC2012_devkit_t12.tar.gz": devkit(),
    }


def solution() -> str:
    """LOC_val_solution.csv, in no order, with one or two boxes."""
    rows = [
        f"ILSVRC2012_val_{number:08},{' '.join([f'{wnid} 1 2 33 44'] * (1 + number % 2))} "
        for number, wnid in reversed(list(enumerate(TRUTH, 1)))
    ]
    return "\n".join(["ImageId,PredictionString", *rows, ""])


def kaggle() -> dict[str, bytes | str]:
    """Kaggle's tree."""
    place = "ILSVRC/Data/CLS-LOC"
    return {
        **{f"{place}/train/{name}": data for name, data in TRAIN.items()},
        **{f"{place}/val/{name}": data for name, data in VAL.items()},
        f"{place}/test/ILSVRC2012_test_00000001.JPEG": encoded("JPEG"),
        "LOC_val_solution.csv": solution(),
        "LOC_synset_mapping.txt": "".join(f"{wnid} a name, another\n" for wnid in WNIDS),
    }


def class_folders() -> dict[str, bytes | str]:
    """The same images as class folders."""
    names = zip(VAL.items(), TRUTH, strict=True)
    return {
        **{f"train/{name}": data for name, data in TRAIN.items()},
        **{f"val/{wnid}/{name}": data for (name, data), wnid in names},
    }


def tiny() -> dict[str, bytes | str]:
    """tiny-ImageNet's tree."""
    train = {
        f"train/{wnid}/images/{wnid}_{number}.JPEG": encoded("JPEG", 7 * number, (8, 8))
        for wnid in WNIDS
        for number in range(2)
    }
    boxes = {f"train/{wnid}/{wnid}_boxes.txt": "a\t0\t0\t1\t1\n" for wnid in WNIDS}
    val = {f"val/images/val_{at}.JPEG": encoded("JPEG", 50 + at, (8, 8)) for at in range(3)}
    rows = [f"val_{at}.JPEG\t{WNIDS[2 - at]}\t0\t0\t5\t5\n" for at in range(3)]
    return {
        **train,
        **boxes,
        **val,
        "val/val_annotations.txt": "".join(rows),
        "wnids.txt": "".join(f"{wnid}\n" for wnid in reversed(WNIDS)),
        "test/images/test_0.JPEG": encoded("JPEG", size=(8, 8)),
    }


CLASS_NAMES = ["tench, Tinca tinca", "goldfish", "affenpinscher"]


def parquet(
    file: Path,
    rows: list[tuple[dict | None, int | None]],
    names: list[str] | None = CLASS_NAMES,
    group: int = 3,
    label_type: pa.DataType | None = None,
) -> None:
    """One file as `datasets` writes it: rows are ({bytes, path}, label)."""
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    image = pa.array([one for one, _ in rows], kind)
    label = pa.array([its for _, its in rows], label_type or pa.int64())
    table = pa.table({"image": image, "label": label})
    if names is not None:
        features = {
            "image": {"_type": "Image"},
            "label": {"names": names, "_type": "ClassLabel"},
        }
        about = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": about})
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, file, row_group_size=group)


def hub(data: Path) -> Path:
    """ImageNet's Parquet files: two of train, validation, and a test split without labels."""
    rows = [
        ({"bytes": image, "path": name.rpartition("/")[2]}, WNIDS.index(name.partition("/")[0]))
        for name, image in TRAIN.items()
    ]
    parquet(data / "data/train-00000-of-00002.parquet", rows[:5])
    parquet(data / "data/train-00001-of-00002.parquet", rows[5:])
    val = [
        ({"bytes": image, "path": name}, WNIDS.index(wnid))
        for (name, image), wnid in zip(VAL.items(), TRUTH, strict=True)
    ]
    parquet(data / "data/validation-00000-of-00001.parquet", val)
    test = [({"bytes": encoded("JPEG"), "path": "t.JPEG"}, -1)]
    parquet(data / "data/test-00000-of-00001.parquet", test)
    return data


def cifar_pixels(count: int, seed: int) -> np.ndarray:
    """uint8 (count, 3072): red, green and blue planes."""
    return np.random.default_rng(seed).integers(0, 256, (count, 3072), dtype=np.uint8)


def cifar10(binary: bool, each: int = 3) -> dict[str, bytes]:
    """CIFAR-10's files: five batches and the test batch, of `each` images."""
    names = [f"class {number}" for number in range(10)]
    files = {}
    batches = [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]
    for number, name in enumerate(batches):
        pixels, labels = cifar_pixels(each, number), [(3 * number + at) % 10 for at in range(each)]
        if binary:
            records = zip(labels, pixels, strict=True)
            files[f"{name}.bin"] = b"".join(bytes([at]) + row.tobytes() for at, row in records)
        else:
            values = {b"batch_label": name.encode(), b"labels": labels, b"data": pixels}
            files[name] = pickle.dumps(values, 2)
    if binary:
        return files | {"batches.meta.txt": "\n".join([*names, "", ""]).encode()}
    meta = {b"num_vis": 3072, b"label_names": [name.encode() for name in names]}
    return files | {"batches.meta": pickle.dumps(meta, 2)}


def cifar100(binary: bool, each: int = 4) -> dict[str, bytes]:
    """CIFAR-100's files."""
    names = [f"fine {number:02}" for number in range(100)]
    files = {}
    for number, name in enumerate(("train", "test")):
        pixels = cifar_pixels(each, 20 + number)
        fine = [(7 * at + number) % 100 for at in range(each)]
        coarse = [label // 5 for label in fine]
        if binary:
            rows = zip(coarse, fine, pixels, strict=True)
            files[f"{name}.bin"] = b"".join(bytes([c, f]) + row.tobytes() for c, f, row in rows)
        else:
            values = {b"fine_labels": fine, b"coarse_labels": coarse, b"data": pixels}
            files[name] = pickle.dumps(values, 2)
    if binary:
        return files | {
            "fine_label_names.txt": "\n".join(names).encode(), "coarse_label_names.txt": b"x",
        }  # fmt: skip
    meta = {b"fine_label_names": names, b"coarse_label_names": []}
    return files | {"meta": pickle.dumps(meta, 2)}


def idx(values: np.ndarray) -> bytes:
    """An idx file of bytes."""
    head = struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape)
    return head + values.tobytes()


def mnist(packed: bool) -> dict[str, bytes]:
    """MNIST's four files, of 12 and 5 images."""
    files = {}
    for start, count in (("train", 12), ("t10k", 5)):
        random = np.random.default_rng(count)
        images = random.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = np.arange(count, dtype=np.uint8) % 10
        for name, values in (("images-idx3", images), ("labels-idx1", labels)):
            data = idx(values)
            end = ".gz" if packed else ""
            files[f"{start}-{name}-ubyte{end}"] = gzip.compress(data) if packed else data
    return files
