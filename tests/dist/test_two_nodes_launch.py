"""Launchers over two nodes: what a remote rank gets, and that it ends with its launcher."""

import json

import psutil
from launching import ROOT
from trainings import SMALL, events, train
from two_nodes import begin_on_two_nodes, on_two_nodes

TELL = """\
import json, os, pathlib
if "OMPI_COMM_WORLD_RANK" in os.environ:
    file = pathlib.Path(__file__).with_name(f"{os.uname().nodename}.json")
    file.write_text(json.dumps(dict(os.environ)))
"""


def test_mpi_passes_the_environment_to_another_node(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(TELL)
    (tmp_path / "hostfile").write_text("node1 slots=1\nnode2 slots=1\n")
    passed = {
        "PYTHONPATH": str(tmp_path),
        "LD_LIBRARY_PATH": "/no/such folder",
        "HOROVOD_CYCLE_TIME": "3",
        "NCCL_DEBUG": "WARN",
        "OMP_PLACES": "cores",
        "HVD_LBT_X": "two lines;\n'of' \"any\" $(characters) \\ =é",
        "OMPI_MCA_mpi_yield_when_idle": "1",
    }
    kept = {"DISPLAY": ":9", "TMPDIR": str(tmp_path), "SSH_AUTH_SOCK": "/no/socket"}
    variables = passed | kept | {"HOSTFILE": str(tmp_path / "hostfile")}
    on_two_nodes(tmp_path, [ROOT / "launch/mpi", "2", "plan", "digits"], **variables)
    for node in ("node1", "node2"):
        found = json.loads((tmp_path / f"{node}.json").read_text())
        assert {name: found.get(name) for name in passed} == passed
    assert not {name for name, value in kept.items() if found.get(name) == value}
    assert found["HOSTNAME"] == "node2" if "HOSTNAME" in found else True


def test_a_killed_launcher_leaves_no_rank_on_another_node(tmp_path):
    out = tmp_path / "run"
    words = train(*SMALL, "schedule.epochs=900", "schedule.milestones=[]", out=out)[2:]
    # In the background of a shell that collects orphans, as init does: the first process of a
    # namespace takes all others with it.
    in_background = ["bash", "-c", '"$@" & while :; do sleep 1; done', "bash"]
    command = [*in_background, ROOT / "launch/nodes", "node1:1,node2:1", *words]
    launch = begin_on_two_nodes(tmp_path, command, SSH_PORT="2222", INTERFACE="net0")
    launch.until_logged(out, '"event": "update"')
    tree = psutil.Process(launch.process.pid).children(recursive=True)
    names = ("python", "mpirun", "orted", "hvd_lbt")
    ranks = [process for process in tree if process.name() in names]
    assert {process.name() for process in ranks} == set(names)
    ranks[0].kill()
    _, left = psutil.wait_procs(ranks, timeout=60)
    launch.kill()
    ended = launch.wait()
    assert not left, ended.output[-4000:]
    assert events(out, "end")[-1]["reason"] == "stopped", ended.output[-4000:]
