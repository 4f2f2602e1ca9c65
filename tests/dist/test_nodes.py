"""Two nodes that reach each other by ssh only: network and host names of their own, as two machines have."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from launching import ROOT, Launch
from test_train import SMALL, events, last_state, train

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
exec "$@"
"""
FILES = {
    "hosts": "127.0.0.1 localhost\n10.77.0.1 node1\n10.77.0.2 node2\n",
    "ssh_config": "IdentityFile {folder}/key\nUserKnownHostsFile {folder}/known_hosts\nLogLevel ERROR\n",
    "sshd_config": "Port 2222\nHostKey {folder}/host_key\nAuthorizedKeysFile {folder}/key.pub\n"
    "StrictModes no\nPasswordAuthentication no\nPidFile none\n",
}


def test_horovodrun_reaches_another_node_by_ssh(tmp_path):
    missing = [name for name in (SSHD, "ip", "ssh-keygen", "unshare") if not shutil.which(name)]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)} (apt-get install openssh-server iproute2)")
    if os.geteuid() != 0:
        pytest.skip("networks and host names are made by root only, as in a container")
    for name, text in FILES.items():
        (tmp_path / name).write_text(text.format(folder=tmp_path))
    for name in ("key", "host_key"):
        words = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / name]
        subprocess.run(words, check=True)
    # horovodrun remembers for an hour that a host was reached, and then does not make it known
    host_key = (tmp_path / "host_key.pub").read_text()
    (tmp_path / "known_hosts").write_text(f"[node2]:2222 {host_key}")

    out = tmp_path / "run"
    short = (*SMALL, "schedule.epochs=0.5", "schedule.milestones=[]")
    apart = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    launch = [ROOT / "launch/nodes", "node1:1,node2:1", *train(*short, out=out)[2:]]
    process = subprocess.Popen(
        [*apart, "bash", "-c", SCRIPT.replace("{sshd}", SSHD), "bash", tmp_path, *launch],
        env=os.environ | {"SSH_PORT": "2222", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    ended = Launch(process, timeout=120).wait()
    assert ended.code == 0, ended.output[-4000:] + (tmp_path / "sshd.log").read_text()
    assert ended.output.count("2 workers · 1,437 training images") == 1
    assert "Accepted publickey for root from 10.77.0.1" in (tmp_path / "sshd.log").read_text()
    assert last_state(out)["update"] == events(out, "run")[0]["plan"]["updates"]
