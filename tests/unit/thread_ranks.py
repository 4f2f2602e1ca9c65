"""Ranks that are threads of one process: as many as a test wants, without Horovod."""

import threading

import torch

from hvd_lbt.reducer import GradientReducer
from hvd_lbt.world import World

SEEDING = threading.Lock()  # ranks that are threads share torch's random numbers


class Ranks:
    """Threads that are ranks of a world: the sum waits for all, as Horovod's does."""

    def __init__(self, size):
        self.size = size
        self.barrier = threading.Barrier(size, timeout=60)
        self.tensors = [None] * size

    def sum_of(self, rank):
        def allreduce_async(tensor, name):
            self.tensors[rank] = (name, tensor.clone())
            self.barrier.wait()
            assert len({name for name, _ in self.tensors}) == 1
            tensor.copy_(torch.stack([tensor for _, tensor in self.tensors]).sum(0))
            self.barrier.wait()

        return allreduce_async

    def synchronize(self, handle):
        """Nothing to wait for: `sum_of` has waited."""

    def run(self, program):
        """program(rank, make_reducer) on every rank; what it returned or raised, by rank."""
        results = [None] * self.size

        def one(rank):
            def make(model, optimizer, **settings):
                sums = {"allreduce": self.sum_of(rank), "synchronize": self.synchronize}
                return reducer_of(model, optimizer, rank=rank, size=self.size, **sums, **settings)

            try:
                results[rank] = program(rank, make)
            except Exception as error:
                results[rank] = error

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


class AsyncRanks(Ranks):
    """The same, but a sum is over when every rank has asked for it by name, in any order."""

    def __init__(self, size):
        super().__init__(size)
        self.asked = {}
        self.news = threading.Condition()

    def sum_of(self, rank):
        def allreduce_async(tensor, name):
            with self.news:
                sent = self.asked.setdefault(name, {})
                assert rank not in sent, f"rank {rank} sends {name} twice"
                done = sent.setdefault("done", threading.Event())
                sent[rank] = tensor
                if len(sent) == self.size + 1:
                    tensors = [sent[other] for other in range(self.size)]
                    total = torch.stack(tensors).sum(0)
                    for own in tensors:
                        own.copy_(total)
                    del self.asked[name]
                    done.set()
            return done

        return allreduce_async

    def synchronize(self, handle):
        """Wait for the sum, as Horovod does; a rank that never sends it is an error here."""
        assert handle.wait(timeout=20), f"ranks miss in {self.asked}"


def reducer_of(
    model,
    optimizer,
    allreduce=lambda tensor, name: None,
    rank=0,
    size=1,
    synchronize=lambda handle: None,
    **settings,
):
    return GradientReducer(
        model,
        optimizer,
        world=World(rank=rank, size=size),
        allreduce_async=allreduce,
        synchronize=synchronize,
        **({"wire": "fp32"} | settings),
    )
