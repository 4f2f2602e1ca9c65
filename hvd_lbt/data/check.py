"""`hvd_lbt data check`: decodes every image as training would, and lists what is bad."""

import argparse
import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

from hvd_lbt import terminal
from hvd_lbt.arguments import threads
from hvd_lbt.data.formats import (
    SUMS_FILE,
    Findings,
    SplitError,
    hides_record,
    masked_crc,
    tfrecord_places,
)
from hvd_lbt.data.index import Index, open_index
from hvd_lbt.data.pipeline import evaluation_batches
from hvd_lbt.data.pixels import Encoded
from hvd_lbt.data.source import has_split
from hvd_lbt.data.store import TIMEOUT, Store, open_test_split, open_train_split
from hvd_lbt.errors import SampleError
from hvd_lbt.recipe import DataRecipe

MICRO_BATCH = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hvd_lbt data check`."""
    parser.add_argument("data", type=Path, help="a data set in any format")
    parser.add_argument("--classes", type=Path, help="one class name a line [DATA/classes.txt]")
    parser.add_argument("--readers", type=threads, default=8, help="threads that read [8]")
    parser.add_argument("--threads", type=threads, help="threads that decode [the cores]")


def main(args: argparse.Namespace) -> int:
    """Print what is bad and what is no sample; the exit code is 1 if there is anything to look
    at.
    """
    stores, findings = _open(args.data, args.classes)
    data = DataRecipe(
        image_size=8,
        augment="none",
        mean=(0, 0, 0),
        std=(1, 1, 1),
        on_bad_sample="skip",
        readers=args.readers,
        threads=args.threads,
    )
    for store in stores:
        its = findings[store.index.root.name]
        its.errors += [str(error) for error in check(store, data)]
        its.errors += _compare_sums(store.index, its.errors)
    for split, its in findings.items():
        for line in its.errors:
            print(terminal.printable(line))
        for line in its.lines():
            print(terminal.printable(f"{split}: {line}"))
    bad = sum(len(its.errors) for its in findings.values())
    print(f"{sum(map(len, stores)):,} images, {bad:,} bad")
    return int(any(its.questionable() for its in findings.values()))


def _open(data: Path, classes: Path | None) -> tuple[list[Store], dict[str, Findings]]:
    """The splits that can be decoded, and what was found in each, by the name of its folder."""
    stores: list[Store] = []
    findings: dict[str, Findings] = {}
    for split in ("train", "test"):
        if split == "test" and not has_split(data, "test"):
            continue
        try:
            if split == "train":
                store = open_train_split(data, classes)
            elif stores:
                store = open_test_split(data, stores[0].classes, classes)
            else:  # nothing to compare its classes with
                index = open_index(data, "test", TIMEOUT)
                findings[index.root.name] = index.findings
                continue
        except SplitError as error:
            findings[split] = error.findings
        else:
            stores.append(store)
            findings[store.index.root.name] = store.index.findings
    return stores, findings


def _compare_sums(index: Index, named: list[str]) -> list[str]:
    """Shards that differ from sha256sums.txt, which `hvd_lbt data convert` writes, or are not
    there.

    named: errors so far; a shard with one of them is not named again.
    """
    file = index.root / SUMS_FILE
    if index.extents is None or not file.is_file():
        return []
    wrong = []
    lines = file.read_text("utf-8", "replace").splitlines()
    sums = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    shards = {index.files[number] for number in range(len(index.files))}
    for name, digest in sums.items():
        if name not in shards:
            wrong.append(f"{index.root / name} is listed in {SUMS_FILE} and is not there.")
            continue
        if any(error.startswith(str(index.root / name)) for error in named):
            continue
        with (index.root / name).open("rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != digest:
                wrong.append(f"{index.root / name} is not as {SUMS_FILE} has it: it was changed.")
    return wrong


def check(store: Store, data: DataRecipe) -> list[SampleError]:
    """Decode all of `store`; returns an error for each bad sample, in the store's order.

    Bad is also a TFRecord whose checksum does not hold and a RecordIO record that has swallowed the
    next, though their images may still decode.
    """
    store = CHECKED.get(store.index.kind, lambda its: its)(store)
    bad: list[SampleError] = []
    console = terminal.console(stderr=True)
    columns = (*Progress.get_default_columns()[:3], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(terminal.description(f"decoding {store.index.root}"), total=len(store))
        starts = range(0, len(store), MICRO_BATCH)
        ranges = [(at, min(MICRO_BATCH, len(store) - at)) for at in starts]
        for batch in evaluation_batches(
            store,
            data,
            ranges,
            micro_batch=MICRO_BATCH,
            device=torch.device("cpu"),
            on_skipped=bad.append,
        ):
            bar.update(task, advance=len(batch.labels))
    return bad


class _Verified(Store):
    """A store of TFRecord shards that compares each record with its checksum."""

    def __init__(self, store: Store):
        vars(self).update(vars(store))
        extents = store.index.extents
        assert extents is not None
        self._first = np.searchsorted(extents[:, 0], np.arange(len(store.index.files)))

    def image(self, index: int) -> Encoded:
        """As Store's; a SampleError too if the record was changed since it was written."""
        assert self.index.extents is not None
        shard = int(self.index.extents[index, 0])
        try:
            places = tfrecord_places(self.index.root / self.index.files[shard])
            offset, length = places[index - self._first[shard]]
            data = self._shard(shard).read(length + 4, offset)
        except OSError as error:
            raise self._failure(index, error) from error
        if masked_crc(data[:length]) != int.from_bytes(data[length:], "little"):
            raise SampleError(
                f"{self.name(index)} is not as it was written: the record's checksum does not hold."
            )
        return super().image(index)


class _Whole(Store):
    """A store of RecordIO shards that looks into each record for the beginning of another."""

    def __init__(self, store: Store):
        vars(self).update(vars(store))

    def image(self, index: int) -> Encoded:
        """As Store's; a SampleError too if the record's length is damaged."""
        extents = self.index.extents
        if extents is not None and extents[index, 2] > 0 and hides_record(self.read(index)):
            raise SampleError(
                f"{self.name(index)} holds the beginning of another record: its length is damaged."
            )
        return super().image(index)


CHECKED: dict[str, Callable[[Store], Store]] = {"tfrecord": _Verified, "recordio": _Whole}
