"""Each benchmark runs: it finds its peers equal, and writes a line for every case."""

import json

import pytest
from launching import run_ranks

from hvd_lbt.cli import main
from hvd_lbt.data.digits import write_digits
from hvd_lbt.speed_profile import load_profile

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


def test_a_profile_of_two_ranks_is_read_by_the_plan(tmp_path, capsys):
    """Two ranks on one node: everything but the network between nodes."""
    out = tmp_path / "new/speed.yaml"
    words = ("bench", "profile", "digits", "--minutes", "0.05", "--out", out)
    settings = ("--set", "model.width=8", "--micro-batch", "16", "--data", write_digits())
    run_ranks(2, "-m", "hvd_lbt", *words, *settings)
    profile = load_profile(out)
    assert profile.workers_per_node == 2
    assert profile.gradient_bytes is not None
    assert profile.gradient_bytes > 2 * 100_000
    assert profile.within_node is not None
    assert profile.between_nodes is None
    assert profile.input_images_per_second is not None
    comments = [line for line in out.read_text().splitlines() if line.startswith("#")]
    (missing,) = [line for line in comments if line.startswith("# Not measured: ")]
    assert "between_nodes" in missing
    assert any(line.startswith("# Check: an update of ") for line in comments)
    assert main(["plan", "digits", "--speed", str(out), "--workers", "2", "16"]) == 0
    assert "between_nodes" in capsys.readouterr().out  # 16 workers are 8 nodes
