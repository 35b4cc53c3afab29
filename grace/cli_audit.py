"""`grace data audit` and `grace data stats`: a recipe's data checked, counted and shown.

The checks themselves are in `grace.data.audit`; this file puts recipe, processor and report together.
"""

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from grace.config import Recipe, load_recipe
from grace.data.audit import FileAudit, audit_file, by_source
from grace.data.audit_list import length_print, list_path, require_writable, write_list
from grace.data.audit_text import format_report, format_stats
from grace.data.faults import CLASSES, Policies
from grace.data.sampler import steps_of, visits
from grace.data.stats import statistics
from grace.errors import UserError
from grace.models.processor import load_processor
from grace.progress import progress


def run_audit(args: argparse.Namespace) -> int:
    """Audits, writes the list, prints the report.

    Raises:
        UserError: a fault whose class has the policy "error", after everything was written and printed.
    """
    recipe = load_recipe(args.recipe, args.overrides)
    data = recipe.data
    policies = Policies(data.skip, data.accept)
    out = list_path(data.path, args.out or data.audit)
    require_writable(out, data_files(recipe))
    processor = load_processor(recipe.student.path, data.min_pixels, data.max_pixels)
    start = time.perf_counter()
    audits = audits_of(recipe, processor, args.deep, args.workers)
    seconds = time.perf_counter() - start
    report = report_of(recipe, audits, policies) | {"deep": args.deep, "list": str(out)}
    write_list(out, audits, data.image_root, length_print(processor, data.max_length), report)
    report["seconds"] = float(f"{seconds:.3f}")
    print(json.dumps(report) if args.json else format_report(report))
    if policies.need_audit() and out.absolute() != list_path(data.path, data.audit).absolute():
        print(f"for training to find this list: data.audit={out}", file=sys.stderr)
    if errors := report["errors"]:
        parts = ", ".join(f"{kind} {count}" for kind, count in errors.items())
        raise UserError(
            f"{report['error_records']} records have faults ({parts}), listed in {out}: "
            "mend them, or name the classes in data.skip to train without those records"
            + (", or in data.accept to train on them" if any(CLASSES[kind].usable for kind in errors) else "")
        )
    if not report["run"]["records"]:
        raise UserError(f"no record of {data.path} is left to train on: {out} lists why")
    return 0


def run_stats(args: argparse.Namespace) -> int:
    """Prints how long, from where and how many-sided the records are."""
    recipe = load_recipe(args.recipe, args.overrides)
    policies = Policies(recipe.data.skip, recipe.data.accept)
    processor = load_processor(recipe.student.path, recipe.data.min_pixels, recipe.data.max_pixels)
    audits = audits_of(recipe, processor, False, args.workers)
    result = {str(audit.path): statistics(audit, policies) for audit in audits}
    print(json.dumps(result) if args.json else format_stats(result))
    return 0


def data_files(recipe: Recipe) -> list[str]:
    """The training file and, if there is another one, the validation file."""
    paths = (recipe.data.path, recipe.data.validation_path)
    return list(dict.fromkeys(path for path in paths if path))


def audits_of(recipe: Recipe, processor: Any, deep: bool, workers: int | None) -> list[FileAudit]:
    """The audit of the training file and, if there is one, of the validation file."""
    data = recipe.data
    audits = []
    for path in data_files(recipe):
        with progress("checking", "records") as advance:
            name = Path(path).name

            def on(done: int, total: int, name: str = name, advance: Any = advance) -> None:
                advance(name, done, total)

            audits.append(audit_file(path, data.image_root, processor, data.max_length, deep, workers, on))
    return audits


def report_of(recipe: Recipe, audits: Sequence[FileAudit], policies: Policies) -> dict[str, Any]:
    """Counts of faults by class and source, and what the run will take, as JSON-able values."""
    table = by_source(audits)
    totals: Counter[str] = Counter()
    for row in table.values():
        totals.update(row)
    errors = {(i, f.index, f.kind) for i, audit in enumerate(audits) for f in audit.errors(policies)}
    error_kinds = Counter(kind for _, _, kind in errors)
    left_out = Counter(kind for audit in audits for kind in audit.left_out(policies).values())
    return {
        "records": totals.pop(""),
        "faults": {
            kind: {"records": totals[kind], "policy": policies.of(kind)} for kind in CLASSES if totals[kind]
        },
        "sources": {
            source: {"records": row[""], "faults": {kind: row[kind] for kind in CLASSES if row[kind]}}
            for source, row in table.items()
        },
        "left_out": dict(sorted(left_out.items())),
        "errors": {kind: error_kinds[kind] for kind in CLASSES if error_kinds[kind]},
        "error_records": len({(i, index) for i, index, _ in errors}),
        "run": run_of(recipe, audits[0], policies),
        "validation_records": len(audits[1].used(policies)) if len(audits) > 1 else None,
    }


def run_of(recipe: Recipe, audit: FileAudit, policies: Policies) -> dict[str, Any]:
    """Exact counts of one epoch and of the whole run over the records that can be used."""
    used = audit.used(policies)
    n, optim = len(used), recipe.optim
    if n == 0:
        return {"records": 0, "steps": 0}
    columns = {
        name: audit.column(name)[used].astype(np.int64)
        for name in ("images", "tokens", "image_tokens", "supervised")
    }
    steps = recipe.run.max_steps or steps_of(optim.epochs, n, optim.batch_size)
    times = visits(steps, optim.batch_size, n, recipe.run.seed)
    return {
        "records": n,
        **{name: int(column.sum()) for name, column in columns.items()},
        "steps": steps,
        "batch_size": optim.batch_size,
        "epochs": steps * optim.batch_size / n,
        "whole_run": {name: int((column * times).sum()) for name, column in columns.items()},
    }
