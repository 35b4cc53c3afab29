"""The demo's report: one table, `report.json`, `report.md` and plots, all from what was measured."""

import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from grace.data.records import load_records
from grace.data.small_world import majority_rate
from grace.demo import plots, scoring
from grace.demo.arms import Arm
from grace.files import write_text

LABELS = {
    "teacher": "teacher, bf16",
    "student": "student, bf16",
    "student_control": "student trained on, bf16 (control)",
    "rtn_w4": "student, round-to-nearest W4",
    "rtn_w2": "student, round-to-nearest W2",
    "qat": "QAT W4",
    "kd": "QAT W4 + plain KD",
    "grace": "GRACE W4",
    "awq": "GRACE W4 exported to AWQ, INT4 kernels",
}


def write_report(
    out: Path,
    settings: Mapping[str, Any],
    scores: Mapping[str, dict[str, Any]],
    arms: Sequence[Arm],
    chosen: Mapping[str, Arm],
    train_seconds: Mapping[str, float],
    total_seconds: float,
) -> dict[str, Any]:
    """Writes the report files, prints the table and the paths, and returns the report."""
    test = load_records(out / "data" / "test.json")
    parity = json.loads((out / "scores" / "parity.json").read_text())
    report = {
        "arms": {
            name: {k: v for k, v in row.items() if k not in ("answers", "seconds")}
            for name, row in scores.items()
        },
        "majority_rate": majority_rate(test),
        "chosen_weight": {family: arm.weight for family, arm in chosen.items() if arm.weight is not None},
        "validation": {arm.name: _validation(out, arm) for arm in arms},
        "parity": parity,
        "settings": dict(settings),
        "train_seconds": dict(train_seconds),
        "total_seconds": total_seconds,
        "machine": {"processor": _processor(), "cores": os.cpu_count(), "python": platform.python_version()},
        "versions": {name: version(name) for name in ("torch", "transformers", "accelerate", "safetensors")},
    }
    shown = scoring.picked(test, len(next(iter(scores.values()))["answers"]))
    figures = plots.draw_all(
        out, report, chosen, shown, {name: row["answers"] for name, row in scores.items()}
    )
    write_text(out / "report.json", json.dumps(report, indent=1))
    write_text(out / "report.md", markdown(report, figures))
    console = Console(file=sys.stderr, width=150)
    console.print(rich_table(report))
    for path in (out / "report.json", out / "report.md", *figures, out / "qat", out / "awq"):
        print(path, file=sys.stderr)
    return report


def _validation(out: Path, arm: Arm) -> dict[str, float]:
    from grace.demo.pipeline import validation_of

    return validation_of(out, arm.name)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def rows(report: Mapping[str, Any]) -> list[list[str]]:
    """The table's cells as text, one row per arm."""
    table = []
    for name, row in report["arms"].items():
        weight = report["chosen_weight"].get("grace" if name == "awq" else name)
        label = LABELS[name] + (f" (weight {weight:g})" if weight is not None else "")
        match = f"{row['exact_match']:.3f} ± {row['exact_match_se']:.3f}"
        size, speed = f"{row['weight_bytes'] / 1e6:.2f}", f"{row['decode_tokens_per_s']:.0f}"
        table.append([label, match, f"{row['ce']:.4f}", size, speed])
    return table


COLUMNS = ("model", "exact match ± SE", "CE, nats/token", "weights, MB", "decode, tokens/s")


def rich_table(report: Mapping[str, Any]) -> Table:
    """The table for a terminal."""
    table = Table(title=f"Held-out test split, {report['arms']['student']['turns']:.0f} questions")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "model" else "right")
    for cells in rows(report):
        table.add_row(*cells)
    return table


def markdown(report: Mapping[str, Any], figures: Sequence[Path]) -> str:
    """`report.md`: the table, the scores by question type, the export's parity, the plots."""
    lines = ["# GRACE on the small world", "", "| " + " | ".join(COLUMNS) + " |", "| --- |" + " ---: |" * 4]
    lines += ["| " + " | ".join(cells) + " |" for cells in rows(report)]
    lines += [
        "",
        "Same data and steps for every trained arm; each distillation weight is the best on validation.",
        "Round-to-nearest takes the scales that quantized training starts from (the best of 20 in squared error).",
        "30 % of the answers that the student and every arm learn from are wrong; the teacher learned from right ones.",
        "Digit scans of the test split were never seen in training. SE is the binomial standard error.",
        "Weights are counted as deployed; decode speed is greedy, batch 1, dense bf16 for all rows but the last.",
        "",
        "## Exact match by question type",
        "",
    ]
    types = list(report["majority_rate"])
    lines += ["| model | " + " | ".join(types) + " |", "| --- |" + " ---: |" * len(types)]
    guess = [f"{report['majority_rate'][kind]:.3f}" for kind in types]
    lines.append("| majority guess | " + " | ".join(guess) + " |")
    for name, row in report["arms"].items():
        cells = [
            f"{row['by_type'][kind]['exact_match']:.3f}" if kind in row["by_type"] else "" for kind in types
        ]
        lines.append(f"| {LABELS[name]} | " + " | ".join(cells) + " |")
    lines += ["", "## Validation, every arm tried", "", "| arm | exact match | CE |", "| --- | ---: | ---: |"]
    lines += [
        f"| {name} | {values['val/exact_match']:.3f} | {values['val/ce']:.4f} |"
        for name, values in report["validation"].items()
    ]
    lines += [
        "",
        "## Export parity",
        "",
        "```json",
        json.dumps(report["parity"], indent=1, default=str),
        "```",
        "",
    ]
    lines += [f"![{path.stem}]({path.parent.name}/{path.name})" for path in figures]
    machine = report["machine"]
    lines += ["", f"Made in {report['total_seconds']:.0f} s on {machine['cores']} cores ({machine['processor']}), seed "
              f"{report['settings']['seed']}; " + ", ".join(f"{k} {v}" for k, v in report["versions"].items()) + "."]  # fmt: skip
    return "\n".join(lines) + "\n"
