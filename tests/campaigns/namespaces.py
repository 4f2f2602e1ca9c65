"""Nodes of our own on one machine: network namespaces with host names, joined by a bridge.

Needs root and iproute2. `switch_script` is run by bash in namespaces of its own (unshare); from
there `start_gloo_ranks` starts ranks on the nodes as `horovodrun --gloo` does. Nodes are node1,
node2, …; node k has the address PREFIX.k, the switch PREFIX.100.
"""

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SWITCH = """\
set -e
cd "$1" && shift
nodes=$1 && shift
mount --bind hosts /etc/hosts
{first}
hostname switch && ip link set lo up
ip link add switch type bridge && ip address add {prefix}.100/24 dev switch && ip link set switch up
for ((node = 1; node <= nodes; node++)); do
  unshare --net --uts bash -c 'hostname node'$node'; ip link set lo up; touch apart'$node'
    exec sleep 100000' &
  until [[ -e apart$node ]]; do sleep 0.05; done
  echo $! >pid.node$node
  ip link add port$node type veth peer name net0 netns $!
  ip link set port$node master switch up
  nsenter --target $! --net ip address add {prefix}.$node/24 dev net0
  nsenter --target $! --net ip link set net0 up
  {each}
done
exec "$@"
"""


def switch_script(prefix: str, *, first: str = "", each: str = "") -> str:
    """Bash: FOLDER NODES COMMAND… makes the nodes and runs the command beside their switch.

    FOLDER has `hosts` and gets `pid.nodeK`; the command runs there. first: a line before all nodes;
    each: lines for each, of number $node and process $!.
    """
    parts = {"first": first or ":", "prefix": prefix, "each": each or ":"}
    script = SWITCH
    for name, text in parts.items():
        script = script.replace("{" + name + "}", text)
    return script


def write_hosts(folder: str, prefix: str, nodes: int) -> None:
    """FOLDER/hosts: the addresses of the nodes and of the switch."""
    addresses = [f"{prefix}.{node} node{node}\n" for node in range(1, nodes + 1)]
    addresses += [f"{prefix}.100 switch\n", "127.0.0.1 localhost\n"]
    Path(folder, "hosts").write_text("".join(addresses))


def hosts_of(nodes: int, ranks: int) -> str:
    """HOST:RANKS of each node, as mpirun and Horovod take them."""
    return ",".join(f"node{node}:{ranks // nodes}" for node in range(1, nodes + 1))


def start_gloo_ranks(
    prefix: str, nodes: int, ranks: int, command: Sequence[str], handler: Any = None
) -> list[subprocess.Popen[bytes]]:
    """Start the command once a rank, by a rendezvous server in this process. In FOLDER.

    handler: of the server's requests, Horovod's own where there is none.
    """
    from horovod.runner.common.util.hosts import get_host_assignments, parse_hosts
    from horovod.runner.http.http_server import RendezvousHandler, RendezvousServer

    server = RendezvousServer()
    port = server.start(handler or RendezvousHandler)
    slots = get_host_assignments(parse_hosts(hosts_of(nodes, ranks)), ranks)
    server.init(slots)
    started = []
    for slot in slots:
        names = ("rank", "size", "local_rank", "local_size", "cross_rank", "cross_size")
        about = {f"HOROVOD_{name.upper()}": str(getattr(slot, name)) for name in names}
        about |= {
            "HOROVOD_HOSTNAME": slot.hostname,
            "HOROVOD_CONTROLLER": "gloo",
            "HOROVOD_CPU_OPERATIONS": "gloo",
            "HOROVOD_GLOO_IFACE": "net0",
            "HOROVOD_GLOO_RENDEZVOUS_ADDR": f"{prefix}.100",
            "HOROVOD_GLOO_RENDEZVOUS_PORT": str(port),
        }
        pid = Path(f"pid.{slot.hostname}").read_text().strip()
        enter = ["nsenter", "--target", pid, "--net", "--uts", "--"]
        started.append(subprocess.Popen([*enter, *command], env=os.environ | about))
    return started
