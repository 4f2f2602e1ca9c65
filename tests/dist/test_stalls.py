"""A frozen rank ends the others with 74, wherever they wait for it, under MPI and Gloo."""

import ast
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from launching import Launch

from hvd_lbt import comm

STALLING = Path(__file__).with_name("stalling.py")
WAITS = {"init", "synchronize", "broadcast_", "allgather", "allreduce", "barrier", "shutdown"}
WHERE = {  # what rank 0 says that it waited for; the test below sees to the other calls
    "start": "the start of all ranks",
    "broadcast_object": "a broadcast of rank 0's data",
    "allgather_object": "the data of all ranks",
    "last barrier": "the last barrier",
    # Horovod's own thread may still have agreed to the end
    "shutdown": "the (shutdown|end) of all ranks",
}


def test_every_call_that_waits_is_watched():
    """Each `hvd.WAITS(…)` of comm.py is inside `with _WaitingFor(…)`."""
    found = set[str]()

    def look(node: ast.AST, watched: bool) -> None:
        if isinstance(node, ast.With):
            watched |= "_WaitingFor" in ast.unparse(node.items[0].context_expr)
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name.removeprefix("hvd.") in WAITS and name.startswith("hvd."):
                found.add(name)
                assert watched, f"line {node.lineno}: {ast.unparse(node)}"
        for child in ast.iter_child_nodes(node):
            look(child, watched)

    look(ast.parse(inspect.getsource(comm)), False)
    assert {"hvd.init", "hvd.synchronize", "hvd.barrier", "hvd.shutdown"} <= found


def begin(controller: str, where: str) -> Launch:
    launchers = {
        "mpi": ["mpirun", "--oversubscribe", "--bind-to", "none", "-np", "2"],
        "gloo": ["horovodrun", "--gloo", "-np", "2", "-H", "localhost:2"],
    }
    environment = os.environ | {
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(STALLING.parents[2]),
        "HOROVOD_STALL_CHECK_TIME_SECONDS": "1",
        "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": "4",
        "HOROVOD_GLOO_TIMEOUT_SECONDS": "4",
    }
    process = subprocess.Popen(
        [*launchers[controller], sys.executable, STALLING, where],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    return Launch(process, timeout=120)


@pytest.mark.parametrize("controller", ["mpi", "gloo"])
def test_a_rank_frozen_anywhere_ends_the_others_with_74(controller):
    # Under Gloo the ranks' last meeting is the barrier; a rank frozen later keeps its launcher
    # only.
    places = [where for where in WHERE if (controller, where) != ("gloo", "shutdown")]
    # They wait more than they work: all at once.
    launches = [begin(controller, where) for where in places]
    for where, ended in zip(places, [launch.wait() for launch in launches], strict=True):
        waited = rf"rank 0 on .* s for {WHERE[where]}: another rank hangs, is frozen"
        assert re.search(waited, ended.output), f"{where}: {ended.output}"
        if controller == "mpi":
            assert ended.code == 74
        else:  # horovodrun with Gloo ends with 1, and prints the code of the rank
            assert "Exit code: 74" in ended.output
