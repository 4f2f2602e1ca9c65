"""Whether two places hold the same data: copies on several nodes, and a run's data at its resume.

Compared are the class names in order, the label of each sample in order, and which samples they
are: of a folder by file names, of shards by the bytes of each image. Where the data lies, how it is
cut into shards and files' times are not compared; nor are the images' bytes, which would be read.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from hvd_lbt.data.class_names import hash_of
from hvd_lbt.data.formats.side_files import pixels_of
from hvd_lbt.data.own_data import OwnData
from hvd_lbt.data.samples import Images
from hvd_lbt.data.store import Store
from hvd_lbt.data.synthetic import SyntheticStore
from hvd_lbt.data.teacher import TeacherStore
from hvd_lbt.errors import UserError

HASHED = 2**18  # numbers at a time
Identity = dict[str, str]  # kind, count, classes, labels, samples: what is compared, as text
WORDS = {
    "kind": "the format",
    "count": "the number of images",
    "classes": "the class names or their order",
    "labels": "the labels",
    "samples": "the files",
    "pixels": "the size of the stored images (data convert --shorter-side)",
}


def identity(store: Images | SyntheticStore) -> Identity:
    """What two copies of a split must have in common; SHA-256 (hex) of what is long."""
    its = {
        "kind": "synthetic",
        "count": str(len(store)),
        "classes": hash_of(store.classes),
        "labels": "" if isinstance(store, OwnData) else _sha256_of(store.labels),
        "samples": "",
    }
    if isinstance(store, OwnData):  # its labels are known once they were read
        its |= {"kind": "python", "labels": "", "samples": store.digest}
    if isinstance(store, TeacherStore):
        its |= {"kind": "teacher", "samples": store.what}
    if isinstance(store, Store):
        index = store.index
        its["kind"] = index.kind
        if store.contents:
            its["samples"] = store.contents
        elif index.extents is None:
            its["samples"] = _sha256_of(index.files.ends, index.files.blob)
        else:
            its["samples"] = _sha256_of(index.extents[:, 2])
        if made := pixels_of(index.root):  # without: as checkpoints of before have it
            its["pixels"] = made
    return its


def same_on_all_ranks(
    stores: Mapping[str, Images | SyntheticStore], allgather: Callable[[Any], list[Any]]
) -> dict[str, Identity]:
    """The identity of each split; UserError on all ranks if one has other data than most.

    allgather: gives every rank the plain values of all, by rank.
    """
    splits = {split: identity(store) for split, store in stores.items()}
    compare_copies(allgather((os.uname().nodename, splits)))
    return splits


def compare_copies(of_ranks: Sequence[tuple[str, Mapping[str, Identity]]]) -> None:
    """Raise UserError naming the ranks whose data is not that of most; (host, splits) by rank."""
    views = [json.dumps(splits, sort_keys=True) for _, splits in of_ranks]
    if len(set(views)) == 1:
        return
    usual = views.index(Counter(views).most_common(1)[0][0])
    others = [rank for rank, view in enumerate(views) if view != views[usual]]
    named = ", ".join(f"rank {rank} on {of_ranks[rank][0]}" for rank in others[:8])
    what = _differences(of_ranks[usual][1], of_ranks[others[0]][1])
    raise UserError(
        f"--data is not the same on all ranks: {named}{', …' if len(others) > 8 else ''} "
        f"{'differs' if len(others) == 1 else 'differ'} from rank {usual} on "
        f"{of_ranks[usual][0]} in {what}. Copy the data again, so that all nodes have the same "
        "files."
    )


def same_at_resume(
    state: Mapping, splits: Mapping[str, Identity], run: str, *, resumes: bool = True
) -> str:
    """Raise UserError if a checkpoint's state was trained on other data; what to say, or nothing.

    resumes: whether the run itself goes on, for the advice.

    A folder that was converted to shards may replace it: its order and labels are the same, and
    what tells its samples apart is not. A checkpoint of before 0.2 has its number of images alone.
    """
    old: Mapping[str, Identity] | None = state.get("data")
    if old is None:
        return (
            "The checkpoint does not say on which files it was trained: only counts were compared."
        )
    differences = _differences(
        *({split: its for split, its in all_.items() if split in old} for all_ in (old, splits)),
        converted=True,
    )
    if differences:
        resume, another = ("Resume with", ", or choose another --out") if resumes else ("Give", "")
        raise UserError(
            f"{run} was trained on other data: {differences} are not the same. {resume} the same "
            f"--data (it may lie elsewhere, or be converted by `hvd_lbt data convert`){another}."
        )
    moved = old["train"]["kind"], splits["train"]["kind"]
    if moved[0] != moved[1]:
        return f"The data was {moved[0]} and is {moved[1]}: classes and labels agree in order."
    return ""


def _differences(
    one: Mapping[str, Identity], other: Mapping[str, Identity], *, converted: bool = False
) -> str:
    """Which of WORDS are not the same in which split; converted: the format may be another."""
    found = []
    for split, its in one.items():
        theirs = other.get(split, {})
        skip = ("kind", "samples") if converted and its["kind"] != theirs.get("kind") else ()
        keys = [key for key in WORDS if key not in skip and its.get(key) != theirs.get(key)]
        if keys:
            words = [WORDS[key] for key in keys]
            if "count" in keys:
                words = [f"{WORDS['count']} ({its['count']} and {theirs.get('count')})"]
            found.append(f"{split}: {', '.join(words)}")
    return "; ".join(found)


def _sha256_of(*arrays: Any) -> str:
    """Of bytes as they are, and of the magnitudes of numbers as int64, without a copy of all."""
    digest = hashlib.sha256()
    for array in arrays:
        for first in range(0, len(array), HASHED):
            part = array[first : first + HASHED]
            digest.update(part if part.dtype == np.uint8 else np.abs(part).astype("<i8"))
    return digest.hexdigest()
