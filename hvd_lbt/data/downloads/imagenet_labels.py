"""The labels of ImageNet's validation images: of the development kit, or of Kaggle's table.

The kit's ground truth has one ILSVRC2012_ID a line, which is not the label that training uses:
`meta.mat` says which WNID an ID is, and labels are the positions of the sorted WNIDs, as
torchvision has them.
"""

import csv
import io
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hvd_lbt.data.downloads.apart import run_apart
from hvd_lbt.data.downloads.common import SAME_ROW, some, text_lines
from hvd_lbt.data.downloads.packed import read_packed
from hvd_lbt.data.formats import Findings
from hvd_lbt.data.reading import read_regular
from hvd_lbt.errors import UserError
from hvd_lbt.terminal import printable

VALIDATION = re.compile(r"ILSVRC2012_val_(\d{8})")
WNID = re.compile(r"n\d{8}")
DEVKIT = "ILSVRC2012_devkit_t12"
META, TRUTH = "meta.mat", "ILSVRC2012_validation_ground_truth.txt"
SOLUTION, MAPPING = "LOC_val_solution.csv", "LOC_synset_mapping.txt"
LARGEST_KIT = 32 << 20  # bytes of the unpacked development kit: 2.7 MB as published
READ_META = """
import io, sys
from scipy.io import loadmat
loadmat(io.BytesIO(sys.stdin.buffer.read()), squeeze_me=True)
"""
NEEDED = (
    f"the development kit, {DEVKIT}.tar.gz or its folder (it has data/{META} and data/{TRUTH}), or "
    f"Kaggle's {SOLUTION}"
)


@dataclass(kw_only=True)
class Labels:
    """What a mapping says.

    source: its files, for messages. wnids: all classes it knows, None if it lists none. of_image:
    WNID by the image's name without ending. train_counts: training images by WNID, as published.
    """

    source: str
    files: tuple[Path, ...]
    wnids: tuple[str, ...] | None
    of_image: dict[str, str]
    train_counts: dict[str, int] = field(default_factory=dict)
    findings: Findings = field(default_factory=Findings)


def find_labels(folders: Iterable[Path]) -> Labels | None:
    """The mapping in one of the folders; where there are both kinds they must agree."""
    kit = table = None
    for folder in folders:
        kit = kit or _find_kit(folder)
        if table is None and (folder / SOLUTION).is_file():
            table = _of_table(folder)
    if kit is None or table is None:
        return kit or table
    other = sorted(
        name
        for name in kit.of_image.keys() & table.of_image.keys()
        if kit.of_image[name] != table.of_image[name]
    )
    if other:
        raise UserError(
            f"{kit.source} and {table.source} give other labels to {len(other):,} images "
            f"({some(other)}): one of them is not ImageNet's. Remove it."
        )
    kit.files += table.files
    return kit


def _find_kit(folder: Path) -> Labels | None:
    """The development kit in a folder: packed, or unpacked."""
    for place in (folder / DEVKIT / "data", folder / "data", folder):
        if (place / META).is_file() and (place / TRUTH).is_file():
            try:
                meta = read_regular(place / META, LARGEST_KIT)
                truth = read_regular(place / TRUTH, LARGEST_KIT)
            except OSError as error:
                raise UserError(f"{error.filename or place} cannot be read ({error}).") from error
            return _of_kit(place / META, meta, place / TRUTH, truth, (place / META, place / TRUTH))
    for name in (f"{DEVKIT}.tar.gz", f"{DEVKIT}.tgz", f"{DEVKIT}.tar"):
        if (folder / name).is_file():
            return _of_packed_kit(folder / name)
    return None


def _of_packed_kit(file: Path) -> Labels:
    kit = f"the development kit of tasks 1 and 2, {DEVKIT}.tar.gz"
    wanted = read_packed(file, (META, TRUTH), LARGEST_KIT, kit)
    names = (Path(f"{file}:{META}"), Path(f"{file}:{TRUTH}"))
    return _of_kit(names[0], wanted[META], names[1], wanted[TRUTH], (file,))


def _of_kit(
    meta: Path, meta_bytes: bytes, truth: Path, truth_bytes: bytes, files: tuple[Path, ...]
) -> Labels:
    wnid_of, counts = _read_meta(meta, meta_bytes)
    of_image = {}
    for number, line in enumerate(text_lines(truth, truth_bytes), 1):
        text = line.strip()
        if not text.isascii() or not text.isdecimal() or int(text[:9]) not in wnid_of:
            low, high = min(wnid_of), max(wnid_of)
            raise UserError(
                f"{printable(truth)} has {text[:40]!r} in line {number:,}, where an ILSVRC2012_ID "
                f"belongs, one of the {len(wnid_of):,} from {low} to {high} of {META}: it is not "
                "the ground truth of this development kit."
            )
        of_image[f"ILSVRC2012_val_{number:08}"] = wnid_of[int(text[:9])]
    return Labels(
        source=f"the development kit ({printable(truth)})",
        files=files,
        wnids=tuple(sorted(wnid_of.values())),
        of_image=of_image,
        train_counts=counts,
    )


def _read_meta(file: Path, raw: bytes) -> tuple[dict[int, str], dict[str, int]]:
    """WNID by ILSVRC2012_ID of the synsets without children; training images by WNID."""
    from scipy.io import loadmat  # slow to import

    run_apart(READ_META, raw, file)
    wnid_of: dict[int, str] = {}
    counts: dict[str, int] = {}
    try:
        synsets = loadmat(io.BytesIO(raw), squeeze_me=True)["synsets"]
        for row in synsets.reshape(-1):
            if int(_plain(row["num_children"])) != 0:
                continue
            number, wnid = int(_plain(row["ILSVRC2012_ID"])), str(_plain(row["WNID"]))
            if not WNID.fullmatch(wnid):
                raise UserError(f"{printable(file)} has the WNID {wnid[:40]!r}: it is damaged.")
            if number in wnid_of or wnid in counts:
                raise UserError(
                    f"{printable(file)} has the class {wnid} or the ILSVRC2012_ID {number} twice: "
                    "it is damaged. Download the development kit again."
                )
            wnid_of[number] = wnid
            counts[wnid] = int(_plain(row["num_train_images"])) if "num_train_images" in (
                synsets.dtype.names or ()) else -1  # fmt: skip
    except UserError:
        raise
    except Exception as error:  # scipy's readers raise nearly anything for a damaged file
        raise UserError(
            f"{printable(file)} cannot be read as MATLAB's synsets ({type(error).__name__}: "
            f"{error}). Download the development kit again."
        ) from error
    if not wnid_of:
        raise UserError(f"{printable(file)} has no classes: download the development kit again.")
    return wnid_of, {wnid: count for wnid, count in counts.items() if count >= 0}


def _plain(value: Any) -> Any:
    """A scalar out of MATLAB's arrays of one."""
    while hasattr(value, "reshape") and getattr(value, "ndim", False):
        (value,) = value.reshape(-1)
    return value.item() if hasattr(value, "item") else value


def _of_table(folder: Path) -> Labels:
    """Kaggle's LOC_val_solution.csv: `ImageId,PredictionString`, `WNID x y x y` for each box."""
    file, findings = folder / SOLUTION, Findings()
    of_image: dict[str, str] = {}
    head, *rows = text_lines(file)
    if [cell.strip() for cell in head.split(",")] != ["ImageId", "PredictionString"]:
        raise UserError(
            f"{printable(file)} begins with {head[:60]!r}, where ImageId,PredictionString belongs: "
            f"it is not Kaggle's {SOLUTION}."
        )
    try:
        for number, row in enumerate(csv.reader(rows, strict=True), 2):
            where = f"{printable(file)} has in line {number:,} "
            if len(row) != 2 or not row[0].strip():
                raise UserError(f"{where}{','.join(row)[:60]!r}, and not an image and its boxes.")
            image, words = row[0].strip().removesuffix(".JPEG"), row[1].split()
            wnids = set(words[::5])
            if not words or len(words) % 5 or not all(map(WNID.fullmatch, wnids)):
                raise UserError(
                    f"{where}{row[1][:60]!r} for {image[:60]!r}, where boxes belong: a WNID and "
                    "four numbers each, n01751748 111 108 208 201."
                )
            if len(wnids) > 1:
                raise UserError(
                    f"{where}boxes of several classes for {image[:60]!r} ({some(sorted(wnids))}): "
                    "an image has one label."
                )
            wnid = wnids.pop()
            if of_image.setdefault(image, wnid) != wnid:
                raise UserError(
                    f"{where}{wnid} for {image[:60]!r}, which is {of_image[image]} in an earlier "
                    "line: an image has one label."
                )
            if len(of_image) < number - 1 - findings.counts.get(SAME_ROW, 0):
                findings.add(SAME_ROW, f"{SOLUTION}, line {number:,}")
    except csv.Error as error:
        raise UserError(f"{printable(file)} is no CSV table ({error}).") from error
    wnids_listed = read_mapping(folder / MAPPING) if (folder / MAPPING).is_file() else None
    files = (file, *((folder / MAPPING,) if wnids_listed else ()))
    if wnids_listed and (unknown := sorted(set(of_image.values()) - set(wnids_listed))):
        raise UserError(
            f"{printable(file)} has classes that {MAPPING} beside it does not list: "
            f"{some(unknown)}."
        )
    return Labels(
        source=printable(file), files=files, wnids=wnids_listed, of_image=of_image,
        findings=findings,
    )  # fmt: skip


def read_mapping(file: Path) -> tuple[str, ...]:
    """The sorted WNIDs of Kaggle's LOC_synset_mapping.txt: `n01440764 tench, Tinca tinca`."""
    seen: dict[str, int] = {}
    for number, line in enumerate(text_lines(file), 1):
        wnid = line.split(maxsplit=1)[0] if line.strip() else ""
        if not WNID.fullmatch(wnid):
            raise UserError(
                f"{printable(file)} has {line[:40]!r} in line {number:,}, where a WNID and a name "
                "belong: n01440764 tench, Tinca tinca."
            )
        if seen.setdefault(wnid, number) != number:
            raise UserError(
                f"{printable(file)} has {wnid} twice, in lines {seen[wnid]:,} and {number:,}."
            )
    return tuple(sorted(seen))
