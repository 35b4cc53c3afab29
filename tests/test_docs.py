"""README.md and docs/: every command block runs, in the small world where it names big files, and every name exists.

A document's blocks run in order in one folder: the repository's recipes, with the published ones cut down to the small
world and two steps. Programs that need a network, a GPU or a cluster have stand-ins that check what they are given.
"""

import ast
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import benchmark_fixtures
import docs_stand_ins
import pytest
import yaml

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
REFERENCE = re.compile(r"`(grace/[\w/]+\.py)(?::(\w+))?`")
FILE = re.compile(r"`((?:recipes|export|tests|benchmarks|docs|data)/[\w./-]+\.\w+)`")
LINK = re.compile(r"\]\((?!https?://|#)([^)#]+)")


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_names_exist(document):
    text = document.read_text(encoding="utf-8")
    for file, symbol in REFERENCE.findall(text):
        assert (ROOT / file).is_file(), file
        if symbol:
            defined = {
                node.name for node in ast.walk(ast.parse((ROOT / file).read_text())) if hasattr(node, "name")
            }
            assert symbol in defined, f"{file}:{symbol}"
    for file in FILE.findall(text):
        assert (ROOT / file).exists() or "*" in file or file.startswith("data/sharegpt4v/"), file
    for target in LINK.findall(text):
        assert (document.parent / target).exists(), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_every_block_says_its_language(document):
    kinds = {kind for kind, _ in FENCE.findall(document.read_text(encoding="utf-8"))}
    assert kinds <= {"sh", "python", "yaml", "text"}


@pytest.mark.slow
@pytest.mark.parametrize("document", [d for d in DOCUMENTS if FENCE.search(d.read_text())], ids=name)
def test_commands_run(document, tmp_path, sandbox):
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(sandbox / "stand_ins"), str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "offline",
    }  # fmt: skip
    for kind, text in FENCE.findall(document.read_text(encoding="utf-8")):
        if kind not in ("sh", "python"):
            continue
        command = text if kind == "sh" else f"python - <<'END'\n{text}END\n"
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command], cwd=sandbox, env=environment,
            capture_output=True, text=True, timeout=600, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{text}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


@pytest.fixture
def sandbox(tmp_path, tiny_student_dir, tiny_teacher_dir, tiny_world_dir, qat_run, awq_dir) -> Iterator[Path]:
    """A folder that looks like a clone in which demo and training have run, with stand-ins on its path."""
    recipes = tmp_path / "recipes"
    shutil.copytree(ROOT / "recipes", recipes, ignore=shutil.ignore_patterns("weights"))
    (recipes / "small_world" / "weights").symlink_to(ROOT / "recipes" / "small_world" / "weights")
    for file in recipes.glob("qwen3vl_2b_*.yaml"):
        cut_down(file, tiny_student_dir, tiny_teacher_dir, tiny_world_dir)
    for folder in ("data", "export", "benchmarks"):
        shutil.copytree(
            ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("sharegpt4v", "results")
        )
    benchmark_fixtures.write_all(tmp_path / "data" / "benchmarks", tmp_path / "answers.jsonl")
    for run in ("qwen3vl_2b_bf16", "qwen3vl_2b_w4g128", "demo"):
        (tmp_path / "runs" / run).mkdir(parents=True)
    shutil.copytree(qat_run / "model", tmp_path / "runs" / "demo" / "qat")
    shutil.copytree(awq_dir, tmp_path / "runs" / "demo" / "awq")
    shutil.copytree(tiny_world_dir, tmp_path / "runs" / "demo" / "data")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").touch()
    write_stand_ins(tmp_path / "stand_ins")
    yield tmp_path
    if (tmp_path / docs_stand_ins.SERVERS).exists():
        for pid in (tmp_path / docs_stand_ins.SERVERS).read_text().split():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(int(pid), signal.SIGKILL)


def cut_down(recipe: Path, student: Path, teacher: Path, world: Path) -> None:
    """The same recipe with tiny models, the small world and two steps."""
    values = yaml.safe_load(recipe.read_text())
    if not values["student"]["path"].startswith("runs/"):
        values["student"]["path"] = str(student)
    values["student"]["base"] = str(student)
    values["teacher"] = {"path": str(teacher), "dtype": "float32"}
    values["data"] = {
        "path": str(world / "qat_train.json"),
        "validation_path": str(world / "validation.json"),
    }
    values["optim"]["batch_size"] = 4
    values["run"] |= {"max_steps": 2, "precision": "fp32", "save_every": 2}
    recipe.write_text(yaml.safe_dump(values))


def write_stand_ins(folder: Path) -> None:
    folder.mkdir()
    for program in docs_stand_ins.PROGRAMS:
        script = folder / program
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{docs_stand_ins.__file__}" {program} "$@"\n')
        script.chmod(0o755)
