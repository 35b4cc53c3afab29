"""Results for programs (`results.json`) and for people (`results.md`)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grace.evaluation.store import identity
from grace.evaluation.tasks import TASKS, task_named


def merged(
    before: Mapping[str, Any] | None,
    model: Mapping[str, Any],
    harness: Mapping[str, Any],
    tasks: Mapping[str, Any],
) -> dict[str, Any]:
    """The results with those tasks of an earlier call that this one did not run; all of one model."""
    earlier = dict(before["tasks"]) if before and identity(before["model"]) == identity(model) else {}
    both = {**earlier, **tasks}
    names = [name for name in TASKS if name in both]
    limits = {both[name]["data"]["limit"] for name in names}
    limit = f" --limit {limits.pop()}" if len(limits) == 1 and limits != {None} else ""
    return {
        "harness": dict(harness),
        "model": dict(model),
        "command": f"grace eval {Path(model['path']).name} --tasks {' '.join(names)}{limit}",
        "tasks": {name: both[name] for name in names},
    }


def table(results: Mapping[str, Any]) -> str:
    """The scores in percent, as Markdown; then what they are of."""
    rows = []
    for name, task in results["tasks"].items():
        for metric, value in task["metrics"].items():
            primary = metric == task["metric"]
            first = f"{name} ({task['title']})" if primary else ""
            unread = str(task["unextractable"]) if primary else ""
            rows.append(
                f"| {first} | {metric} | {percent(value['score'])} | {_span(value)} | {value['n']} | {unread} |"
            )
    model, harness = results["model"], results["harness"]
    limited = [name for name, task in results["tasks"].items() if task["data"]["limit"] is not None]
    lines = [
        "| task | metric | score, % | 95 % interval | n | unread |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
        *rows,
        "",
        f"{model['path']} ({model['kind']}, {model['sha256'][:12]}), {harness['name']} {harness['version']} of grace "
        f"{harness['grace']}. Unread: answers in which no option can be read; they count as wrong, nothing is guessed. "
        "Intervals: bootstrap over groups of questions that share a picture or a family.",
    ]
    if limited:
        lines.append(f"Only the first questions were asked (--limit): {', '.join(limited)}.")
    changed = [
        name
        for name, task in results["tasks"].items()
        if task["spec"]["decoding"] != task_named(name).spec()["decoding"]
    ]
    if changed:
        lines.append(f"Not with the task's own length of answers or pixel budget: {', '.join(changed)}.")
    specs = ", ".join(f"{name} {task['spec_sha256'][:12]}" for name, task in results["tasks"].items())
    lines.append(f"Specs (prompt, pixels, decoding, extraction): {specs}.")
    return "\n".join(lines) + "\n"


def percent(score: float | None) -> str:
    """A share in percent, with one decimal."""
    return "not known" if score is None else f"{100 * score:.1f}"


def _span(value: Mapping[str, Any]) -> str:
    return "" if value["ci_low"] is None else f"{percent(value['ci_low'])} - {percent(value['ci_high'])}"
