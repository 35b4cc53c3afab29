"""`benchmarks/at_size.py`, which is meant for a GPU, with tiny models."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
pytestmark = pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="needs the source checkout")


@pytest.mark.slow
def test_it_trains_and_says_how_it_went(tmp_path: Path) -> None:
    tiny = ["--student", "tiny", "--teacher", "tiny", "--steps", "2", "--records", "3"]
    done = subprocess.run(
        [
            sys.executable,
            str(BENCHMARKS / "at_size.py"),
            *tiny,
            "--folder",
            str(tmp_path),
            "run.precision=fp32",
        ],
        cwd=BENCHMARKS.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["steps"], result["finite"], result["overrides"]) == (2, True, ["run.precision=fp32"])
    assert result["first_loss"] > 0 and result["input_tokens_per_s"] > result["supervised_tokens_per_s"] > 0
    assert not list(tmp_path.iterdir())


def test_a_loss_that_is_not_finite_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from at_size import summary  # type: ignore[import-not-found]

    lines = [{"loss/total": 2.0, "tokens_per_s": 10.0, "perf/mfu": None}, {"eval/ce": 1.0}]
    lines += [{"loss/total": 1.0, "tokens_per_s": speed} for speed in (30.0, 20.0, 40.0)]
    found = summary(lines)
    assert found["finite"] and (found["first_loss"], found["last_loss"], found["steps"]) == (2.0, 1.0, 4)
    assert found["supervised_tokens_per_s"] == 30.0 and found["mfu"] is None
    assert not summary([*lines, {"loss/total": float("nan")}])["finite"]
    assert not summary([*lines, {"loss/total": None}])["finite"]
    assert not summary([])["finite"]
