"""Blocks are asked for once, before their samples, and hold all of their samples' bytes."""

import json
import os

import numpy as np
import pytest
import torch
from data_sets import write_folder

from hvd_lbt.cli import main
from hvd_lbt.data import read_ahead
from hvd_lbt.data.convert import convert
from hvd_lbt.data.order import SampleStream
from hvd_lbt.data.pipeline import train_batches
from hvd_lbt.data.read_ahead import ReadAhead, ask_for
from hvd_lbt.data.store import open_train_split
from hvd_lbt.recipe import load_recipe

FORMS = ("folder", "webdataset", "tfrecord", "recordio")


@pytest.fixture(params=FORMS)
def store(request, tmp_path):
    data = write_folder(tmp_path / "folder")
    if request.param != "folder":
        convert(data, tmp_path / "shards", form=request.param, samples_per_shard=8)
        data = tmp_path / "shards"
    return open_train_split(data)


class AtOnce:
    """Readers that do it now."""

    def submit(self, function, *arguments):
        function(*arguments)


def test_the_pieces_of_a_block_hold_its_samples(store):
    n = len(store)
    for block in (range(1), range(3, 11), range(n - 5, n), range(n)):
        pieces = []
        for place, offset, length in store.pieces(block):
            with open(place, "rb") as file:
                file.seek(offset)
                pieces.append(file.read(length or -1))
        if store.index.extents is None:
            assert pieces == [store.read(index) for index in block]
        else:
            assert len(pieces) == len(np.unique(store.index.extents[block.start : block.stop, 0]))
            assert all(
                any(store.read(index) in piece for piece in pieces)
                for index in block
                if store.index.extents[index, 2] > 0  # others lie in several parts
            )


def test_each_window_is_asked_for_once_and_before_its_samples(store, monkeypatch):
    n = len(store)
    stream = SampleStream(n, 3, shuffle_block=4, shuffle_window=2)
    asked = []
    monkeypatch.setattr(read_ahead, "ask_for", lambda store, blocks: asked.append(blocks))
    ahead = ReadAhead(store, stream.windows, AtOnce())
    for first in range(0, 3 * n - 2, 3):
        ahead.before(first, 3)
        there = {i for blocks in asked[-4:] for block in blocks for i in block}
        assert set(stream.indices(first, 3).tolist()) <= there
    windows = 3 * -(-n // 8)
    assert len(asked) == windows
    assert sorted(i for blocks in asked for block in blocks for i in block) == sorted(
        [*range(n)] * 3
    )


def test_the_kernel_is_asked_for_whole_blocks_and_failures_are_left_to_the_reads(
    store, monkeypatch
):
    asked = []
    monkeypatch.setattr(
        os, "posix_fadvise", lambda descriptor, at, length, advice: asked.append((at, length))
    )
    ask_for(store, [range(6), range(10, 13)])
    assert asked == [(at, its) for b in (range(6), range(10, 13)) for _, at, its in store.pieces(b)]
    monkeypatch.setattr(os, "open", lambda *arguments: (_ for _ in ()).throw(OSError(5, "")))
    ask_for(store, [range(6)])


def test_training_in_blocks_takes_the_samples_of_the_stream(tmp_path):
    data = write_folder(tmp_path / "data")
    store, n = open_train_split(data), 23
    recipe = load_recipe("digits", ["data.shuffle_block=4", "data.shuffle_window=2"])
    parts = [(at, min(5, 2 * n - at), 5) for at in range(0, 2 * n, 5)]
    device = torch.device("cpu")
    made = [*train_batches(store, recipe.data, parts, seed=7, micro_batch=5, device=device)]
    labels = torch.cat([batch.labels for batch in made]).tolist()
    order = SampleStream(n, 7, 4, 2).indices(0, 2 * n)
    assert labels == store.labels[order].tolist()
    assert labels[:n] != store.labels[SampleStream(n, 7).indices(0, n)].tolist()


def test_the_benchmarks_of_order_and_reads_give_their_lines(tmp_path, capsys):
    data = write_folder(tmp_path / "data")
    words = ("--block", "4", "--window", "2", "--micro-batch", "5", "--repetitions", "1")
    assert main(["bench", "reads", "--data", str(data), *words]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line.get("case") for line in lines[1:]] == [
        f"folder, {order}" for order in ("in sequence", "blocks", "at random")
    ]
    assert main(["bench", "order", "--samples", "0"]) == 2
    assert "1 to 2^62" in capsys.readouterr().err
