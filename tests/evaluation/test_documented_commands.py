"""The commands of docs/evaluation.md, each run as it stands, on small models and a few rows of each benchmark."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from benchmark_fixtures import ROWS, write, write_predictions

from grace import cli

PAGE = Path(__file__).parents[2] / "docs" / "evaluation.md"


def test_the_commands_of_the_page_run(tmp_path, monkeypatch, awq_dir, tiny_student_dir, capsys):
    for name, rows in ROWS.items():
        write(rows(), tmp_path / "benchmarks" / f"{name}.parquet")
    write_predictions(tmp_path / "answers.jsonl", {str(row["index"]): "A" for row in ROWS["mmbench"]()})
    for name, source in (("awq", awq_dir), ("student", tiny_student_dir)):
        shutil.copytree(source, tmp_path / "runs" / "demo" / name)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```bash\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    commands = [
        shlex.split(line) for block in blocks for line in block.splitlines() if line.startswith("grace ")
    ]
    assert len(commands) == 4
    for command in commands:
        # A random model never stops by itself, so its answers are kept short: the one thing that is added.
        short = [] if command[2].startswith("--") else ["--max-new-tokens", "4"]
        assert cli.main([*command[1:], *short]) == 0, capsys.readouterr().err
        capsys.readouterr()
    results = json.loads((tmp_path / "runs/eval/awq/results.json").read_text())
    assert list(results["tasks"]) == list(ROWS)
    assert all(len(task["spec_sha256"]) == 64 for task in results["tasks"].values())


@pytest.mark.parametrize("name", ROWS)
def test_the_page_names_every_task(name):
    assert f"| `{name}` |" in PAGE.read_text(encoding="utf-8")
