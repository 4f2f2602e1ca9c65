"""Two nodes that reach each other by ssh only, with network and host names of their own."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from launching import ROOT, Ended, Launch
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


SHORT = (*SMALL, "schedule.epochs=0.5", "schedule.milestones=[]")


def test_horovodrun_reaches_another_node_by_ssh(tmp_path):
    out = tmp_path / "run"
    launch = [ROOT / "launch/nodes", "node1:1,node2:1", *train(*SHORT, out=out)[2:]]
    ended = on_two_nodes(tmp_path, launch, SSH_PORT="2222", INTERFACE="net0")
    assert ended.output.count("2 workers · 1,437 training images") == 1
    assert last_state(out)["update"] == events(out, "run")[0]["plan"]["updates"]


def test_an_elastic_worker_on_another_node_gets_its_key_by_ssh(tmp_path):
    """Both workers' connections are reported over the network; the key is on no command line."""
    out = tmp_path / "run"
    shell = tmp_path / "shell"
    words = tmp_path / "words"
    shell.write_text(
        f'#!/usr/bin/env bash\nprintf "%s\\n" "$@" >{words}\nexec ssh -p 2222 "$@"\n'
    )
    shell.chmod(0o755)
    launch = [ROOT / "launch/elastic", "2", "2", "--network-interface", "net0"]
    launch += ["--discover", "echo node1:1; echo node2:1", "--remote-shell", str(shell)]
    launch += train(*SHORT, out=out)[2:]
    ended = on_two_nodes(tmp_path, launch)
    assert ended.output.count("2 workers · 1,437 training images") == 1
    assert "dissolved" not in ended.output
    assert last_state(out)["update"] == events(out, "run")[0]["plan"]["updates"]
    host, program = words.read_text().splitlines()
    assert host == "node2"
    assert program.startswith("exec ")
    assert program.endswith("/hvd_lbt/elastic/begin.py")  # and nothing else
