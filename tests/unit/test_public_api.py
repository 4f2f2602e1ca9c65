"""What `import hvd_lbt` gives, and what a type checker in a user's folder makes of it."""

import subprocess
import sys
from importlib.metadata import version

import pytest

import hvd_lbt


def test_all_is_sorted_and_listed_and_there():
    assert hvd_lbt.__all__ == sorted(hvd_lbt.__all__)
    assert set(hvd_lbt.__all__) <= set(dir(hvd_lbt))
    for name in hvd_lbt.__all__:
        assert getattr(hvd_lbt, name) is not None
    assert hvd_lbt.__version__ == version("hvd_lbt")
    with pytest.raises(AttributeError, match="no attribute 'Shedule'"):
        _ = hvd_lbt.Shedule


def test_a_plan_in_python_needs_neither_torch_nor_horovod():
    program = (
        "import sys, hvd_lbt\n"
        "s = hvd_lbt.Schedule(policy='grow_batch', epochs=2, lr=0.1, momentum=0.9, "
        "global_batch=8)\n"
        "print(hvd_lbt.make_plan(s, 64).updates, 'torch' in sys.modules, 'horovod' in sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.stdout == "16 False False\n", ended.stderr


GOOD = """\
import hvd_lbt
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

def train(model: nn.Module, data: "TensorDataset[Tensor]", loader: "DataLoader[Tensor]") -> float:
    fall = hvd_lbt.Milestone(epoch=1, factor=4)
    schedule = hvd_lbt.Schedule(
        policy="grow_batch", epochs=2, lr=0.1, momentum=0.9, global_batch=8, milestones=(fall,)
    )
    plan: hvd_lbt.Plan = hvd_lbt.make_plan(schedule, len(data))
    sampler = hvd_lbt.PlanSampler(data, plan, micro_batch=4, world=hvd_lbt.init())
    optimizer = hvd_lbt.FusedSGD(model.parameters(), lr=0.1)
    training = hvd_lbt.Training(model, optimizer, schedule)
    return sum(training.update(*one).loss for one in sampler.updates(loader))
"""
BAD = """\
from hvd_lbt import Schedule, Shedule, make_plan

Schedule(policy="grow", epochs=2, lr=0.1, momentum=0.9, global_batch=8)
make_plan(3, 4)
"""


# Parts of torch, and packages, that no type of ours or of GOOD is of: to read them takes most of
# mypy's time. `torch`, torch.nn, torch.optim and torch.utils.data are read.
UNREAD = (
    *("_dynamo", "_export", "_functorch", "_higher_order_ops", "_inductor", "_logging", "_numpy"),
    *("_prims", "_refs", "_subclasses", "_vendor", "ao", "distributed", "distributions", "export"),
    *("func", "fx", "jit", "onnx", "profiler", "quantization", "sparse", "testing"),
)
OTHERS = ("sympy.*", "numpy.*", "rich.*", "PIL.*", "pydantic.*")


def test_mypy_strict_in_a_users_folder(tmp_path):
    unread = ",".join((*(f"torch.{part}.*" for part in UNREAD), *OTHERS))
    (tmp_path / "mypy.ini").write_text(f"[mypy]\n[mypy-{unread}]\nfollow_imports = skip\n")
    (tmp_path / "good.py").write_text(GOOD.replace('"TensorDataset[Tensor]"', "TensorDataset"))
    (tmp_path / "bad.py").write_text(BAD)
    ended = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "good.py", "bad.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert not ended.stderr  # of a wrong mypy.ini
    lines = ended.stdout.splitlines()
    assert [line.split(":")[:2] for line in lines[:-1]] == [
        ["bad.py", "1"],
        ["bad.py", "3"],
        ["bad.py", "4"],
    ], ended.stdout
