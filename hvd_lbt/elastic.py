"""Train on while workers come and go: a resume from memory.

The global batches, learning rates and samples do not depend on the number of workers, so a change of
the world needs no more than what `--resume` needs: the state after some update. Each worker keeps a
copy of it. When a worker is lost, or the driver (elastic_driver.py) wants another world, those who
are there meet, take the newest copy, and enter `train` again.
"""

import json
import os
import signal
import threading
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hvd_lbt import comm
from hvd_lbt.checkpoint import on_cpu
from hvd_lbt.elastic_driver import WISH
from hvd_lbt.errors import UserError
from hvd_lbt.recipe import Recipe
from hvd_lbt.schedule.plan import Stage, target_workers
from hvd_lbt.world import World

REPORT_SECONDS = 0.5
ASK_SECONDS = 0.05
LAUNCHED = "HVD_LBT_ELASTIC"  # holds the address of this worker's driver


class WorldChanges(Exception):
    """Leave the training loop: its state is committed and the driver wants another world."""


class Membership:
    """This worker's part in a world that changes.

    state: what `train` goes on from, the newest committed state of any worker; None at the start.
    """

    def __init__(self, recipe: Recipe, out: Path):
        self.state: dict[str, Any] | None = None
        self.generation = 0
        self._recipe, self._out = recipe, out
        self._address = os.environ[LAUNCHED]
        self._committed: dict[str, Any] = {}
        self._wished = 0
        self._rank = 0
        self._stopping = False
        self._flags = torch.zeros(2)
        self._wanted = {"regroup": False, "stop": False, "lost": False}
        self._news = threading.Event()
        self._leaving = threading.Lock()
        self._in_world = False
        self._at_end: Callable[[], None] = _nothing
        threading.Thread(target=self._report, daemon=True).start()

    def join(self) -> World | None:
        """Wait for a place in the next world and take it; None when this worker is to leave."""
        answer = {"wait": True}
        while "wait" in answer:
            try:
                answer = self._ask({"generation": self.generation})
            except OSError as error:
                raise SystemExit(
                    f"hvd_lbt: `hvd_lbt elastic` at {self._address} is gone ({error}). Start it again "
                    "with --resume."
                ) from error
            if "wait" in answer:
                threading.Event().wait(ASK_SECONDS)
        if "leave" in answer:
            return None
        for name in ("rank", "size", "local_rank", "local_size", "cross_rank", "cross_size"):
            os.environ[f"HOROVOD_{name.upper()}"] = str(answer[name])
        world = comm.init(device=answer["slot"])
        self.generation, self._rank = answer["generation"], world.rank
        self._wanted = {"regroup": False, "stop": False, "lost": False}
        self._wished, self._stopping = 0, False
        self._share()
        self._in_world = True
        return world

    def begin(self, stage: Stage, at_end: Callable[[], None]) -> None:
        """Training begins, in this stage; `at_end` closes what it opened, if the world ends first."""
        self._at_end = at_end
        self._wish(stage)

    def leave(self) -> None:
        """Out of the world, to join the next one."""
        with self._leaving:
            self._in_world = False
        self._at_end()
        self._at_end = _nothing
        comm.leave()

    def commit(self, state: dict[str, Any], following: Stage) -> None:
        """Keep a copy of `state`: nothing before it can be lost while one worker lives.

        following: the stage of the update that comes next; what it wishes for is published. Raises
        WorldChanges, on all ranks, when the driver wants another world. A stop that it was told is
        handed to this process as SIGUSR1.
        """
        if state["update"] % self._recipe.elastic.commit_every:
            return
        self._flags[0], self._flags[1] = self._wanted["regroup"], self._wanted["stop"]
        # Whoever is past this sum knows that rank 0 has written the metrics of this update.
        regroup, stop = comm.allreduce_(self._flags, "elastic").tolist()
        self._committed = copied(state, self._committed)
        self._news.set()
        self._wish(following)
        if stop and not self._stopping:
            self._stopping = True
            signal.raise_signal(signal.SIGUSR1)
        elif regroup:
            raise WorldChanges

    def _wish(self, stage: Stage) -> None:
        """Publish how many workers the stage is worth, if the recipe says what one is for."""
        wished = target_workers(stage, self._recipe.elastic.local_batch)
        if self._rank or wished is None or wished == self._wished:
            return
        self._wished = wished
        scratch = self._out / f"{WISH}.part"
        scratch.write_text(f"{wished}\n")
        os.replace(scratch, self._out / WISH)

    def _share(self) -> None:
        """Give everyone the newest committed state there is."""
        newest = comm.allgather_object(self._committed.get("update", -1))
        if max(newest) < 0:
            self.state = None
            return
        if min(newest) < max(newest):
            root = newest.index(max(newest))
            # on the CPU: a pickled CUDA tensor would go to the sender's GPU
            mine = on_cpu(self._committed) if root == self._rank else None
            self._committed = comm.broadcast_object(mine, root)
        # `train` may use the tensors of its state as its own
        self.state = copied(self._committed, {})

    def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(self._address, json.dumps(message).encode())
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def _report(self) -> None:
        """Tell the driver the last committed update, and hear what it wants."""
        while True:
            self._news.wait(REPORT_SECONDS)
            self._news.clear()
            if not self._in_world:
                continue
            generation, update = self.generation, self._committed.get("update", 0)
            try:
                wanted = self._ask({"generation": generation, "update": update})
            except OSError:  # the driver is gone: save while there is time
                wanted = {"regroup": False, "stop": True, "lost": False}
            with self._leaving:
                if self._in_world and generation == self.generation and "leave" not in wanted:
                    self._wanted = wanted
                    if wanted["lost"]:
                        comm.disconnect()


def _nothing() -> None:
    """There is nothing to close."""


def is_launched() -> bool:
    """Whether `hvd_lbt elastic` started this process. UserError under another elastic launcher."""
    if os.environ.get("HOROVOD_ELASTIC") == "1" and LAUNCHED not in os.environ:
        raise UserError(
            "horovodrun's own elastic driver is not supported (docs/elastic.md tells why). Use "
            "`launch/elastic MIN MAX train …`."
        )
    return LAUNCHED in os.environ


def run(recipe: Recipe, out: Path, train: Callable[..., int], resume: bool) -> int:
    """Call `train(world=…, resume=…, membership=…)` until it ends; the exit code is its own."""
    membership = Membership(recipe, out)
    while True:
        try:
            world = membership.join()
            if world is None:
                return 0
            # from the second world on the run's folder is this job's own
            resuming = resume or membership.generation > 1
            code = train(world=world, resume=resuming, membership=membership)
            comm.barrier()  # a rank that ends tells the driver that all is done
            comm.shutdown()
            return code
        except comm.WorkerLostError as error:
            print(f"A worker is lost: {error}", flush=True)
        except WorldChanges:
            pass
        membership.leave()


def copied(value: Any, into: Any) -> Any:
    """A copy of nested dicts, lists and tensors, in the memory of `into` where that fits."""
    if isinstance(value, Tensor):
        fits = isinstance(into, Tensor) and (into.shape, into.dtype, into.device) == (
            value.shape,
            value.dtype,
            value.device,
        )
        return into.copy_(value) if fits else value.detach().clone()
    if isinstance(value, dict):
        old = into if isinstance(into, dict) else {}
        return {key: copied(part, old.get(key)) for key, part in value.items()}
    if isinstance(value, list):
        before = into if isinstance(into, list) and len(into) == len(value) else [None] * len(value)
        return [copied(part, old) for part, old in zip(value, before, strict=True)]
    return value
