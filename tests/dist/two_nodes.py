"""Two nodes that reach each other by ssh only, with network and host names of their own."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from launching import Ended, Launch

SSHD = "/usr/sbin/sshd"  # it wants to be called so


SCRIPT = """\
set -e
cd "$1" && shift
mount --bind hosts /etc/hosts
mount --bind ssh_config /etc/ssh/ssh_config
mount -t tmpfs tmpfs /run && mkdir /run/sshd
hostname node1 && ip link set lo up
unshare --net --uts bash -c '
  hostname node2 && ip link set lo up && touch apart
  until ip link set net0 up 2>/dev/null; do sleep 0.1; done
  ip address add 10.77.0.2/24 dev net0
  exec {sshd} -D -e -f sshd_config' 2>sshd.log &
until [[ -e apart ]]; do sleep 0.1; done
ip link add net0 type veth peer name net0 netns $!
ip address add 10.77.0.1/24 dev net0 && ip link set net0 up
until (: >/dev/tcp/10.77.0.2/2222) 2>/dev/null; do sleep 0.1; done
exec "$@"
"""


FILES = {
    "hosts": "127.0.0.1 localhost\n10.77.0.1 node1\n10.77.0.2 node2\n",
    "ssh_config": "IdentityFile {folder}/key\nUserKnownHostsFile {folder}/known_hosts\n"
    "LogLevel ERROR\nHost node2\nPort 2222\n",
    "sshd_config": "Port 2222\nHostKey {folder}/host_key\nAuthorizedKeysFile {folder}/key.pub\n"
    "StrictModes no\nPasswordAuthentication no\nPidFile none\n",
}


def begin_on_two_nodes(folder: Path, launch: list, **variables: str) -> Launch:
    """Begin a command on node1, from where node2 is reached by ssh."""
    missing = [name for name in (SSHD, "ip", "ssh-keygen", "unshare") if not shutil.which(name)]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)} (apt-get install …)")
    if os.geteuid() != 0:
        pytest.skip("networks and host names are made by root only, as in a container")
    for name, text in FILES.items():
        (folder / name).write_text(text.format(folder=folder))
    for name in ("key", "host_key"):
        words = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name]
        subprocess.run(words, check=True)
    # horovodrun remembers for an hour that a host was reached, and then does not make it known
    host_key = (folder / "host_key.pub").read_text()
    (folder / "known_hosts").write_text(f"[node2]:2222 {host_key}")
    apart = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--kill-child"]
    apart += ["--mount-proc"]
    process = subprocess.Popen(
        [*apart, "bash", "-c", SCRIPT.replace("{sshd}", SSHD), "bash", folder, *launch],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    return Launch(process, timeout=300)


def on_two_nodes(folder: Path, launch: list, **variables: str) -> Ended:
    """Run a command on node1; it must end with 0."""
    ended = begin_on_two_nodes(folder, launch, **variables).wait()
    assert ended.code == 0, ended.output[-4000:] + (folder / "sshd.log").read_text()
    assert "Accepted publickey for root from 10.77.0.1" in (folder / "sshd.log").read_text()
    return ended
