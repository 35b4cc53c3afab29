"""The Slurm script, with stand-ins for Slurm and for what it launches."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "recipes" / "slurm" / "train.sbatch"
# Runs its command once per node, one after the other, as the last node's status says.
SRUN = """#!/bin/bash
shift # --kill-on-bad-exit=1, or --overlap
[[ $1 == --ntasks-per-node=1 ]] && { shift; exec "$@"; }
for node in $(seq 0 $((SLURM_NNODES - 1))); do SLURM_NODEID=$node "$@" || exit; done
"""
STAND_INS = {
    "srun": SRUN,
    "scontrol": '#!/bin/bash\necho "$@" >> "$(dirname "$0")/scontrol.log"\nprintf "first\\nsecond\\n"\n',
    "accelerate": '#!/bin/bash\nprintf "%s\\n" "$@" "--"\n',
}


def submit(tmp_path: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    for name, text in STAND_INS.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "123456", "SLURM_JOB_NODELIST": "nodes[1-2]", "SLURM_NNODES": "2"}
    environment = {**os.environ, **slurm, "PATH": f"{tmp_path}:{os.environ['PATH']}", **variables}
    command = ["bash", str(SCRIPT), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30)


def test_every_node_launches_its_part(tmp_path: Path) -> None:
    done = submit(tmp_path, "recipes/a b.yaml", "optim.lr=1e-5", SLURM_GPUS_ON_NODE="4")
    assert done.returncode == 0, done.stderr
    nodes = done.stdout.split("--\n")[:-1]
    assert len(nodes) == 2
    for rank, node in enumerate(nodes):
        words = node.splitlines()
        assert words[:3] == ["launch", "--config_file", "recipes/accelerate/multi_node.yaml"]
        assert words[-4:] == ["-m", "grace.train", "recipes/a b.yaml", "optim.lr=1e-5"]
        options = dict(zip(words[3:-4:2], words[4:-4:2], strict=True))
        assert options == {
            "--num_machines": "2", "--num_processes": "8", "--machine_rank": str(rank),
            "--main_process_ip": "first", "--main_process_port": str(20000 + 123456 % 20000),
        }  # fmt: skip


def test_failing_node_fails_the_job(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "accelerate").write_text("#!/bin/bash\nexit 7\n")
    (tmp_path / "bin" / "accelerate").chmod(0o755)
    path = f"{tmp_path / 'bin'}:{tmp_path}:{os.environ['PATH']}"
    assert submit(tmp_path, "recipe.yaml", PATH=path).returncode == 7


@pytest.mark.parametrize("variable", ["CONFIG", "PER_NODE"])
def test_settings_by_variable(tmp_path: Path, variable: str) -> None:
    done = submit(tmp_path, "recipe.yaml", **{variable: "3"})
    words = done.stdout.splitlines()
    expected = {"CONFIG": ("--config_file", "3"), "PER_NODE": ("--num_processes", "6")}[variable]
    assert words[words.index(expected[0]) + 1] == expected[1]


# A launcher and, below it, what it launches: the one dies of SIGUSR1, the other saves and exits with 75.
LAUNCHED = """#!/bin/bash
python_process() { exec -a "python -u -m grace.train" bash -c 'trap "exit 75" USR1; touch "$0"; for _ in $(seq 300); do sleep 0.1; done' "$READY"; }
python_process &
wait $! || exit 1
"""


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_job_whose_time_is_over_is_saved_and_queued_again(tmp_path: Path, number: signal.Signals) -> None:
    for name, text in {**STAND_INS, "accelerate": LAUNCHED}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "123456", "SLURM_JOB_NODELIST": "nodes[1-1]", "SLURM_NNODES": "1"}
    ready = tmp_path / "ready"
    environment = {**os.environ, **slurm, "PATH": f"{tmp_path}:{os.environ['PATH']}", "READY": str(ready)}
    other = subprocess.Popen(
        [tmp_path / "accelerate"],
        env=environment | {"SLURM_JOB_ID": "123457", "READY": "/dev/null"},
        start_new_session=True,
    )
    process = subprocess.Popen(
        ["bash", str(SCRIPT), "recipe.yaml"], env=environment, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 20
    while not ready.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    _, told = process.communicate(timeout=30)
    assert process.returncode == 1, told
    assert other.poll() is None  # a job of its own on the same node
    os.killpg(other.pid, signal.SIGKILL)
    other.wait()
    assert (tmp_path / "scontrol.log").read_text().splitlines()[-1] == "requeue 123456"


def test_a_job_that_ends_or_fails_by_itself_is_not_queued_again(tmp_path: Path) -> None:
    assert submit(tmp_path, "recipe.yaml").returncode == 0
    assert "requeue" not in (tmp_path / "scontrol.log").read_text()
