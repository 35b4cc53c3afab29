"""`grace study` as its user calls it: killed, resumed, reported, and in the wrong place."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from grace.cli import main
from grace.study.report import BEGIN, END

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "grace.study", *map(str, arguments)]


def study(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), capture_output=True, text=True, env=ENVIRONMENT)


def until(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """A study whose command was killed after its first rows, and these."""
    out = tmp_path_factory.mktemp("study") / "out"
    process = subprocess.Popen(command("--quick", "--out", out), stderr=subprocess.DEVNULL, env=ENVIRONMENT)
    until(lambda: len(list(out.glob("rows/*.json"))) >= 2)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(children) >= 2
    until(lambda: not any(child.is_running() and child.status() != "zombie" for child in children), 30)
    return out, {path.name: path.read_bytes() for path in out.glob("rows/*.json")}


@pytest.mark.slow
@pytest.mark.timeout(600)
class TestQuickStudy:
    def test_what_was_done_is_kept_and_the_rest_is_run(self, killed: tuple[Path, dict[str, bytes]]) -> None:
        out, before = killed
        result = study("--quick", "--out", out, "--json")
        assert result.returncode == 0, result.stderr
        report = json.loads(result.stdout)
        after = {path.name: path.read_bytes() for path in out.glob("rows/*.json")}
        assert before.items() <= after.items() and len(before) < len(after) == report["trials"] == 8
        assert report["missing"] == 0 and set(report["tables"]["main"]) == {"rtn_w2", "kd_w2", "grace_w2"}
        assert report["tables"]["main"]["grace_w2"]["seeds"] == [0, 1]

    def test_the_report_follows_from_the_rows(self, killed: tuple[Path, dict[str, bytes]]) -> None:
        out, _ = killed
        values = []
        for path in out.glob("rows/*.json"):
            row = json.loads(path.read_text())
            if row["trial"]["recipe"].endswith("grace_w4.yaml") and row["trial"]["split"] == "test":
                values.append(row["scores"]["exact_match"])
        mean, half = sum(values) / 2, 12.706205 * abs(values[0] - values[1]) / 2
        text = (out / "report.md").read_text()
        line = next(line for line in text.splitlines() if line.startswith("| W2, GRACE |"))
        assert line.split("|")[3].strip() == f"{mean:.3f} ± {half:.3f}".replace("0.", ".")
        assert (out / "plots" / "bits.png").stat().st_size > 5000

    def test_nothing_is_run_again(self, killed: tuple[Path, dict[str, bytes]], tmp_path: Path) -> None:
        out, _ = killed
        before = {path: path.stat().st_mtime_ns for path in out.glob("rows/*.json")}
        results = tmp_path / "recipes" / "RESULTS.md"
        results.parent.mkdir()
        results.write_text(f"mine\n{BEGIN}\nold\n{END}\nmine too\n")
        result = study("--quick", "--out", out, "--publish", tmp_path)
        assert result.returncode == 0 and " to go" not in result.stderr
        assert before == {path: path.stat().st_mtime_ns for path in out.glob("rows/*.json")}
        text = results.read_text()
        assert (
            text.startswith(f"mine\n{BEGIN}\n")
            and text.endswith(f"{END}\nmine too\n")
            and "\nold\n" not in text
        )
        assert "W2, GRACE" in text and (tmp_path / "recipes" / "study" / "bits.png").exists()
        assert len((tmp_path / "benchmarks" / "results" / "study.jsonl").read_text().splitlines()) == 8

    def test_other_sizes_are_refused(self, killed: tuple[Path, dict[str, bytes]], capsys) -> None:
        refused(capsys, "--quick", "--out", killed[0])


def refused(capsys: pytest.CaptureFixture[str], told: str, *arguments: str | Path) -> None:
    assert main(["study", *map(str, arguments)]) == 2
    printed = capsys.readouterr()
    assert told in printed.err and len(printed.err.splitlines()) == 1 and printed.out == ""


def test_what_cannot_be_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    used, new = tmp_path / "used", tmp_path / "new"
    used.mkdir()
    (used / "mine.txt").write_text("x")
    refused(capsys, "holds no study", "--quick", "--out", used)
    refused(capsys, "there is no table 'mian'", "--out", new, "--only", "mian")
    refused(capsys, "there is data for 8 seeds", "--out", new, "--seeds", "99")
    refused(capsys, "holds no study", "--out", new, "--report-only")
    assert [path.name for path in used.iterdir() if path.name[0] != "."] == ["mine.txt"]
    assert not new.exists()
