"""Each benchmark runs: it finds its peers equal, and writes a line for every case."""

import json

import pytest
from launching import run_ranks

MODEL = ("--model", "resnet18")
TRAIN = ("--recipe", "digits", "--batches", "32", "64")
INPUT = ("--recipe", "cifar10_small", "--batches", "1", "--micro-batch", "8", "--threads", "1")


@pytest.mark.parametrize(
    ("ranks", "words", "cases"),
    [
        (
            1,
            ("optimizer", *MODEL, "--threads", "1"),
            {"update, fp16 gradients", "unpack from fp16"},
        ),
        (1, ("checkpoint", *MODEL), {"copy", "compare", "write"}),
        (2, ("allreduce", "--largest-mb", "0.02"), {"allreduce fp16", "allreduce fp32"}),
        (
            2,
            ("allreduce_step", *MODEL, "--accumulate", "2"),
            {"communication and update, accumulation of 2"},
        ),
        (
            2,
            ("allreduce_step", *MODEL, "--hidden", "--pixels", "32"),
            {"hidden behind backward, 2 images of 32 pixels a rank"},
        ),
        (1, ("train", *TRAIN), {"global batch 32", "global batch 64"}),
        (
            1,
            ("input", *INPUT, "--index-entries", "2000", "--set", "data.eval_resize=36"),
            {"decoding alone", "evaluation against PIL", "index, folder", "index, tfrecord"},
        ),
    ],
    ids=lambda value: "-".join(value[:3]) if isinstance(value, tuple) else None,
)
def test_a_benchmark_with_one_repetition(tmp_path, ranks, words, cases):
    out = tmp_path / "new/lines.jsonl"
    run_ranks(ranks, "-m", "hvd_lbt", "bench", *words, "--repetitions", "1", "--out", out)
    first, *results = [json.loads(line) for line in out.read_text().splitlines()]
    assert first["event"] == "bench"
    assert first["bench"] == words[0]
    assert {result["event"] for result in results} == {"result"}
    assert cases <= {result["case"] for result in results}
