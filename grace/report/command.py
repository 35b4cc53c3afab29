"""`grace report RUN ...`: the page written, and its numbers for programs."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grace.errors import UserError
from grace.files import write_text
from grace.report.page import MARK, html_page, last_values, status
from grace.report.read import RunLog, read_runs

REPORT_FILE = "report.html"


def run_report(args: argparse.Namespace) -> int:
    """Writes the page and says where; with `--json` its numbers on stdout."""
    runs = read_runs(args.runs)
    out = args.out or (args.runs[0] / REPORT_FILE if len(runs) == 1 else Path(REPORT_FILE))
    require_replaceable(out)
    try:
        write_text(out, html_page(runs))
    except OSError as error:
        raise UserError(f"cannot write {out} ({error.strerror}): choose another --out") from error
    if args.json:
        print(json.dumps(summary(out, runs)))
    for run in runs:
        print(f"{run.name}: {status(run)}", file=sys.stderr)
    print(out, file=sys.stderr)
    return 0


def summary(out: Path, runs: Sequence[RunLog]) -> dict[str, Any]:
    """What the page says, as JSON-able values."""
    return {
        "report": str(out),
        "runs": [
            {
                "path": str(run.path),
                "name": run.name,
                "finished": run.finished,
                "last_step": run.last_step,
                "total_steps": run.total_steps,
                "log_lines": len(run.steps),
                "unreadable_lines": run.unreadable,
                "last": last_values(run),
                "snr_by_layer": run.snr,
            }
            for run in runs
        ],
    }


def require_replaceable(out: Path) -> None:
    """Raises UserError if something is there that is no earlier report."""
    if out.is_dir():
        raise UserError(f"{out} is a directory: give --out a file, such as {out / REPORT_FILE}")
    if not out.exists():
        return
    with out.open("rb") as file:
        start = file.read(1000)
    if MARK.encode() not in start:
        raise UserError(f"{out} is there and is no report: choose another --out or remove it")
