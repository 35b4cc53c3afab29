"""The wheel on its own: built, installed elsewhere, and run away from the checkout."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import grace

ROOT = Path(grace.__file__).parents[1]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / "pyproject.toml").is_file(), reason="needs the source checkout"),
]


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a command that must succeed."""
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout, built without network."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, ROOT, cwd=out)
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel installed in it, and nothing else."""
    target = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--target", target]
    run(*pip, wheel, cwd=target)
    return target


def files_below(folder: Path, pattern: str = "**/*") -> set[str]:
    """Relative names of a folder's files that belong into a distribution."""
    return {
        path.relative_to(folder).as_posix()
        for path in folder.glob(pattern)
        if path.is_file() and not {"__pycache__", ".DS_Store"} & set(path.parts)
    }


def test_wheel_holds_the_package_its_recipes_and_manifests(wheel: Path):
    names = zipfile.ZipFile(wheel).namelist()
    info = f"grace-{grace.__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {"grace", info}
    assert len(names) == len(set(names))
    expected = {f"grace/{name}" for name in files_below(ROOT / "grace")}
    expected |= {f"grace/recipes/{name}" for name in files_below(ROOT / "recipes")}
    expected |= {f"grace/manifests/{name}" for name in files_below(ROOT / "data", "*.yaml")}
    assert {name for name in names if name.startswith("grace/")} == expected
    assert "grace/recipes/small_world/grace_w4.yaml" in names
    assert "grace/data/chat_template.jinja" in names
    assert f"{info}/licenses/LICENSE" in names


def test_small_world_runs_from_the_installed_wheel(
    site: Path, tmp_path: Path, tiny_student_dir: Path, tiny_teacher_dir: Path
):
    def python(*arguments: str | Path) -> str:
        return run(sys.executable, *arguments, cwd=tmp_path, PYTHONPATH=str(site)).stdout

    where = python(
        "-c", "import grace, grace.train, grace.demo.pipeline as p; print(grace.__file__, p.__file__)"
    )
    assert all(site in Path(file).parents for file in where.split())
    command = ("-m", "grace.cli")
    python(*command, "data", "small-world", "--out", "world", "--splits", "qat_train=8,validation=4")
    assert files_below(tmp_path / "world", "*.json") == {"qat_train.json", "validation.json", "world.json"}
    overrides = {
        "run.output_dir": "run",
        "run.max_steps": 2,
        "run.micro_batch_size": 4,
        "optim.batch_size": 4,
        "data.path": "world/qat_train.json",
        "data.validation_path": "world/validation.json",
        "student.path": tiny_student_dir,
        "teacher.path": tiny_teacher_dir,
    }
    changed = [f"{name}={value}" for name, value in overrides.items()]
    python(*command, "train", "small_world/grace_w4.yaml", *changed)
    assert (tmp_path / "run" / "model" / "grace_qat" / "state.safetensors").is_file()
    python(*command, "export", "run", "--out", "awq")
    image = next((tmp_path / "world" / "images" / "validation").glob("*.png"))
    arguments = ("--image", image, "--prompt", "What is there?", "--max-new-tokens", "2", "--json")
    assert '"kind": "awq"' in python(*command, "generate", "awq", *arguments)
