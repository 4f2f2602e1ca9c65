"""A worker that cannot connect to the others loads its program again, with its state."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

RESTARTED = """
import json, os, signal
import torch
from hvd_lbt.elastic import worker
from hvd_lbt.recipe import load_recipe

member = worker.Membership(load_recipe("digits", ()), ".")
number = member._link._signer._number
if not member._committed:
    member.generation = 7
    member._committed = {"update": 5, "model": {"w": torch.arange(3.0)}}
    os.environ["BEFORE"] = str(number)
    member._link.ask = lambda message: print(json.dumps(message), flush=True)
    member._restart()
print(json.dumps({
    "generation": member.generation,
    "update": member._committed["update"],
    "weights": member._committed["model"]["w"].tolist(),
    "number_is_higher": number > int(os.environ["BEFORE"]),
    "blocked": len(signal.pthread_sigmask(signal.SIG_BLOCK, ())),
    "left": [name for name in os.environ if name.startswith("HVD_LBT_ELASTIC_")],
}), flush=True)
os._exit(0)
"""

# The rendezvous refuses every request: Horovod's own thread throws, and nothing in it catches.
UNCONNECTED = """
import os
from hvd_lbt import comm
from hvd_lbt.elastic.rendezvous import Server

async def refuse(request):
    return 409, b"", b""

os.environ["HOROVOD_GLOO_RENDEZVOUS_PORT"] = str(Server("127.0.0.1", refuse).port)

def replaced():
    print("replaced", flush=True)
    os._exit(3)

comm.init(on_failure=replaced)
"""


def run(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    own = {"HOROVOD_CONTROLLER": "gloo", "HOROVOD_CPU_OPERATIONS": "gloo", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | own | {"HOROVOD_ELASTIC": "1", "HOROVOD_GLOO_IFACE": "lo"} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_restart_keeps_process_state_generation_and_the_order_of_requests():
    names = {"": "127.0.0.1:9", "_NAME": "localhost.0.1", "_KEY": "00" * 32}
    ended = run(RESTARTED, **{f"HVD_LBT_ELASTIC{name}": value for name, value in names.items()})
    assert ended.returncode == 0, ended.stderr
    said, request, found = ended.stdout.splitlines()
    assert "restarting" in said
    assert json.loads(request) == {"generation": 7, "restarts": True}
    assert json.loads(found) == {
        "generation": 7,
        "update": 5,
        "weights": [0.0, 1.0, 2.0],
        "number_is_higher": True,
        "blocked": 0,
        "left": ["HVD_LBT_ELASTIC_NAME"],
    }


def test_a_failure_while_horovod_connects_is_handled_and_not_aborted():
    places = {"RANK": "0", "SIZE": "2", "LOCAL_RANK": "0", "LOCAL_SIZE": "2"}
    places |= {"CROSS_RANK": "0", "CROSS_SIZE": "1", "GLOO_RENDEZVOUS_ADDR": "127.0.0.1"}
    ended = run(UNCONNECTED, **{f"HOROVOD_{name}": value for name, value in places.items()})
    assert ended.returncode == 3, ended.stderr
    assert ended.stdout == "replaced\n"
