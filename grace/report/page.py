"""The report of runs as one HTML page: no scripts, nothing to fetch, figures as inline SVG."""

import io
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from typing import Any

import matplotlib as mpl
import yaml
from matplotlib.figure import Figure

from grace.report import plots
from grace.report.read import RunLog, number, section

MARK = '<meta name="generator" content="grace report">'  # by which a report knows that it may replace a file
LAST = (
    "loss/total", "loss/ce", "loss/gdkd", "loss/rcka", "ib/beta", "gate/mean", "rcka/cka_mean", "quant/snr_db",
    "tokens_per_s", "perf/images_per_s", "perf/data_wait", "perf/mfu",
)  # fmt: skip
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1150px; padding: 0 1em; color: #222; }
table { border-collapse: collapse; margin: .6em 0 1.2em; }
th, td { padding: .2em .7em; border-bottom: 1px solid #ddd; text-align: right; vertical-align: top; }
th:first-child, td:first-child { text-align: left; }
.wide { overflow-x: auto; }
svg { width: 100%; height: auto; }
pre { background: #f6f6f6; padding: .8em; overflow-x: auto; font-size: 13px; }
.note { color: #8a4b00; }
figure { margin: 0 0 1em; }
figcaption { color: #555; }
"""


def html_page(runs: Sequence[RunLog]) -> str:
    """The whole page."""
    title = escape(" / ".join(run.name for run in runs))
    body = [f"<h1>{title}</h1>", _overview(runs), *_notes(runs)]
    if len(runs) > 1:
        body.append(_differences(runs))
    for heading, curves in plots.SECTIONS.items():
        figures = [_svg(plots.draw_section(runs, curves), heading)]
        if heading == "Teacher and images":
            figures += [_svg(plots.draw_histograms(run), f"{run.name}: histograms") for run in runs]
        if heading == "Quantizer":
            figures += [_svg(plots.draw_layers(run), f"{run.name}: layers") for run in runs]
        if any(figures):
            body.append(f"<h2>{heading}</h2>" + "".join(figures))
    body += [_details(run) for run in runs]
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">{MARK}<title>{title}</title>'
        f"<style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(body)
        + f"\n<p>Made {made}.</p></body></html>\n"
    )


def status(run: RunLog) -> str:
    """Where a run is, in words."""
    total = "" if run.total_steps is None else f" of {run.total_steps}"
    if run.finished:
        return f"finished at step {run.last_step}"
    return f"unfinished: step {run.last_step}{total}" if run.last_step else "nothing logged yet"


def last_values(run: RunLog) -> dict[str, float]:
    """The numbers of the last log window and of the last validation."""
    lines = [*run.steps[-1:], *run.validation[-1:]]
    return {
        key: value
        for line in lines
        for key, item in line.items()
        if key != "step" and (value := number(item)) is not None
    }


def _overview(runs: Sequence[RunLog]) -> str:
    last = [last_values(run) for run in runs]
    rows: list[tuple[str, list[str]]] = [
        ("state", [status(run) for run in runs]),
        ("last written", [f"{run.written:%Y-%m-%d %H:%M} UTC" if run.written else "" for run in runs]),
    ]
    for key, name in (("git_revision", "code"), ("device", "device"), ("processes", "processes")):
        rows.append((name, [str(run.environment.get(key) or "")[:48] for run in runs]))
    validation = sorted({key for values in last for key in values if key.startswith("val/")})
    for key in (*LAST, *validation):
        cells = [f"{values[key]:.5g}" if key in values else "" for values in last]
        rows.append((key, cells))
    return _table(["", *(run.name for run in runs)], [[name, *cells] for name, cells in rows if any(cells)])


def _notes(runs: Sequence[RunLog]) -> list[str]:
    notes = []
    for run in runs:
        if run.unreadable:
            notes.append(
                f"{run.name}: {run.unreadable} lines of the log are no JSON object and were left out."
            )
        if not run.steps:
            notes.append(f"{run.name}: no log window has ended yet.")
    return [f'<p class="note">{escape(note)}</p>' for note in notes]


def _differences(runs: Sequence[RunLog]) -> str:
    """Recipe fields in which the runs differ."""
    flat = [
        {
            f"{name}.{key}": value
            for name in run.recipe
            for key, value in section(run.recipe, name).items()
            if (name, key) != ("run", "output_dir")
        }
        for run in runs
    ]
    keys = dict.fromkeys(key for values in flat for key in values)
    rows = [
        [key, *(_short(values.get(key)) for values in flat)]
        for key in keys
        if any(values.get(key) != flat[0].get(key) for values in flat)
    ]
    heading = "<h2>Recipes</h2>"
    if not rows:
        return f"{heading}<p>The recipes are the same.</p>"
    return heading + _table(["differs", *(run.name for run in runs)], rows)


def _short(value: Any) -> str:
    return "" if value is None else str(value)


def _details(run: RunLog) -> str:
    """Audit, recipe and environment, folded away."""
    parts = [("Data audit", _audit(run.audit))] if run.audit else []
    for heading, content in (("Recipe", run.recipe), ("Environment", run.environment)):
        if content:
            text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
            parts.append((heading, f"<pre>{escape(text)}</pre>"))
    return "".join(
        f"<details><summary>{heading} of {escape(run.name)}</summary>{content}</details>"
        for heading, content in parts
    )


def _audit(audit: Mapping[str, Any]) -> str:
    """Counts of the audit's summary."""
    rows = [["records", _short(audit.get("records"))]]
    for key, name in (("left_out", "left out"), ("errors", "error")):
        rows += [[f"{name}: {kind}", _short(count)] for kind, count in section(audit, key).items()]
    rows += [
        [f"to train on: {k}", _short(v)] for k, v in section(audit, "run").items() if number(v) is not None
    ]
    return _table(["", "count"], rows)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def cells(row: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in row) + "</tr>"

    body = "".join(cells(row, "td") for row in rows)
    return f'<div class="wide"><table>{cells(header, "th")}{body}</table></div>'


def _svg(figure: Figure | None, caption: str) -> str:
    """A figure as SVG that can stand in a page beside others: names of its own, no header, no addresses."""
    if figure is None:
        return ""
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": caption}), io.StringIO() as file:
        figure.savefig(file, format="svg", metadata={"Date": None})
        text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)  # HTML needs none
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # the same in every figure, and nothing refers to them
    return f"<figure>{text}<figcaption>{escape(caption)}</figcaption></figure>"
