"""Options of the benchmarks that cannot be: exit code 2 and the option's name, before any work."""

import pytest

from hvd_lbt.cli import main

EACH = ("optimizer", "allreduce_step", "allreduce", "checkpoint", "input", "train")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        *(([name, "--repetitions", "0"], "--repetitions: 0") for name in EACH),
        *(([name, "--repetitions=x"], "--repetitions: x") for name in EACH),
        (["allreduce_step", "--accumulate", "0"], "--accumulate: 0"),
        (["allreduce_step", "--accumulate", "2", "-1"], "--accumulate: -1"),
        (["allreduce_step", "--bucket-mb", "0"], "--bucket-mb: 0"),
        (["allreduce_step", "--bucket-mb", "nan"], "--bucket-mb: nan"),
        (["allreduce_step", "--hidden", "--pixels", "1"], "--pixels 1 and --images 2"),
        (["allreduce_step", "--model", "resnet"], "--model resnet: it must be resnet18, "),
        (["allreduce", "--largest-mb", "0"], "--largest-mb: 0"),
        (["allreduce", "--largest-mb", "0.001"], "--largest-mb 0.001: the smallest message"),
        (["train", "--batches", "0"], "--batches: 0"),
        (["train", "--batches", "32", "0"], "--batches: 0"),
        (["train", "--set", "x=y"], "x: there is no such key"),
        (["train", "--set", "schedule.lr=["], "--set schedule.lr=[: it is not valid YAML"),
        (["train", "--recipe", "nothing"], "Recipe nothing: there is no shipped recipe"),
        (["input", "--set", "x=y"], "x: there is no such key"),
        (["input", "--batches", "0"], "--batches: 0"),
        (["input", "--micro-batch", "0"], "--micro-batch: 0"),
        (["input", "--threads", "0"], "--threads: 0"),
        (["input", "--threads", "100000"], "--threads: 100000"),
        (["input", "--index-entries", "-1"], "--index-entries: -1"),
        (["input", "--data", "/nowhere", "--index-entries", "0"], "/nowhere"),
        (["optimizer", "--threads", "0"], "--threads: 0"),
        (["optimizer", "--threads", "1000000000"], "--threads: 1000000000"),
        (["optimizer", "--model", "x" * 5000], "--model x"),
        (["optimizer", "--device", "tpu"], "--device: invalid choice: 'tpu'"),
        (["optimizer", "--model", "resnet18", "--only", "nothing"], "--only nothing: there is no"),
        (
            ["optimizer", "--model", "resnet18", "--out", "/dev/null/x"],
            "--out /dev/null/x: it cannot",
        ),
        (["checkpoint", "--folder", "/nowhere"], "--folder /nowhere: there is no such folder"),
        (["checkpoint", "--model", "resnet18", "--out", "/dev/null"], "--out /dev/null: it is not"),
    ],
)
def test_what_cannot_be_measured_is_named(words, named, capsys):
    assert main(["bench", *words]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("hvd_lbt")
    assert named in said
