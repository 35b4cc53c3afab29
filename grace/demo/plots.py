"""The demo's figures, drawn with matplotlib from the logs and scores on disk."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from grace.data.records import Record, open_image
from grace.demo import scoring
from grace.demo.arms import Arm
from grace.report.plots import CONTROLLER, LOSSES, draw_section
from grace.report.read import read_run


def draw_all(
    out: Path,
    report: Mapping[str, Any],
    chosen: Mapping[str, Arm],
    examples: Sequence[Record],
    answers: Mapping[str, Sequence[str]],
) -> list[Path]:
    """Draws every figure into `out/plots` and returns their paths."""
    folder = out / "plots"
    folder.mkdir(exist_ok=True)
    run = [read_run(out / "arms" / chosen["grace"].name)]
    figures = {
        "loss_parts": draw_section(run, LOSSES),
        "beta": draw_section(run, CONTROLLER),
        "gate": draw_gate(scoring.gate_values(out / "teacher", out / "data" / "qat_train.json", 256)),
        "accuracy": draw_accuracy(report),
        "contact_sheet": draw_contact_sheet(examples, answers),
    }
    paths = []
    for name, figure in figures.items():
        assert figure is not None  # the run has logged
        figure.savefig(folder / f"{name}.png", dpi=110, bbox_inches="tight")
        paths.append(folder / f"{name}.png")
    return paths


def draw_gate(values: Sequence[float]) -> Figure:
    """Histogram of the teacher's confidence gate on training tokens."""
    figure = Figure(figsize=(5, 3))
    axis = figure.subplots()
    axis.hist(values, bins=50)
    axis.set(title="teacher confidence gate", xlabel="gate", ylabel="supervised tokens", yscale="log")
    return figure


def draw_accuracy(report: Mapping[str, Any]) -> Figure:
    """Exact match with 95 % error bars, one bar per arm."""
    figure = Figure(figsize=(8, 3.5))
    axis = figure.subplots()
    names = list(report["arms"])
    rates = [report["arms"][name]["exact_match"] for name in names]
    errors = [1.96 * report["arms"][name]["exact_match_se"] for name in names]
    axis.bar(names, rates, yerr=errors, capsize=3)
    for index, rate in enumerate(rates):
        axis.text(index, 0.01, f"{rate:.3f}", ha="center", color="white", fontsize=8)
    axis.set(title="exact match on held-out scenes (95 % interval)", ylim=(0, 1))
    axis.tick_params(axis="x", rotation=30)
    return figure


def draw_contact_sheet(examples: Sequence[Record], answers: Mapping[str, Sequence[str]]) -> Figure:
    """Test scenes with the true answer and what each model says, wrong answers in red."""
    rows = (len(examples) + 1) // 2
    figure = Figure(figsize=(13, 2.6 * rows))
    axes = figure.subplots(rows, 4, width_ratios=(1, 2.2, 1, 2.2), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for index, record in enumerate(examples):
        picture, text = axes[index // 2][2 * (index % 2) : 2 * (index % 2) + 2]
        picture.imshow(open_image(record.images[0], record.id))
        question, truth = record.turns[-2].text.replace("<image>", "").strip(), record.turns[-1].text
        lines = [(f"Q: {question}", "black"), (f"A: {truth}", "black")]
        for name, given in answers.items():
            lines.append((f"{name}: {given[index]}", "green" if given[index] == truth else "red"))
        height = 1.0
        for line, colour in lines:
            wrapped = textwrap.fill(line, 62)
            text.text(0, height, wrapped, color=colour, fontsize=7, va="top", transform=text.transAxes)
            height -= 0.09 * (wrapped.count("\n") + 1)
    return figure
