"""`hvd_lbt data check`: decodes every image as training would, and lists what is bad."""

import argparse
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

from hvd_lbt.data.formats import masked_crc, tfrecord_places
from hvd_lbt.data.index import has_split
from hvd_lbt.data.pipeline import evaluation_batches
from hvd_lbt.data.store import Encoded, Store, open_test_split, open_train_split
from hvd_lbt.errors import SampleError
from hvd_lbt.recipe import DataRecipe

MICRO_BATCH = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hvd_lbt data check`."""
    parser.add_argument("data", type=Path, help="a data set in any format")
    parser.add_argument("--classes", type=Path, help="one class name a line [DATA/classes.txt]")
    parser.add_argument("--readers", type=int, default=8, help="threads that read [8]")
    parser.add_argument("--threads", type=int, help="threads that decode [the cores]")


def main(args: argparse.Namespace) -> int:
    """Print one line for each bad image; the exit code is 1 if there are any."""
    train = open_train_split(args.data, args.classes)
    stores = [train]
    if has_split(args.data, "test"):
        stores.append(open_test_split(args.data, train.classes, args.classes))
    data = DataRecipe(
        image_size=8,
        augment="none",
        mean=(0, 0, 0),
        std=(1, 1, 1),
        on_bad_sample="skip",
        readers=args.readers,
        threads=args.threads,
    )
    bad = [error for store in stores for error in check(store, data)]
    for error in bad:
        print(error)
    print(f"{sum(map(len, stores)):,} images, {len(bad):,} bad")
    return int(bool(bad))


def check(store: Store, data: DataRecipe) -> list[SampleError]:
    """Decode all of `store`; what cannot be is told, in the store's order.

    So is a TFRecord whose checksum does not hold, though its image may still decode.
    """
    if store.index.kind == "tfrecord":
        store = _Verified(store)
    bad: list[SampleError] = []
    console = Console(stderr=True)
    columns = (*Progress.get_default_columns()[:3], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(f"decoding {store.index.root}", total=len(store))
        starts = range(0, len(store), MICRO_BATCH)
        ranges = [(at, min(MICRO_BATCH, len(store) - at)) for at in starts]
        for batch in evaluation_batches(
            store,
            data,
            ranges,
            micro_batch=MICRO_BATCH,
            device=torch.device("cpu"),
            left_out=bad.append,
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
