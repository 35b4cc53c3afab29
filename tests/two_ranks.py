"""Two processes of one run on this machine's CPU, started, ended and, if they hang, stopped."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

LAUNCHER = ["torch.distributed.run", "--standalone", "--local_addr", "127.0.0.1", "--nproc_per_node", "2"]


def start(
    arguments: Sequence[str],
    log: Path,
    launcher: Sequence[str] = LAUNCHER,
    environment: Mapping[str, str] | None = None,
) -> subprocess.Popen:
    """Starts a script or `-m MODULE`, its arguments behind it, on two ranks.

    Args:
        launcher: module that starts processes, with its own arguments.
        environment: variables to set.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
    with log.open("w") as file:
        command = [sys.executable, "-m", *launcher, *arguments]
        return subprocess.Popen(command, env=environment, stdout=file, stderr=file)


def end(process: subprocess.Popen, log: Path, timeout: float) -> None:
    """Waits for its end, stops it when that takes too long, and on failure shows what it said."""
    try:
        code = process.wait(timeout)
    except subprocess.TimeoutExpired:
        kill(process)
        code = "no end"
    assert code == 0, f"{code}: {log.read_text()[-5000:]}"


def kill(process: subprocess.Popen) -> None:
    """SIGKILL to the launcher and its ranks, which are in process groups of their own."""
    family = [psutil.Process(process.pid)]
    family += family[0].children(recursive=True)
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    psutil.wait_procs(family, timeout=30)
    process.wait(30)


def launch_two(arguments: Sequence[str], log: Path, timeout: float = 200) -> None:
    """`start` and `end`."""
    end(start(arguments, log), log, timeout)
