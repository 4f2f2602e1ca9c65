"""hvd_lbt's reducer and optimizer in a training loop of one's own.

horovodrun -np 2 python docs/example_reducer.py
"""

import torch
from torch import nn
from torch.nn import functional as F

from hvd_lbt import comm
from hvd_lbt.optim import FusedSGD
from hvd_lbt.reducer import GradientReducer
from hvd_lbt.schedule.layout import make_layout


def main() -> None:
    world = comm.init()
    torch.manual_seed(0)  # the same weights on every rank
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 4))
    optimizer = FusedSGD(model.parameters(), lr=0.1, momentum=0.9)
    reducer = GradientReducer(  # 1. wrap
        model,
        optimizer,
        world=world,
        allreduce_async=comm.allreduce_async_,
        synchronize=comm.synchronize,
    )
    pattern = torch.randn(4, 20)
    for update in range(100):
        global_batch = 32 if update < 50 else 128  # a batch that grows
        generator = torch.Generator().manual_seed(update)
        labels = torch.randint(0, 4, (global_batch,), generator=generator)
        images = pattern[labels] + torch.randn(global_batch, 20, generator=generator)
        layout = make_layout(
            global_batch, rank=world.rank, size=world.size, micro_batch=16, ghost_batch=8
        )
        parts = layout.micro_batches
        for index, part in enumerate(parts):
            image, label = (t[part.start : part.stop] for t in (images, labels))
            # each micro-batch's share of the mean over the global batch
            loss = F.cross_entropy(model(image), label, reduction="sum") / global_batch
            reducer.backward(loss, last=index == len(parts) - 1)  # 2. instead of loss.backward()
        if not parts:
            reducer.backward(None, last=True)  # a rank without samples takes part in the sum
        optimizer.step()  # 3. as ever: the world's gradient, straight from the wire
    right = (model(images).argmax(1) == labels).float().mean().item()
    if world.rank == 0:
        print(f"accuracy of the last batch {right:.3f}, {reducer.stats()}")
    comm.shutdown()


if __name__ == "__main__":
    main()
