"""The Slurm script, with stand-ins for Slurm and for what it launches."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "recipes" / "slurm" / "train.sbatch"
# Runs its command once per node, one after the other, as the last node's status says.
SRUN = """#!/bin/bash
shift # --kill-on-bad-exit=1
for node in $(seq 0 $((SLURM_NNODES - 1))); do SLURM_NODEID=$node "$@" || exit; done
"""
STAND_INS = {
    "srun": SRUN,
    "scontrol": '#!/bin/bash\nprintf "first\\nsecond\\n"\n',
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
