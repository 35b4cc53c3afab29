"""`grace eval --compare A B`: do two models, asked the same questions, differ?"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grace.errors import UserError
from grace.evaluation import stats
from grace.evaluation.question import Task, Unit
from grace.evaluation.report import percent
from grace.evaluation.store import RESULTS_FILE, read_json, read_samples
from grace.evaluation.tasks import TASKS, mmbench, task_named


def compare(first: Path, second: Path) -> dict[str, Any]:
    """The tasks that both directories have, unit by unit.

    Raises:
        UserError: a directory is no evaluation, they share no task, or they were asked differently.
    """
    results = [_results(path) for path in (first, second)]
    shared = [name for name in TASKS if all(name in result["tasks"] for result in results)]
    if not shared:
        found = "; ".join(
            f"{path}: {', '.join(r['tasks'])}" for path, r in zip((first, second), results, strict=True)
        )
        raise UserError(f"the two share no task ({found}): evaluate both on one")
    return {
        "first": results[0]["model"],
        "second": results[1]["model"],
        "tasks": {
            name: _compared(name, (first, second), [r["tasks"][name] for r in results]) for name in shared
        },
    }


def _results(path: Path) -> dict[str, Any]:
    if not (path / RESULTS_FILE).is_file():
        raise UserError(f"{path} has no {RESULTS_FILE}: give two directories that `grace eval --out` wrote")
    results = read_json(path / RESULTS_FILE)
    if not isinstance(results, dict) or not isinstance(results.get("tasks"), dict) or "model" not in results:
        raise UserError(f"{path / RESULTS_FILE} is not what `grace eval` writes: evaluate again")
    return results


def _compared(name: str, paths: Sequence[Path], entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    if entries[0]["spec_sha256"] != entries[1]["spec_sha256"]:
        raise UserError(
            f"{name} was asked differently in {paths[0]} and {paths[1]} (specs {entries[0]['spec_sha256'][:12]} and "
            f"{entries[1]['spec_sha256'][:12]}): evaluate both with the same settings and version"
        )
    if entries[0]["data"]["sha256"] != entries[1]["data"]["sha256"]:
        raise UserError(
            f"{name} has other questions in {paths[0]} than in {paths[1]}: evaluate both on the same data and --limit"
        )
    task = task_named(name)
    if entries[0]["metric"] != task.primary:
        task = mmbench.VANILLA
    a, b = (_units(task, path, entry) for path, entry in zip(paths, entries, strict=True))
    only_first = sum(x.value > y.value for x, y in zip(a, b, strict=True))
    only_second = sum(x.value < y.value for x, y in zip(a, b, strict=True))
    low, high = stats.difference_interval(a, b) or (None, None)
    return {
        "metric": task.primary,
        "n": len(a),
        "first": stats.mean(a),
        "second": stats.mean(b),
        "difference": stats.mean(b) - stats.mean(a),
        "ci_low": low,
        "ci_high": high,
        "only_first_right": only_first,
        "only_second_right": only_second,
        "mcnemar_p": stats.mcnemar(only_first, only_second),
    }


def _units(task: Task, path: Path, entry: Mapping[str, Any]) -> list[Unit]:
    """The primary metric's units in order of their keys."""
    samples = read_samples(path / f"{task.name}.jsonl")
    units = sorted(task.measure(samples)[task.primary], key=lambda unit: unit.key)
    if len(units) != entry["n"]:
        raise UserError(f"{path / task.name}.jsonl does not fit results.json: run its evaluation to its end")
    return units


def comparison_table(result: Mapping[str, Any]) -> str:
    """Markdown, in percent."""
    rows = []
    for name, task in result["tasks"].items():
        span = "" if task["ci_low"] is None else f"{percent(task['ci_low'])} to {percent(task['ci_high'])}"
        rows.append(
            f"| {name} | {task['metric']} | {percent(task['first'])} | {percent(task['second'])} | {100 * task['difference']:+.1f} | "
            f"{span} | {task['only_first_right']} / {task['only_second_right']} | {task['mcnemar_p']:.3g} | {task['n']} |"
        )
    return (
        "\n".join(
            [
                "| task | metric | A, % | B, % | B - A | 95 % interval | only A / only B right | McNemar p | n |",
                "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
                *rows,
                "",
                f"A: {result['first']['path']} ({result['first']['sha256'][:12]}). B: {result['second']['path']} "
                f"({result['second']['sha256'][:12]}). The interval is a paired bootstrap over groups of questions that share a "
                "picture or a family; McNemar's test is exact and takes questions as independent.",
            ]
        )
        + "\n"
    )
