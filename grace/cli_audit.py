"""`grace data audit` and `grace data stats`: a recipe's data checked, counted and shown.

The checks themselves are in `grace.data.audit`; this file puts recipe, processor and report together.
"""

import argparse
import functools
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from grace.config import Recipe, load_recipe
from grace.data.annotations import open_annotations
from grace.data.audit import FileAudit, audit_file, by_source
from grace.data.audit_list import length_print, list_path, require_writable, write_list
from grace.data.audit_text import format_report, format_stats
from grace.data.faults import CLASSES, Policies
from grace.data.sampler import Mixture, steps_of, taken_of, visits
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
    out = list_path(data.files, args.out or data.audit)
    require_writable(out, data_files(recipe))
    processor = load_processor(recipe.student.path, data.min_pixels, data.max_pixels)
    start = time.perf_counter()
    audits = audits_of(recipe, processor, args.deep, args.workers)
    seconds = time.perf_counter() - start
    report = report_of(recipe, audits, policies) | {"deep": args.deep, "list": str(out)}
    write_list(out, audits, data.image_root, length_print(processor, data.max_length), report)
    report["seconds"] = float(f"{seconds:.3f}")
    print(json.dumps(report) if args.json else format_report(report))
    if policies.need_audit() and out.absolute() != list_path(data.files, data.audit).absolute():
        print(f"for training to find this list: data.audit={out}", file=sys.stderr)
    if errors := report["errors"]:
        parts = ", ".join(f"{kind} {count}" for kind, count in errors.items())
        raise UserError(
            f"{report['error_records']} record{'s have' if report['error_records'] > 1 else ' has'} faults ({parts}), listed in {out}: "
            "mend them, or name the classes in data.skip to train without those records"
            + (", or in data.accept to train on them" if any(CLASSES[kind].usable for kind in errors) else "")
        )
    if not report["run"]["records"]:
        empty = [str(one.path) for one in audits[: len(data.parts)] if not len(one.used(policies))]
        raise UserError(f"no record of {' and '.join(empty)} is left to train on: {out} lists why")
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
    """The training files and, if there is another one, the validation file."""
    paths = (*recipe.data.files, recipe.data.validation_path)
    return list(dict.fromkeys(path for path in paths if path))


def audits_of(recipe: Recipe, processor: Any, deep: bool, workers: int | None) -> list[FileAudit]:
    """The audit of each training file and, if there is another one, of the validation file."""
    data = recipe.data
    audits = []
    for path in data_files(recipe):
        name = Path(path).name
        with progress("reading", "MB", 1e6) as advance:
            annotations = open_annotations(Path(path), functools.partial(advance, name))
        if annotations.note:
            print(annotations.note, file=sys.stderr)
        with progress("checking", "records") as advance:
            on = functools.partial(advance, name)
            audits.append(
                audit_file(path, data.image_root, processor, data.max_length, deep, workers, on, annotations)
            )
    return audits


def report_of(recipe: Recipe, audits: Sequence[FileAudit], policies: Policies) -> dict[str, Any]:
    """Counts of faults by class and source, and what the run will take, as JSON-able values."""
    table = by_source(audits)
    validation = audits[len(recipe.data.parts) :]
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
        "run": run_of(recipe, audits[: len(recipe.data.parts)], policies),
        "validation_records": sum(len(audit.used(policies)) for audit in validation) if validation else None,
    }


def run_of(recipe: Recipe, audits: Sequence[FileAudit], policies: Policies) -> dict[str, Any]:
    """Exact counts of the first epoch and of the whole run over the records that can be used.

    Args:
        audits: of the training files, in the recipe's order.
    """
    used = [audit.used(policies) for audit in audits]
    sizes, optim, seed = [len(one) for one in used], recipe.optim, recipe.run.seed
    takes = [
        taken_of(size, part.weight, part.cap) for size, part in zip(sizes, recipe.data.parts, strict=True)
    ]
    if 0 in sizes:
        return {"records": 0, "steps": 0}
    files = [
        {"path": str(audit.path), "records": size, "taken": take}
        for audit, size, take in zip(audits, sizes, takes, strict=True)
    ]
    mixture = Mixture(tuple(sizes), tuple(takes))
    columns = {
        name: np.concatenate(
            [audit.column(name)[one] for audit, one in zip(audits, used, strict=True)]
        ).astype(np.int64)
        for name in ("images", "tokens", "image_tokens", "supervised")
    }
    steps = recipe.run.max_steps or steps_of(optim.epochs, mixture.epoch, optim.batch_size)
    first, times = visits(1, mixture.epoch, mixture, seed), visits(steps, optim.batch_size, mixture, seed)
    return {
        "records": mixture.epoch,
        "files": files,
        **{name: int((column * first).sum()) for name, column in columns.items()},
        "steps": steps,
        "batch_size": optim.batch_size,
        "epochs": steps * optim.batch_size / mixture.epoch,
        "whole_run": {name: int((column * times).sum()) for name, column in columns.items()},
    }
