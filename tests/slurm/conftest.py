"""`slurm`: the daemons of cluster.py, started once."""

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import CONFIG, DAEMONS, PROGRAMS, WHERE, Slurm, die_with_parent, free_ports, until


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    missing = [name for name in PROGRAMS if shutil.which(name, path=WHERE) is None]
    if missing:
        pytest.skip(f"Slurm is not installed: no {', '.join(missing)} (apt-get install slurm-wlm)")
    if os.geteuid() != 0:
        pytest.skip("Slurm's daemons are started by root only, as in a container")
    # a socket's path must be short, and munge wants a folder that only root can write
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    folder.chmod(0o755)
    for name in ("state", "tmp"):  # tmp: the plug-in's folders are named by job numbers only
        (folder / name).mkdir()
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)
    config = folder / "slurm.conf"
    host = socket.gethostname().split(".")[0]
    config.write_text(
        CONFIG.format(host=host, folder=folder, ports=free_ports(3), first_job=os.getpid() * 100)
    )
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SLURM", "OMPI_", "PMIX_", "HOROVOD_"))
    }
    environment = kept | {"SLURM_CONF": str(config), "PATH": WHERE}
    log = folder / "daemons.log"
    unshare = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    with log.open("w") as output:
        daemons = subprocess.Popen(
            [*unshare, "bash", "-c", DAEMONS, "bash", str(folder), host],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
    try:
        cluster = Slurm(environment)
        words = ["sinfo", "--noheader", "--partition=both", "--format=%T"]

        def idle() -> bool:
            if daemons.poll() is not None:
                pytest.fail(f"Slurm's daemons ended:\n{log.read_text()[-3000:]}")
            state = subprocess.run(words, env=environment, capture_output=True, text=True)
            return state.stdout.strip() == "idle"

        until(idle, timeout=60)
        yield cluster
    finally:
        daemons.kill()
        daemons.wait()
        shutil.rmtree(folder, ignore_errors=True)
