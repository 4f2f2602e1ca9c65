"""A worker's part in a world that changes: a resume from memory.

The global batches, learning rates and samples do not depend on the number of workers, so a change
of the world needs no more than what `--resume` needs: the state after some update. Each worker
keeps a copy of it. When a worker is lost, or the driver (cli.py) wants another world, the workers
that are there meet, take the newest copy, and enter `train` again.
"""

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch

from hvd_lbt import comm
from hvd_lbt.checkpoint import Checkpoints
from hvd_lbt.elastic.cli import ADDRESS, KEY, NAME
from hvd_lbt.elastic.discovery import OLD_TARGET, TARGET
from hvd_lbt.elastic.rendezvous import Link, Relay
from hvd_lbt.errors import CheckpointError, UserError
from hvd_lbt.recipe import Recipe
from hvd_lbt.schedule.plan import Stage, target_workers
from hvd_lbt.state import copied, on_cpu
from hvd_lbt.stop import EXIT_STOPPED, SIGNALS, StopRequest
from hvd_lbt.world import World

REPORT_SECONDS = 0.5
ASK_SECONDS = 0.05
# Workers that connect while one of them is lost may still succeed; after this they restart.
CONNECT_SECONDS = 3.0
# What a worker hands to the program that replaces it: the last world, and the file of its state.
GENERATION, STATE = "HVD_LBT_ELASTIC_GENERATION", "HVD_LBT_ELASTIC_STATE"
# If no checkpoint can be written, the newest state is tried again until somebody has freed space.
SAVE_AGAIN_SECONDS, SAVE_AGAIN_FOR = 10.0, 500.0  # the others wait in a collective, at most 600 s


class WorldChanges(Exception):
    """Leave the training loop: its state is committed and the driver wants another world."""


class Membership:
    """This worker's part in a world that changes.

    state: what `train` resumes from, the newest committed state of any worker; None at the start.
    """

    def __init__(self, recipe: Recipe, out: Path):
        self.state: dict[str, Any] | None = None
        self.generation = int(os.environ.pop(GENERATION, "0"))
        self._recipe, self._out = recipe, out
        # the key is not for the processes that this one starts
        self._key = os.environ.pop(KEY)
        self._link = Link(os.environ[ADDRESS], os.environ[NAME], bytes.fromhex(self._key))
        self._relay = Relay(self._link)
        self._relay.direct_horovod_here()
        self._committed: dict[str, Any] = _handed_over()
        self._target = 0
        self._rank = 0
        self._stop: StopRequest | None = None
        self._stop_asked = False  # while no training listened to signals
        self._flags = torch.zeros(2)
        self._wanted = {"regroup": False, "stop": False, "lost": False}
        self._news = threading.Event()
        self._leaving = threading.Lock()
        self._in_world = self._connecting = False
        self._at_end: Callable[[], None] = _nothing
        self._listen()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # after a restart
        threading.Thread(target=self._report, daemon=True).start()

    def join(self) -> World | None:
        """Wait for a place in the next world and take it; None when this worker is to leave."""
        while True:
            answer = self._ask_until_known({"generation": self.generation})
            if "leave" in answer:
                return None
            for name in ("rank", "size", "local_rank", "local_size", "cross_rank", "cross_size"):
                os.environ[f"HOROVOD_{name.upper()}"] = str(answer[name])
            self.generation = self._relay.generation = answer["generation"]
            self._connecting = True
            world = comm.init(device=answer["slot"], on_failure=self._restart)
            with self._leaving:
                self._connecting = False
            if world.size == 1 or self._is_among_workers():
                break
            comm.disconnect()  # or the end of this world waits for a stranger
            comm.leave()
        self._rank = world.rank
        self._wanted = {"regroup": False, "stop": False, "lost": False}
        self._target = 0
        self._in_world = True
        self._share()
        return world

    def _is_among_workers(self) -> bool:
        """Whether every connection of the new world leads to one of its workers.

        Gloo takes whoever connects first for the rank it waits for. Until the driver has compared
        what all workers report, nothing is sent to the others and nothing of theirs is used.
        """
        # what leads to the driver, or from this process to its own relay, is none of Gloo's
        signed = {self._link.address, f"127.0.0.1:{self._relay.port}"}
        connections = [ends for ends in comm.connections() if not signed & {*ends}]
        message = {"generation": self.generation, "connections": connections}
        return "checked" in self._ask_until_known(message)

    def _restart(self) -> NoReturn:
        """Load this program again in this process, and hand the committed state on to it.

        Where a rank dies while Horovod connects them, it can neither go on in this process nor
        begin again.
        """
        with self._leaving:  # held to the end: the first thread that comes here restarts
            try:
                print("A worker is lost while the ranks connect: restarting.", flush=True)
                self._link.ask({"generation": self.generation, "restarts": True})
                own = {KEY: self._key, GENERATION: str(self.generation)}
                if self._committed:
                    number = os.memfd_create("state", 0)
                    with os.fdopen(number, "wb", closefd=False) as file:
                        torch.save(on_cpu(self._committed), file)
                    own[STATE] = str(number)
                signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # kept for the new program
                os.execve(sys.executable, sys.orig_argv, os.environ | own)
            except BaseException:  # there is nobody above who could handle it
                traceback.print_exc()
            finally:
                os._exit(1)

    def _ask_until_known(self, message: dict[str, Any]) -> dict[str, Any]:
        """The driver's answer, when it has one."""
        while True:
            try:
                answer = self._link.ask(message)
            except OSError as error:
                raise SystemExit(
                    f"hvd_lbt: `hvd_lbt elastic` at {self._link.address} is gone ({error}). Start "
                    "it again with --resume."
                ) from error
            if "wait" not in answer:
                return answer
            time.sleep(ASK_SECONDS)

    def begin(self, stage: Stage, at_end: Callable[[], None], stop: StopRequest) -> None:
        """Training begins, in this stage.

        at_end: closes what it opened, if the world ends first. stop: listens to signals from now
        on.
        """
        self._at_end, self._stop = at_end, stop
        if self._stop_asked:
            stop.request()
        self._publish_target(stage)

    def _listen(self) -> None:
        """Remember a signal to stop that comes while no training listens: the next one gets it."""
        for number in SIGNALS:
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._stop_asked = True

    def leave(self) -> None:
        """Out of the world, to join the next one."""
        with self._leaving:
            self._in_world = False
        if self._stop is not None and self._stop.requested():
            self._stop_asked = True
        self._listen()
        self._stop = None
        self._at_end()
        self._at_end = _nothing
        comm.leave()

    def commit(self, state: dict[str, Any], following: Stage) -> None:
        """Keep a copy of `state`: nothing before it can be lost while one worker lives.

        following: the stage of the next update, whose number of workers is published. Raises
        WorldChanges, on all ranks, when the driver wants another world. If the driver asks to stop,
        the next update is the last.
        """
        if state["update"] % self._recipe.elastic.commit_every:
            return
        self._flags[0], self._flags[1] = self._wanted["regroup"], self._wanted["stop"]
        # Whoever is past this sum knows that rank 0 has written the metrics of this update.
        regroup, stop = comm.allreduce_(self._flags, "elastic").tolist()
        self._committed = copied(state, self._committed)
        self._news.set()
        self._publish_target(following)
        if stop:
            assert self._stop is not None
            self._stop.request()
        elif regroup:
            raise WorldChanges

    def _publish_target(self, stage: Stage) -> None:
        """Write how many workers the stage is worth, if the recipe says what one is for."""
        target = target_workers(stage, self._recipe.elastic.local_batch)
        if self._rank or target is None or target == self._target:
            return
        try:
            for name in (TARGET, OLD_TARGET):
                scratch = self._out / f"{name}.part"
                scratch.write_text(f"{target}\n")
                os.replace(scratch, self._out / name)
        except OSError as error:
            print(
                f"{self._out / TARGET} cannot be written ({error}): the number of workers stays "
                "as it is.",
                flush=True,
            )
        self._target = target

    def save_again(self, error: UserError, seconds: float = SAVE_AGAIN_FOR) -> int:
        """A checkpoint could not be written: try until it can, then end; the exit code.

        Rank 0 writes its newest committed state, the others wait. Raises `error` if there is none,
        or if it still fails after `seconds`, or at a signal.
        """
        outcome = self._save_until(time.monotonic() + seconds, error) if self._rank == 0 else ""
        outcome = comm.broadcast_object(outcome)
        if outcome:
            raise UserError(outcome)
        return EXIT_STOPPED

    def _save_until(self, deadline: float, error: UserError) -> str:
        """Nothing once the committed state is on disk, else what went wrong."""
        if not self._committed:
            return str(error)
        self._stop_asked = False
        self._listen()
        update = self._committed["update"]
        print(
            f"{error} The state after {update} updates is kept in memory: free space, and it is "
            f"saved. It is tried every {SAVE_AGAIN_SECONDS:g} s.",
            flush=True,
        )
        alone = World(rank=0, size=1, local_rank=0, local_size=1)
        while True:
            checkpoints = Checkpoints(
                self._out / "checkpoints",
                self._recipe.run,
                alone,
                allgather=lambda value: [value],
                best_top1=self._committed["best_top1"],
            )
            try:
                checkpoints.save(update, self._committed)
                checkpoints.wait()
            except UserError as again:
                if self._stop_asked or time.monotonic() > deadline:
                    return str(again)
            else:
                print(f"Saved after {update} updates: continue with --resume.", flush=True)
                return ""
            for _ in range(int(SAVE_AGAIN_SECONDS)):
                if not self._stop_asked:
                    time.sleep(1)

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

    def _report(self) -> None:
        """Report the last committed update to the driver, whose answer says what it wants."""
        lost_since: float | None = None
        while True:
            self._news.wait(REPORT_SECONDS)
            self._news.clear()
            connecting, generation = self._connecting, self.generation
            if not connecting:
                lost_since = None
                if not self._in_world:
                    continue
            # -1: what a worker brings into a world is no progress
            update = self._committed.get("update", -1) if self._in_world else -1
            try:
                wanted = self._link.ask({"generation": generation, "update": update})
            except OSError:  # the driver is gone: save while there is time
                wanted = {"regroup": False, "stop": True, "lost": False}
            if connecting and wanted.get("lost"):
                lost_since = lost_since or time.monotonic()
                with self._leaving:
                    hangs = self._connecting and generation == self.generation
                if hangs and time.monotonic() > lost_since + CONNECT_SECONDS:
                    self._restart()
                continue
            with self._leaving:
                if self._in_world and generation == self.generation and "leave" not in wanted:
                    self._wanted = wanted
                    if wanted["lost"]:
                        comm.disconnect()


def _handed_over() -> dict[str, Any]:
    """The committed state that this program had before it restarted, if it did."""
    number = os.environ.pop(STATE, None)
    if number is None:
        return {}
    with os.fdopen(int(number), "rb") as file:
        file.seek(0)
        state: dict[str, Any] = torch.load(file, weights_only=True)
    return state


def _nothing() -> None:
    """There is nothing to close."""


def is_launched() -> bool:
    """Whether `hvd_lbt elastic` started this process. UserError under another elastic launcher."""
    if os.environ.get("HOROVOD_ELASTIC") == "1" and ADDRESS not in os.environ:
        raise UserError(
            "horovodrun's own elastic driver is not supported (docs/elastic.md gives the reasons). "
            "Use `launch/elastic MIN MAX train …`."
        )
    return ADDRESS in os.environ


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
        except CheckpointError as error:
            return membership.save_again(error)
        except WorldChanges:
            pass
        membership.leave()
