"""`grace eval DIR --tasks ...`, `grace eval --predictions FILE --tasks ...` and `grace eval --compare A B`."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grace.errors import UserError
from grace.evaluation.answers import Answerer, FileAnswerer, ModelAnswerer
from grace.evaluation.compare import compare, comparison_table
from grace.evaluation.harness import (
    Asked,
    about_harness,
    data_paths,
    entry,
    judge_given,
    prepare,
    run_task,
)
from grace.evaluation.question import Sample, Task
from grace.evaluation.report import merged, table
from grace.evaluation.store import RESULTS_FILE, RUN_FILE, TABLE_FILE, claim, read_json, replace_answers
from grace.evaluation.tasks import TASKS, task_named
from grace.files import locked, write_text
from grace.progress import progress


def run_eval(args: argparse.Namespace) -> int:
    """Evaluates, or compares; the table, or with `--json` the results, on stdout."""
    _check(args)
    if args.compare:
        result = compare(*args.compare)
        print(json.dumps(result) if args.json else comparison_table(result), end="\n" if args.json else "")
        return 0
    tasks = [_task(name, args) for name in dict.fromkeys(",".join(args.tasks).split(","))]
    paths = data_paths(args.data)
    out = args.out or Path("runs/eval") / _name(args.predictions or args.directory)
    with locked(out, "--out"):
        ready = [prepare(task, paths, args.data_root, args.limit, out) for task in tasks]
        if args.predictions:
            _require_no_model(out)
            results = score_answers(ready, FileAnswerer(args.predictions), out)
        else:
            answerer = ModelAnswerer(args.directory, args.kernel, args.batch_size)
            results = evaluate(ready, answerer, out, args.batch_size)
    print(json.dumps(results) if args.json else table(results), end="\n" if args.json else "")
    print(out / RESULTS_FILE, file=sys.stderr)
    return 0


def evaluate(ready: Sequence[Asked], answerer: Answerer, out: Path, batch_size: int) -> dict[str, Any]:
    """Runs tasks one after the other; results are written after each.

    Raises:
        UserError: pictures or the directory are unusable.
    """
    results: dict[str, Any] = {}
    with progress("eval", "questions") as advance:
        for asked in ready:
            answerer.begin(asked.task)
            claim(out, answerer.about, [asked.task])
            one = run_task(asked, answerer, out, batch_size, advance)
            results = _written(out, answerer, {asked.task.name: one})
    return results


def score_answers(ready: Sequence[Asked], answerer: FileAnswerer, out: Path) -> dict[str, Any]:
    """Judges a file's answers to all tasks, and only when all of them can be puts them in the place of earlier ones.

    Raises:
        UserError: pictures, answers or the directory are unusable; then everything is as it was.
    """
    answers: dict[str, tuple[Asked, list[Sample]]] = {}
    with progress("eval", "questions") as advance:
        for asked in ready:
            answerer.begin(asked.task)
            asked = _with_answers(asked, answerer)
            answers[asked.task.name] = asked, judge_given(asked, answerer, advance)
    before = _results(out)
    replace_answers(out, answerer.about, [(asked.task, samples) for asked, samples in answers.values()])
    entries = {name: entry(asked, samples) for name, (asked, samples) in answers.items()}
    return _written(out, answerer, entries, before)


def _results(out: Path) -> dict[str, Any] | None:
    return read_json(out / RESULTS_FILE) if (out / RESULTS_FILE).exists() else None


def _written(
    out: Path, answerer: Answerer, tasks: dict[str, Any], before: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The results, these tasks' and earlier ones', which are on disk when this returns."""
    results = merged(before or _results(out), answerer.about, about_harness(), tasks)
    write_text(out / RESULTS_FILE, json.dumps(results, indent=1) + "\n")
    write_text(out / TABLE_FILE, table(results))
    return results


def _with_answers(asked: Asked, answerer: FileAnswerer) -> Asked:
    """The questions that the file answers; of MMBench perhaps without rotations, which is said."""
    task, questions = answerer.fitting(asked.task, asked.questions)
    if task.primary != asked.task.primary:
        print(f"{task.name}: no answers to rotations, so only {task.primary} is scored", file=sys.stderr)
    return dataclasses.replace(asked, task=task, questions=questions)


def _check(args: argparse.Namespace) -> None:
    if args.compare:
        if args.directory or args.predictions or args.tasks:
            raise UserError("--compare takes two directories of results and no model: leave out the rest")
        return
    if bool(args.directory) == bool(args.predictions):
        raise UserError("give a model directory, or --predictions FILE, or --compare A B")
    if not args.tasks:
        raise UserError(f"give --tasks, one or several of: {', '.join(TASKS)}")


def _task(name: str, args: argparse.Namespace) -> Task:
    """A task, with what the command line changes about how it is asked."""
    task = task_named(name)
    changes = {
        field: getattr(args, field)
        for field in ("max_new_tokens", "min_pixels", "max_pixels")
        if getattr(args, field) is not None
    }
    return dataclasses.replace(task, decoding=dataclasses.replace(task.decoding, **changes))


def _name(path: Path) -> str:
    """What to call the results of a model; of a run's model/ the run's name."""
    path = path.resolve()
    return path.parent.name if path.name == "model" else path.stem if path.is_file() else path.name


def _require_no_model(out: Path) -> None:
    """Answers from a file are read anew each time; those of a model are kept.

    Raises:
        UserError: the directory holds a model's.
    """
    kind = ((read_json(out / RUN_FILE) if (out / RUN_FILE).exists() else {}).get("model") or {}).get("kind")
    if kind not in (None, "predictions"):
        raise UserError(f"{out} holds answers of a {kind} model: choose another --out")
