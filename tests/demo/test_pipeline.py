"""`grace demo` as its user calls it: a whole quick run, a second one over it, and wrong places to put it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForImageTextToText

import grace.runtime
from grace.data.questions import KINDS
from grace.demo.report import LABELS

ARMS = ("teacher", "student", "student_control", "rtn_w4", "rtn_w2", "qat", "kd", "grace", "awq")
FIGURES = {"exact_match", "exact_match_se", "ce", "weight_bytes", "decode_tokens_per_s", "by_type"}


def demo(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "grace", "demo", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished quick demo."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    result = demo("--quick", "--out", folder, "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == json.loads((folder / "report.json").read_text())
    for name in (
        "report.json",
        "report.md",
        "loss_parts.png",
        "beta.png",
        "gate.png",
        "accuracy.png",
        "contact_sheet.png",
    ):
        assert name in result.stderr, f"the path of {name} is not told"
    return folder


@pytest.mark.slow
@pytest.mark.timeout(1200)
class TestQuickDemo:
    def test_report_has_every_arm_and_figure(self, out: Path) -> None:
        report = json.loads((out / "report.json").read_text())
        assert tuple(report["arms"]) == ARMS == tuple(LABELS)
        for name, row in report["arms"].items():
            assert row.keys() >= FIGURES, name
            assert set(row["by_type"]) == set(KINDS)
            assert 0 <= row["exact_match"] <= 1 and row["ce"] > 0 and row["decode_tokens_per_s"] > 0
        assert set(report["majority_rate"]) == set(KINDS)
        sizes = {name: row["weight_bytes"] for name, row in report["arms"].items()}
        assert (
            sizes["rtn_w2"]
            < sizes["rtn_w4"]
            == sizes["qat"]
            == sizes["awq"]
            < sizes["student"]
            < sizes["teacher"]
        )

    def test_packed_model_says_what_the_trained_one_does(self, out: Path) -> None:
        arms = json.loads((out / "report.json").read_text())["arms"]
        assert abs(arms["awq"]["exact_match"] - arms["grace"]["exact_match"]) <= 3 / arms["awq"]["turns"]
        assert arms["awq"]["ce"] == pytest.approx(arms["grace"]["ce"], rel=0.05)

    def test_tables_and_pictures_are_there(self, out: Path) -> None:
        text = (out / "report.md").read_text()
        assert all(label in text for label in LABELS.values()) and "majority guess" in text
        for name in ("loss_parts", "beta", "gate", "accuracy", "contact_sheet"):
            assert (out / "plots" / f"{name}.png").stat().st_size > 5000

    def test_directories_load(self, out: Path) -> None:
        packed = AutoModelForImageTextToText.from_pretrained(out / "awq")
        assert sum(isinstance(m, grace.runtime.Int4Linear) for m in packed.modules()) == 28
        AutoModelForImageTextToText.from_pretrained(out / "qat")

    def test_a_second_run_trains_nothing(self, out: Path) -> None:
        before = {path: path.stat().st_mtime_ns for path in (out / "arms").rglob("model.safetensors")}
        result = demo("--quick", "--out", out)
        assert result.returncode == 0 and "training" not in result.stderr
        assert before == {path: path.stat().st_mtime_ns for path in (out / "arms").rglob("model.safetensors")}

    def test_other_settings_are_refused(self, out: Path) -> None:
        result = demo("--out", out)
        assert result.returncode == 2 and len(result.stderr.splitlines()) == 1


def test_a_directory_in_use_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("x")
    result = demo("--quick", "--out", tmp_path)
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1 and str(tmp_path) in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
