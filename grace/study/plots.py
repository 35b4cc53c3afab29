"""The study's figures: each is drawn from the rows there are, and left out where there are none."""

import math
from collections.abc import Callable
from pathlib import Path

from matplotlib.figure import Figure

from grace.study.grid import Study
from grace.study.measures import difference, exact_match, mean, of_kinds

METHODS = {"rtn": "round to nearest", "qat": "QAT", "kd": "QAT + plain KL", "grace": "GRACE"}


def draw_all(study: Study, folder: Path) -> list[str]:
    """Draws what there is into `folder`; returns the names, files without `.png`."""
    folder.mkdir(exist_ok=True)
    drawn = []
    for name, draw in FIGURES.items():
        figure = draw(study)
        if figure is not None:
            figure.savefig(folder / f"{name}.png", dpi=100, bbox_inches="tight")
            drawn.append(name)
    return drawn


def draw_bits(study: Study) -> Figure | None:
    """Exact match of every method by bits."""
    arms = {arm.name: arm for arm in study.tables[0].arms}
    figure = Figure(figsize=(6, 3.6))
    axis = figure.subplots()
    for shift, (method, label) in enumerate(METHODS.items()):
        found = [
            (bits, value) for bits in (2, 3, 4, 8)
            if (arm := arms.get(f"{method}_w{bits}")) and (value := mean(study, arm, exact_match))
        ]  # fmt: skip
        if found:
            places = [math.log2(bits) + 0.02 * shift for bits, _ in found]
            halves = [0.0 if math.isnan(value.half) else value.half for _, value in found]
            axis.errorbar(places, [v.mean for _, v in found], halves, label=label, marker="o", capsize=3)
    if not axis.lines:
        return None
    control = mean(study, arms["control"], exact_match) if "control" in arms else None
    if control is not None:
        axis.axhline(control.mean, color="grey", linestyle=":", label="trained on, no quantizer")
    axis.set(title="exact match, 95 % over seeds", xlabel="bits", ylim=(0.55, None))
    axis.set_xticks([math.log2(bits) for bits in (2, 3, 4, 8)], ["2", "3", "4", "8"])
    axis.legend()
    return figure


def draw_differences(study: Study) -> Figure | None:
    """Every arm's difference to what its table compares with."""
    rows = [
        (f"{table.title.split(' (')[0]}: {arm.label}", value)
        for table in study.tables
        for arm in table.arms
        if (value := difference(study, arm, table, exact_match)) and not math.isnan(value.half)
    ]
    if not rows:
        return None
    figure = Figure(figsize=(8, 1 + 0.22 * len(rows)))
    axis = figure.subplots()
    for place, (_, value) in enumerate(rows):
        colour = "tab:blue" if value.clear else "grey"
        axis.errorbar([value.mean], [place], xerr=[value.half], fmt="o", color=colour, capsize=2)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(rows)), [label for label, _ in rows], fontsize=7)
    axis.invert_yaxis()
    axis.set(title="difference in exact match, paired by seed (95 %)")
    return figure


def draw_noise(study: Study) -> Figure | None:
    """Under misled teachers: the questions that they get wrong, and the others."""
    tables = [table for table in study.tables if table.kinds]
    if not any(study.results(arm) for table in tables for arm in table.arms):
        return None
    figure = Figure(figsize=(10, 3.6))
    for axis, table in zip(figure.subplots(1, len(tables), squeeze=False)[0], tables, strict=True):
        arms = [arm for arm in table.arms if study.results(arm)]
        for shift, others in ((-0.2, False), (0.2, True)):
            values = [mean(study, arm, of_kinds(table.kinds, others)) for arm in arms]
            pairs = [(place, value) for place, value in enumerate(values) if value is not None]
            axis.bar(
                [place + shift for place, _ in pairs], [value.mean for _, value in pairs], 0.38,
                yerr=[0.0 if math.isnan(value.half) else value.half for _, value in pairs], capsize=2,
                label="other kinds" if others else "kinds that the teacher gets wrong",
            )  # fmt: skip
        axis.set_xticks(range(len(arms)), [arm.label for arm in arms], rotation=40, ha="right", fontsize=8)
        axis.set(title=table.title.removeprefix("The gate against a "), ylim=(0, 1))
    figure.axes[0].legend(fontsize=8)
    return figure


FIGURES: dict[str, Callable[[Study], Figure | None]] = {
    "bits": draw_bits,
    "noise": draw_noise,
    "differences": draw_differences,
}
