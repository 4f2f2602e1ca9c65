"""`python elastic_ranks.py …` is `hvd_lbt …` without kinks (smooth.py) that writes down its
samples.

Each worker appends to $HVD_LBT_TEST_LOG/PID.jsonl: before it sends an update's last gradients,
which samples of the stream went into them as DALI was given them; and which updates it saw
committed. $HVD_LBT_TEST_PAUSE seconds are slept in each update; with "target" an update waits until
the world has the size that the run asks for, or is about to change, however slow the machine.
$HVD_LBT_TEST_DIE: "evaluation" kills rank 1 in its first evaluation, "checkpoint" rank 0 before a
file has its name, "joining" rank 1 before it connects to the others, "connecting" after it has
published where; each once.
"""

import json
import os
import signal
import sys
import time
from collections import deque
from pathlib import Path

from torch import nn

from hvd_lbt.cli import main

nn.ReLU = lambda inplace=False: nn.Softplus()


def write_down(folder: Path, pause: str) -> None:
    """Wrap what the training loop calls."""
    from hvd_lbt import checkpoint, run, training
    from hvd_lbt.data import pipeline, samples
    from hvd_lbt.elastic import worker as elastic

    lines = (folder / f"{os.getpid()}.jsonl").open("a", buffering=1)
    given: deque = deque()  # to DALI, in the order in which batches come out
    now = {"pid": os.getpid(), "time": 0.0, "update": -1, "generation": 0, "rank": -1, "size": 0}
    drawn: list = []
    members: list = []

    def note(**facts) -> None:
        now["time"] = time.time()
        lines.write(json.dumps(now | facts) + "\n")

    begin_samples = samples.TrainSamples.__init__
    set_hyperparameters, train_batches = training.set_hyperparameters, pipeline.train_batches
    backward = training.GradientReducer.backward
    join, commit, barrier = (
        elastic.Membership.join,
        elastic.Membership.commit,
        elastic.comm.barrier,
    )

    def noted_samples(self, *args):
        begin_samples(self, *args)
        indices = self.indices

        def noted_indices(first, count):
            found = indices(first, count)
            given.append([first, found.tolist()])
            return found

        self.indices = noted_indices

    def noted_batches(*args, **kwargs):
        given.clear()
        for batch in train_batches(*args, **kwargs):
            drawn.append(given.popleft())
            assert len(drawn[-1][1]) == len(batch.labels)
            yield batch

    def noted_update(optimizer, update, schedule):
        set_hyperparameters(optimizer, update, schedule)
        now["update"] = update.index
        drawn.clear()
        if pause != "target":
            time.sleep(float(pause))
            return
        member = members[-1]
        while member._target not in (0, now["size"]) and not member._wanted["regroup"]:
            time.sleep(0.05)

    def noted_backward(self, loss, *, last=True):
        if last:
            note(samples=drawn)
        backward(self, loss, last=last)

    def noted_join(self):
        world = join(self)
        members[:] = [self]
        if world:
            now.update(generation=self.generation, rank=world.rank, size=world.size)
            note(joined=True)
        return world

    def noted_commit(self, state, following):
        try:
            commit(self, state, following)
        except elastic.WorldChanges:
            note(committed=True)
            raise
        note(committed=True)

    def noted_barrier():
        barrier()
        note(committed=True)

    def die_once(where: str) -> None:
        if where not in os.environ.get("HVD_LBT_TEST_DIE", "") or (folder / where).exists():
            return
        (folder / where).touch()
        os.kill(os.getpid(), signal.SIGKILL)

    def dying_evaluate(*args, world, allreduce, **kwargs):
        def reduce(tensor, name):
            if world.rank == 1:
                die_once("evaluation")
            return allreduce(tensor, name)

        return evaluate(*args, world=world, allreduce=reduce, **kwargs)

    def dying_write(*args):  # the file is written and has no name yet
        die_once("checkpoint")
        write(*args)

    def dying_init(*args, **kwargs):
        if os.environ["HOROVOD_RANK"] == "1":
            die_once("joining")
        return begin(*args, **kwargs)

    def dying_forward(self, method, key, body):
        answer = forward(self, method, key, body)
        if method == "PUT" and key == "global/1":
            die_once("connecting")
        return answer

    begin, forward = elastic.comm.init, elastic.Relay._forward
    elastic.comm.init, elastic.Relay._forward = dying_init, dying_forward
    evaluate, write = run.evaluate, checkpoint._replace_pair
    run.evaluate, checkpoint._replace_pair = dying_evaluate, dying_write
    samples.TrainSamples.__init__ = noted_samples
    training.set_hyperparameters, pipeline.train_batches = noted_update, noted_batches
    training.GradientReducer.backward = noted_backward
    elastic.Membership.join, elastic.Membership.commit = noted_join, noted_commit
    elastic.comm.barrier = noted_barrier


if sys.argv[1] == "train":
    write_down(Path(os.environ["HVD_LBT_TEST_LOG"]), os.environ["HVD_LBT_TEST_PAUSE"])
sys.exit(main())
