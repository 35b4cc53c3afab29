"""The study's report: tables in Markdown and plots, all from the rows that are there.

    OUT/report.md, OUT/plots/*.png

With `publish`, a checkout of the repository, its recipes/RESULTS.md gets the same text between two marks, with the plots
in recipes/study/, and benchmarks/results/study.jsonl the rows.
"""

import json
import math
import os
import shutil
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from grace.errors import UserError
from grace.files import write_text
from grace.study.arms import Arm, Table
from grace.study.grid import Study
from grace.study.measures import (
    Measure,
    compared,
    cross_entropy,
    difference,
    exact_match,
    mean,
    of_kinds,
    snapped_match,
)
from grace.study.plots import draw_all
from grace.study.stats import Estimate

BEGIN, END = "<!-- the study, written by: grace study --publish . -->", "<!-- end of the study -->"


def number(value: Estimate | None, digits: int = 3, sign: bool = False) -> str:
    """`.723 ± .004`; the mean alone for one seed; differences whose interval leaves out 0 are bold."""
    if value is None:
        return ""
    text = _short(value.mean, digits, sign)
    if not math.isnan(value.half):
        text += f" ± {_short(value.half, digits)}"
    return f"**{text}**" if sign and value.clear else text


def _short(value: float, digits: int, sign: bool = False) -> str:
    text = f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"
    return text.replace("0.", ".", 1) if abs(value) < 1 else text


def _grid(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(heads) + " |", "| --- |" + " ---: |" * (len(heads) - 1)]
    return lines + ["| " + " | ".join(cells) + " |" for cells in rows]


# ---------------------------------------------------------------- tables


def columns_of(table: Table) -> dict[str, tuple[Measure, int]]:
    """The measures of a table and their digits."""
    match = {"exact match": (exact_match, 3)}
    if table.kinds:
        of, others = of_kinds(table.kinds), of_kinds(table.kinds, others=True)
        return match | {"on the noisy kinds": (of, 3), "on the others": (others, 3)}
    if table.name == "export":
        match |= {"rounded at export": (snapped_match, 3)}
    return match | {"CE": (cross_entropy, 4)}


def table_text(study: Study, table: Table) -> list[str]:
    """A table as lines of Markdown; arms without rows are left out, as is a table without any."""
    columns, rows = columns_of(table), []
    for arm in table.arms:
        if not (found := study.results(arm)):
            continue
        weight = study.chosen(arm)
        cells = [arm.label, "" if weight is None else f"{weight:g}"]
        for measure, digits in columns.values():
            cells.append(number(mean(study, arm, measure), digits) or "diverged")
            if table.against:
                cells.append(number(difference(study, arm, table, measure), digits, sign=True))
        failed = sum("failed" in row for row in found.values())
        trained = f"{len(found)}" if arm.trial.trained else ""
        rows.append([*cells, trained + (f", {failed} diverged" if failed else "")])
    if not rows:
        return []
    heads = ["arm", "weight"]
    for name in columns:
        heads += [name, "difference"] if table.against else [name]
    lines = [f"### {table.title}", "", *([table.note, ""] if table.note else [])]
    return [*lines, *_grid([*heads, "seeds"], rows), *_verdict(study, table), *_same_bits(study, table), ""]


def _verdict(study: Study, table: Table) -> list[str]:
    """Which arms the seeds tell from what they are compared with, in words."""
    better, worse, same = [], [], []
    for arm in table.arms:
        value = difference(study, arm, table, exact_match)
        if value is not None and value.n > 1:
            (same if not value.clear else better if value.mean > 0 else worse).append(arm.label)
    told = {"Better, beyond the interval": better, "Worse": worse, "Not told apart": same}
    text = " ".join(f"{name}: {'; '.join(labels)}." for name, labels in told.items() if labels)
    return ["", text] if text else []


def _same_bits(study: Study, table: Table) -> list[str]:
    """Of the table of equal computations: whether quantizing once a step ends with the same bits."""
    rows = {arm.name: study.results(arm) for arm in table.arms if arm.name in ("grace_cut", "grace_once")}
    if len(rows) < 2:
        return []
    cut, once = rows["grace_cut"], rows["grace_once"]
    seeds = sorted(cut.keys() & once.keys())
    same = [seed for seed in seeds if cut[seed]["weights_sha256"] == once[seed]["weights_sha256"]]
    return [
        "",
        f"Quantized once a step, every trained weight has the same bits at {len(same)} of {len(seeds)} seeds.",
    ]


def tuning_text(study: Study) -> list[str]:
    """Every weight that was tried, and what validation said."""
    rows, known = [], set()
    for table in study.tables:
        for arm in table.arms:
            found = study.validation(arm)
            if arm.name in known or not any(found.values()):
                continue
            known.add(arm.name)
            chosen, cells = study.chosen(arm), []
            for weight, done in found.items():
                scores = [exact_match(row) for row in done if "failed" not in row]
                told = f"{sum(scores) / len(scores):.3f}" if scores else "diverged" if done else "not run"
                cells.append(f"{weight:g}: **{told}**" if weight == chosen else f"{weight:g}: {told}")
            rows.append([f"{table.title.split(' (')[0]}: {arm.label}", ", ".join(cells)])
    if not rows:
        return []
    text = (
        f"Mean exact match on the validation split over {study.tuning_seeds} seeds that no table uses; the chosen weight is "
        "bold. Where it is the first or last one tried, a better one may lie beyond."
    )
    return ["### Weights tried", "", text, "", *_grid(["arm", "weight: exact match"], rows), ""]


# ---------------------------------------------------------------- the report


def report_text(study: Study, images: str, drawn: Sequence[str]) -> str:
    """The whole report; plots are looked for in the folder `images`."""
    hours = sum(row["cpu_seconds"] for row in study.rows.values()) / 3600
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    missing = study.missing(everything=True)
    steps = study.tables[0].arms[-1].trial.setting("run.max_steps")
    lines = [
        f"`make study`: {len(study.rows)} trials, {hours:.1f} hours of a core ({versions})."
        + (f" **{missing} trials are still to be run**; what has not run is not in the tables." if missing else ""),
        "",
        f"Each trial trains the packaged student of the small world ({steps} steps of 16 records, 30 % of their answers "
        "wrong) and scores it on held-out questions. A seed stands for training records of its own, disjoint from those of "
        "every other seed, and for their order; student, teacher and questions are the same in all. Means over seeds ± half a "
        "95 % interval (Student's t); differences are taken seed by seed, and those whose interval leaves out 0 are bold. "
        "Of so many comparisons one in twenty is bold by chance. CE is nats per token of the right answers.",
        "",
        *[line for name in drawn for line in (f"![{name}]({images}/{name}.png)", "")],
    ]  # fmt: skip
    for table in study.tables:
        lines += table_text(study, table)
    return "\n".join([*lines, *tuning_text(study)]).rstrip() + "\n"


def write_report(study: Study, publish: Path | None) -> dict[str, Any]:
    """Writes report and plots, and returns what `--json` prints.

    Raises:
        UserError: there is nothing to report, or nowhere to publish it.
    """
    if not study.rows:
        raise UserError(f"{study.out} holds no finished trial yet: run it without --report-only")
    drawn, path = draw_all(study, study.out / "plots"), study.out / "report.md"
    write_text(path, "# The study\n\n" + report_text(study, "plots", drawn))
    print(path, file=sys.stderr)
    if publish is not None:
        publish_to(study, publish, drawn)
    tables = {
        table.name: {arm.name: summary(study, arm, table) for arm in table.arms if study.results(arm)}
        for table in study.tables
    }
    missing = study.missing(everything=True)
    return {"tables": tables, "trials": len(study.rows), "missing": missing, "report": os.fspath(path)}


def summary(study: Study, arm: Arm, table: Table) -> dict[str, Any]:
    """An arm's numbers as JSON."""
    base = compared(arm, table)
    return {
        "label": arm.label, "weight": study.chosen(arm), "seeds": sorted(study.results(arm)),
        "exact_match": _plain(mean(study, arm, exact_match)), "ce": _plain(mean(study, arm, cross_entropy)),
        "against": base and base.name, "difference": _plain(difference(study, arm, table, exact_match)),
    }  # fmt: skip


def _plain(value: Estimate | None) -> dict[str, float | None] | None:
    return value and {"mean": value.mean, "half": None if math.isnan(value.half) else value.half}


def publish_to(study: Study, folder: Path, drawn: Sequence[str]) -> None:
    """Puts the report into a checkout: text between the marks of RESULTS.md, plots and rows where they belong.

    Raises:
        UserError: there is no such file, or it has no marks.
    """
    results, beside = folder / "recipes" / "RESULTS.md", folder / "recipes" / "study"
    text = results.read_text() if results.exists() else ""
    if not text.count(BEGIN) == text.count(END) == 1:
        raise UserError(
            f"{results} needs the lines {BEGIN!r} and {END!r}, once each: put them where the study goes"
        )
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    beside.mkdir(exist_ok=True)
    for name in drawn:
        shutil.copyfile(study.out / "plots" / f"{name}.png", beside / f"{name}.png")
    lines = [json.dumps({"key": key, **row}) for key, row in sorted(study.rows.items())]
    write_text(folder / "benchmarks" / "results" / "study.jsonl", "\n".join(lines) + "\n")
    write_text(results, f"{before}{BEGIN}\n\n{report_text(study, 'study', drawn)}\n{END}{after}")
    print(results, file=sys.stderr)
