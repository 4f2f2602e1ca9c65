"""Two nodes that reach each other by ssh only, with network and host names of their own."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from launching import ROOT
from trainings import SMALL, events, last_state, train
from two_nodes import on_two_nodes

sys.path.insert(0, str(Path(__file__).parents[1] / "campaigns"))

from network_of_nodes import predict, run_nodes

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
    shell.write_text(f'#!/usr/bin/env bash\nprintf "%s\\n" "$@" >{words}\nexec ssh -p 2222 "$@"\n')
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


def test_a_rank_on_each_of_two_nodes_sums_over_a_limited_link():
    """The ranks check what was summed; the campaign's first launch, with few bytes."""
    missing = [name for name in ("ip", "tc", "nsenter", "unshare") if not shutil.which(name)]
    if missing or os.geteuid() != 0:
        pytest.skip(f"not installed: {missing}" if missing else "networks are made by root only")
    printed = run_nodes(2, 1000, ["--updates", "2", "--megabytes", "1"])
    found = json.loads(next(line for line in printed.splitlines() if line.startswith("{")))
    assert len(found["seconds"]) == 2
    assert 0.9 * 2**20 < found["wire_bytes"] <= 2**20


def test_the_ring_is_predicted_from_one_node_and_two():
    # 1 s of compute, 2 s of ring on two nodes, of which 0.5 s hide
    assert predict(2, 1.0, 2.5, 3.0) == 2.5
    assert predict(4, 1.0, 2.5, 3.0) == 1.0 + 3.0 - 0.5
    assert predict(8, 1.0, 1.0, 1.1) == pytest.approx(1.075)  # what hides on two does not on eight
