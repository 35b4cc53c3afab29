"""The reports of audit and statistics as text."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from grace.data.faults import CLASSES


def table(rows: Iterable[Sequence[Any]]) -> str:
    """Columns two spaces apart, numbers to the right; no rows make an empty text."""
    rows = list(rows)
    texts = [[f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row] for row in rows]
    widths = [max(len(text) for text in column) for column in zip(*texts, strict=True)]
    right = [any(isinstance(row[i], int) for row in rows) for i in range(len(widths))]
    lines = []
    for row in texts:
        cells = [
            text.rjust(width) if is_right else text.ljust(width)
            for text, width, is_right in zip(row, widths, right, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def format_report(report: Mapping[str, Any]) -> str:
    """Faults by source and class, then what the run will take."""
    rows: list[Sequence[Any]] = [("source", "records", "fault", "policy", "with it")]
    for source, row in report["sources"].items():
        found = list(row["faults"].items()) or [("none", "")]
        for position, (kind, count) in enumerate(found):
            policy = report["faults"][kind]["policy"] if kind in CLASSES else ""
            first = (source, row["records"]) if position == 0 else ("", "")
            rows.append((*first, kind, policy, count))
    parts = [table(rows)]
    if faults := report["faults"]:
        meanings = [
            (kind, one["policy"], one["records"], CLASSES[kind].meaning) for kind, one in faults.items()
        ]
        parts.append(table([("all sources", "policy", "records", "meaning"), *meanings]))
        parts.append(f"faults record by record: {report['list']}")
    parts.append(_format_run(report))
    return "\n\n".join(parts)


def _format_run(report: Mapping[str, Any]) -> str:
    run, left_out = report["run"], sum(report["left_out"].values())
    lines = [f"records: {report['records']:,} read, {left_out:,} left out by data.skip"]
    if report["error_records"]:
        lines.append(f"         {report['error_records']:,} with faults that are errors")
    if not run["records"]:
        return "\n".join([*lines, "none of them can be trained on"])
    if report["error_records"]:
        lines.append("the run, once it may start, on the records that can be used as they are:")
    else:
        lines.append("the run:")
    is_mixture = len(run["files"]) > 1 or any(file["taken"] != file["records"] for file in run["files"])
    if is_mixture:
        shares = [(file["path"], file["records"], file["taken"]) for file in run["files"]]
        lines.append(table([("file", "records", "taken in an epoch"), *shares]))
    rows: list[Sequence[Any]] = [("", "first epoch" if is_mixture else "one epoch", "whole run")]
    rows.append(("steps", "", run["steps"]))
    rows.append(("records", run["records"], run["steps"] * run["batch_size"]))
    for name in ("images", "tokens", "image_tokens", "supervised"):
        rows.append((name.replace("_", " "), run[name], run["whole_run"][name]))
    lines.append(table(rows))
    if report["validation_records"] is not None:
        lines.append(f"validation records: {report['validation_records']:,}")
    return "\n".join(lines)


def format_stats(files: Mapping[str, Mapping[str, Any]]) -> str:
    """Distributions of each file."""
    parts = []
    for path, one in files.items():
        parts.append(f"{path}: {one['records']:,} records, {one['used']:,} of them usable")
        if not one["used"]:
            continue
        quantiles = list(one["lengths"]["tokens"]["percentiles"])
        header = ("per record", "sum", "mean", *(f"{q} %" for q in quantiles))
        rows = [
            (name.replace("_", " "), value["sum"], f"{value['mean']:.1f}", *value["percentiles"].values())
            for name, value in one["lengths"].items()
        ]
        parts.append(table([header, *rows]))
        sources = [
            (
                source,
                row["records"],
                row["images"],
                row["tokens"],
                f"{row['mean_tokens']:.1f}",
                row["max_tokens"],
            )
            for source, row in one["sources"].items()
        ]
        parts.append(table([("source", "records", "images", "tokens", "mean", "most"), *sources]))
        for what in ("turns", "images"):
            spread = one[f"records_by_{what}"].items()
            parts.append(table([(what, "records"), *((int(n), count) for n, count in spread)]))
    return "\n\n".join(parts)
