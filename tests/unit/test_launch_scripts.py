"""The scripts in launch/ without ranks: what they refuse, and what they start, in a copy with fake
programs.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STARTS = {
    "launch/local": "2",
    "launch/mpi": "2",
    "launch/nodes": "localhost:2",
}


def run(root: Path, *words: str, **environment: str) -> tuple[int, str, str]:
    clean = {key: os.environ[key] for key in ("PATH", "HOME") if key in os.environ}
    ended = subprocess.run(
        [root / words[0], *words[1:]],
        env=clean | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return ended.returncode, ended.stdout, ended.stderr


@pytest.fixture
def copy(tmp_path) -> Path:
    """The scripts in a folder whose Python only prints what it is called with, and its
    environment.
    """
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    programs = tmp_path / ".venv/bin"
    programs.mkdir(parents=True)
    (programs / "python").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (programs / "hvd_lbt").write_text("#!/bin/sh\n")
    for program in programs.iterdir():
        program.chmod(0o755)
    return tmp_path


@pytest.mark.parametrize("script", STARTS)
def test_what_is_typed_wrong_is_one_paragraph_and_2(copy, script):
    for words in ([], ["2"], ["x", "train"], ["0", "train"], ["-1", "train"], ["2.5", "train"]):
        code, output, errors = run(copy, script, *words)
        assert (code, output) == (2, "")
        assert errors.startswith(f"{script}: ")
        assert errors.count("\n") == 1


@pytest.mark.parametrize("script", STARTS)
def test_not_set_up_names_the_command(copy, script):
    shutil.rmtree(copy / ".venv")
    code, _, errors = run(copy, script, STARTS[script], "train", "digits")
    assert code == 2
    assert errors == f"{script}: {copy}/.venv is not set up. Run launch/setup first.\n"


@pytest.mark.parametrize("number", ["100000", "9" * 30])
@pytest.mark.parametrize("script", STARTS)
def test_far_too_many_ranks_are_refused_unless_they_are_meant(copy, script, number):
    ranks = STARTS[script].replace("2", number)
    # OMP_NUM_THREADS is what nproc would print
    code, output, errors = run(copy, script, ranks, "train", "digits", OMP_NUM_THREADS="9999")
    assert (code, output) == (2, "")
    assert errors.startswith(f"{script}: {number} ranks on 1 node: at most ")
    assert f"HVD_LBT_MAX_RANKS={number}" in errors
    code, output, _ = run(copy, script, ranks, "train", "x", HVD_LBT_MAX_RANKS="100000")
    assert code == (0 if number == "100000" else 2)
    code, _, errors = run(copy, script, ranks, "train", "x", HVD_LBT_MAX_RANKS="many")
    assert (code, errors) == (
        2,
        f"{script}: HVD_LBT_MAX_RANKS=many: it must be a number of ranks, such as 64.\n",
    )


@pytest.mark.parametrize(
    "name",
    ["unknown.invalid", "127.0.0.1.invalid", "a;touch flag", "-oProxyCommand=x", "$(id)"],
)
def test_hosts_that_cannot_be_reached_are_named(copy, name):
    hosts = copy / "hosts"
    hosts.write_text(f"# mine\nlocalhost slots=1\n{name} slots=1\n")
    for words in (
        ("launch/nodes", f"localhost:1,{name}:1", "train", "digits"),
        ("launch/mpi", "2", "train", "digits"),
    ):
        code, output, errors = run(copy, *words, HOSTFILE=str(hosts))
        assert (code, output) == (2, "")
        assert errors.startswith(f"{words[0]}: ")
        if name.endswith(".invalid"):
            assert f"{words[0]}: {name} cannot be reached by ssh" in errors
        assert errors.count("\n") == 1
    assert not list(copy.rglob("flag"))


def test_a_closed_port_is_named(copy):
    # an address of this machine's loopback that it does not take for its own name
    code, _, errors = run(copy, "launch/nodes", "root@0:2", "train", "digits", SSH_PORT="1")
    assert code == 2
    assert errors.startswith(
        "launch/nodes: root@0 cannot be reached by ssh on port 1 (ssh: connect"
    )
    code, _, errors = run(copy, "launch/nodes", "localhost:2", "train", "digits", SSH_PORT="x")
    assert (code, errors) == (
        2,
        "launch/nodes: SSH_PORT=x: it must be a port's number, such as 22.\n",
    )


def test_a_host_file_that_is_not_there_or_empty(copy):
    code, _, errors = run(copy, "launch/mpi", "2", "train", "digits", HOSTFILE="/no/file")
    assert (code, errors.count("\n")) == (2, 1)
    assert "HOSTFILE=/no/file: there is no such file" in errors
    (copy / "hosts").write_text("# nothing\n\n")
    code, _, errors = run(copy, "launch/mpi", "2", "train", "x", HOSTFILE=str(copy / "hosts"))
    assert (code, errors.count("\n")) == (2, 1)
    assert "names no host" in errors


def test_mpi_passes_the_environment_on_but_not_what_describes_this_machine(copy):
    passed = {
        *("HOROVOD_CYCLE_TIME", "NCCL_DEBUG", "PYTHONPATH", "LD_LIBRARY_PATH", "UCX_TLS"),
        *("OMP_PLACES", "CUDA_CACHE_PATH", "HVD_LBT_X", "TORCH_HOME", "XDG_CACHE_HOME", "MY_OWN"),
        *("http_proxy", "GLOO_X", "MKL_NUM_THREADS", "HOME"),
    }
    kept = {
        *(
            "SLURM_PROCID",
            "SLURM_JOB_ID",
            "HOSTNAME",
            "PWD",
            "OLDPWD",
            "SHLVL",
            "DISPLAY",
            "TMPDIR",
        ),
        *("SSH_AUTH_SOCK", "SSH_CONNECTION", "XDG_RUNTIME_DIR", "PMIX_RANK", "TERM"),
        *("CUDA_VISIBLE_DEVICES", "OMPI_MCA_btl"),  # mpirun passes on OMPI_… by itself
    }
    values = dict.fromkeys(passed | kept, "two words\nand a line; $(id)") | {"HOME": "/"}
    code, output, errors = run(copy, "launch/mpi", "2", "train", "digits", **values)
    assert code == 0, errors
    words = output.split("\n")
    assert words[1:4] == ["mpirun", "-np", "2"]
    names = {words[i + 1] for i, word in enumerate(words) if word == "-x"}
    assert names >= passed | {"PATH", "OMP_NUM_THREADS"}
    assert not names & kept


@pytest.mark.parametrize("words", [["a", "b"], ["--help"], ["no/folder/x.json"]])
def test_gpu_check_takes_one_file(words):
    code, output, errors = run(ROOT, "launch/gpu_check", *words)
    assert (code, output, errors.count("\n")) == (2, "", 1)
    assert errors.startswith(f"launch/gpu_check: {' '.join(words)}: one file to write is needed")


def test_other_scripts_that_are_not_set_up_name_the_command(copy):
    shutil.rmtree(copy / ".venv")
    code, _, errors = run(copy, "launch/sanitize")
    assert (code, errors.count("\n")) == (2, 1)
    assert "is not set up. Run launch/setup first." in errors
    bare = copy / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", bare], check=True)
    code, _, errors = run(copy, "launch/gpu_check", PATH=f"{bare}/bin:{os.environ['PATH']}")
    assert (code, errors.count("\n")) == (2, 1)
    assert "has no PyTorch. Run launch/setup" in errors
