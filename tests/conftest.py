"""Shared fixtures: tiny random models and a very small world, written once per test run."""

import os
import resource
from pathlib import Path

import pytest
from hypothesis import settings

# Without a GPU, kernels run under Triton's interpreter; it is chosen when triton is first imported.
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"

# A test that takes all memory fails by name, instead of taking its process or another with it. What is counted is
# what a process may write to, so that browsers and drivers may reserve as many addresses as they like.
_WRITABLE = 12 * 2**30
resource.setrlimit(resource.RLIMIT_DATA, (_WRITABLE, resource.getrlimit(resource.RLIMIT_DATA)[1]))

# The same examples on every run, so that a red suite means a change; to look for new ones:
# HYPOTHESIS_PROFILE=explore make test
settings.register_profile("repeatable", derandomize=True)
settings.register_profile("explore", max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


@pytest.fixture(scope="session")
def tiny_teacher_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete model directory with the tiny teacher's random weights. Do not write into it."""
    from grace.models.tiny import write_tiny_model

    return write_tiny_model(tmp_path_factory.mktemp("models") / "teacher", "teacher", seed=1)


@pytest.fixture(scope="session")
def tiny_student_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete model directory with the tiny student's random weights. Do not write into it."""
    from grace.models.tiny import write_tiny_model

    return write_tiny_model(tmp_path_factory.mktemp("models") / "student", "student", seed=2)


@pytest.fixture(scope="session")
def tiny_world_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small world of 64 records: qat_train.json 32, validation.json 16, test.json 16. Do not write into it."""
    from grace.data.small_world import write_small_world

    sizes = {"qat_train": 32, "validation": 16, "test": 16}
    return write_small_world(tmp_path_factory.mktemp("world") / "small", seed=0, splits=sizes)


@pytest.fixture(scope="session")
def qat_run(tmp_path_factory: pytest.TempPathFactory, tiny_student_dir: Path, tiny_world_dir: Path) -> Path:
    """A finished W4G128 run. Do not write into it."""
    from small_qat_run import write_qat_run

    return write_qat_run(tmp_path_factory.mktemp("runs") / "w4", tiny_student_dir, tiny_world_dir)


@pytest.fixture(scope="session", params=[4, 8], ids=["w4", "w8"])
def run_of_bits(
    request: pytest.FixtureRequest,
    qat_run: Path,
    tiny_student_dir: Path,
    tiny_world_dir: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, int]:
    """A finished run at 4 and at 8 bits, and its bits. Do not write into it."""
    from small_qat_run import write_qat_run

    if request.param == 4:
        return qat_run, 4
    return write_qat_run(tmp_path_factory.mktemp("runs") / "w8", tiny_student_dir, tiny_world_dir, bits=8), 8


@pytest.fixture(scope="session")
def awq_dir(tmp_path_factory: pytest.TempPathFactory, qat_run: Path) -> Path:
    """The AWQ export of `qat_run`. Do not write into it."""
    from grace.export.pack import export_run

    out = tmp_path_factory.mktemp("exports") / "awq"
    export_run(qat_run, out)
    return out
