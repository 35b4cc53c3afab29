"""The command lines in the headers of recipes/ are run as they stand there, on small models and for a step or two.

What an accelerate file asks for is cut to two processes on the CPU. The lines of ddp, fsdp2, zero2, zero3 and
zero3_offload are run by tests/test_parallel.py, those of the sweeps by tests/test_recipes.py.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from test_parallel import MODES
from test_recipes import RECIPES, ROOT, names
from two_ranks import end, kill

from grace import train

FILES = sorted(path for path in RECIPES.rglob("*") if path.suffix in (".yaml", ".sbatch", ".md"))
LINE = re.compile(r"#   (((python|accelerate launch|sbatch|wandb) .*?)( {2,}#.*)?)$")
LINES = [
    (path, match[2].strip()) for path in FILES for text in path.read_text().splitlines() if (match := LINE.match(text))
]  # fmt: skip
PYTHON = [(path, line) for path, line in LINES if line.startswith("python")]
PUBLISHED = "recipes/qwen3vl_2b_w4g128.yaml"
TIMEOUT = 240


@pytest.fixture
def small(tiny_student_dir: Path, tiny_teacher_dir: Path, tiny_world_dir: Path, tmp_path: Path) -> list[str]:
    """Overrides that make a recipe small."""
    return [
        f"student.path={tiny_student_dir}", f"data.path={tiny_world_dir / 'qat_train.json'}", "optim.batch_size=4",
        "run.max_steps=2", "run.log_every=1", f"run.output_dir={tmp_path / 'run'}", f"teacher.path={tiny_teacher_dir}",
        "data.validation_path=null", "data.image_root=null", "data.num_workers=0",
    ]  # fmt: skip


def steps_done(tmp_path: Path) -> int:
    assert (tmp_path / "run" / "model" / "config.json").is_file()
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    return sum("loss/total" in row for row in rows)


def test_every_line_is_one_that_is_run() -> None:
    run_elsewhere = {f"accelerate/{mode}.yaml" for mode in MODES}
    here = {"accelerate/single.yaml", "accelerate/multi_node.yaml", "slurm/train.sbatch"}
    for path, line in LINES:
        kind = line.split()[0]
        if kind == "python":
            continue  # test_python_lines
        if kind == "wandb":
            assert path.parent.name == "sweeps"
        elif kind == "sbatch":
            assert names(path) == "slurm/train.sbatch"
        elif line.endswith("-m grace.train RECIPE"):
            assert names(path) in run_elsewhere | here
        else:
            assert "recipes/accelerate/ddp.yaml -m grace.train recipes/qwen3vl_2b_" in line
    assert {path.parent.name for path, _ in LINES} >= {
        "accelerate",
        "slurm",
        "sweeps",
        "small_world",
        "recipes",
    }


@pytest.mark.parametrize(
    ("path", "line"), PYTHON, ids=[f"{names(path)}-{i}" for i, (path, _) in enumerate(PYTHON)]
)
def test_python_lines(
    path: Path,
    line: str,
    small: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(ROOT)
    command, module, *arguments = shlex.split(line)[1:]
    assert (command, module) == ("-m", "grace.train")
    assert train.main([*arguments, *small]) == 0
    if "--dry-run" in arguments:
        assert "memory of one process" in capsys.readouterr().out and not (tmp_path / "run").exists()
    else:
        assert steps_done(tmp_path) == 2


def launched(line: str, recipe: list[str], *options: str) -> list[str]:
    """An `accelerate launch` line with further options, and with what stands for RECIPE."""
    words = shlex.split(line)
    assert words[:2] == ["accelerate", "launch"]
    at = words.index("-m")
    rest = [word for word in words[at + 2 :] if word != "RECIPE"]
    launch = [sys.executable, "-m", "accelerate.commands.launch", *words[2:at], *options]
    return [*launch, "-m", "grace.train", *rest, *recipe]


def line_of(name: str, start: str) -> str:
    (line,) = [line for path, line in LINES if names(path) == name and line.startswith(start)]
    return line


def start(command: list[str], log: Path, **variables: str) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "", **variables}
    del environment["ACCELERATE_USE_CPU"]
    with log.open("w") as file:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("accelerate/single.yaml", []),
        ("qwen3vl_2b_w4g128.yaml", ["--num_processes", "2", "--main_process_port", "0"]),
    ],
)
def test_accelerate_lines(name: str, options: list[str], small: list[str], tmp_path: Path) -> None:
    line = line_of(name, "accelerate launch")
    recipe = [PUBLISHED, *small] if line.endswith("RECIPE") else small
    end(start(launched(line, recipe, *options), tmp_path / "log"), tmp_path / "log", TIMEOUT)
    assert steps_done(tmp_path) == 2


@pytest.mark.slow
def test_two_machines(small: list[str], tmp_path: Path) -> None:
    """Two launchers, one for each machine, with one process each."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    line = line_of("accelerate/multi_node.yaml", "accelerate launch").replace("10.0.0.1", "127.0.0.1")
    port = str(20_000 + os.getpid() % 20_000)
    machines = []
    for rank in ("0", "1"):
        ours = line.replace("--machine_rank 0", f"--machine_rank {rank}").replace("29500", port)
        command = launched(ours, [PUBLISHED, *small], "--num_processes", "2")
        machines.append((start(command, tmp_path / f"log{rank}"), tmp_path / f"log{rank}"))
    try:
        for process, log in machines:
            end(process, log, TIMEOUT)
    finally:
        for process, _ in machines:
            if process.poll() is None:
                kill(process)
    assert steps_done(tmp_path) == 2
    known = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert (known["processes"], known["distributed"]) == (2, "DEEPSPEED")


SRUN = """#!/bin/bash
shift
for node in $(seq 0 $((SLURM_NNODES - 1))); do SLURM_NODEID=$node "$@" & done
code=0; for job in $(jobs -p); do wait "$job" || code=$?; done; exit $code
"""


@pytest.mark.slow
def test_the_slurm_line(small: list[str], tmp_path: Path) -> None:
    """The script with the real launcher; `srun` starts both nodes' tasks at once, here."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    script, *arguments = shlex.split(line_of("slurm/train.sbatch", "sbatch"))[5:]
    assert script == "recipes/slurm/train.sbatch" and arguments == [PUBLISHED, "optim.lr=1e-5"]
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    accelerate = (
        f'#!/bin/bash\nexec {shlex.quote(sys.executable)} -m accelerate.commands.accelerate_cli "$@"\n'
    )
    for name, text in {
        "srun": SRUN,
        "scontrol": "#!/bin/bash\necho 127.0.0.1\n",
        "accelerate": accelerate,
    }.items():
        (bin_ / name).write_text(text)
        (bin_ / name).chmod(0o755)
    slurm = {
        "SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "nodes[1-2]", "SLURM_NNODES": "2", "PER_NODE": "1",
        "PATH": f"{bin_}:{os.environ['PATH']}",
    }  # fmt: skip
    process = start(["bash", script, *arguments, *small], tmp_path / "log", **slurm)
    end(process, tmp_path / "log", TIMEOUT)
    assert steps_done(tmp_path) == 2
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["processes"] == 2
