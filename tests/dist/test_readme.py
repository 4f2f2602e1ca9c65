"""The Python of the README, on two ranks: its text, with the numbers of a small data set."""

import re
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"
BEFORE = """
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
data = TensorDataset(torch.randn(200, 20), torch.randint(0, 4, (200,)))
model = nn.Linear(20, 4)


def loss(x, y):
    return F.cross_entropy(model(x), y, reduction="none")


"""
AFTER = """
print("updates done:", update.index + 1, "batch:", update.global_batch)
hvd_lbt.shutdown()
"""
SMALLER = {"8192": "32", "epochs=90": "epochs=4", "epoch=30": "epoch=2", "factor=10": "factor=3"}
SMALLER |= {"micro_batch=128": "micro_batch=16", "num_workers=8": "num_workers=0"}


def test_the_code_of_the_readme_trains_on_two_ranks(ranks, tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    for published, small in SMALLER.items():
        assert published in code
        code = code.replace(published, small)
    program = tmp_path / "program.py"
    program.write_text(BEFORE + code + AFTER)
    assert ranks(2, program).count("updates done: 17 batch: ") == 2
