"""The tables of a model card: scores, training metrics, the parity gate's figures.

Nothing here depends on the time or place of the export.
"""

from collections.abc import Mapping
from typing import Any

Rows = list[tuple[str, Any]]


def metrics(recorded: Any, results: Mapping[str, Any] | None) -> str:
    """What training measured, and benchmark scores; both may be absent."""
    parts = ["## Metrics"]
    if results is not None:
        parts.append(scores(results))
    if isinstance(recorded, Mapping) and recorded:
        made = "On the validation data, at the end of training, by `grace train` with the recipe above."
        rows: Rows = [(name, _number(value)) for name, value in sorted(recorded.items())]
        parts.append(f"{made}\n\n{table(('metric', 'value'), rows)}")
    if len(parts) == 1:
        parts.append("None were recorded.")
    return "\n\n".join(parts)


def scores(results: Mapping[str, Any]) -> str:
    """Benchmark scores with their 95 % intervals, and the command that made them."""
    lines = ["| task | metric | score | 95 % interval | questions |", "| --- | --- | ---: | ---: | ---: |"]
    for name, task in sorted(results["tasks"].items()):
        low, high = task.get("ci_low"), task.get("ci_high")
        interval = "" if low is None or high is None else f"{_number(low)} to {_number(high)}"
        lines.append(
            f"| {name} | {task.get('metric', '')} | {_number(task['score'])} | {interval} | {task.get('n', '')} |"
        )
    command = (
        results.get("command") or f"grace eval DIR --tasks {','.join(sorted(results['tasks']))} --out RESULTS"
    )
    harness = f" ({_harness(results['harness'])})" if results.get("harness") else ""
    return f"Measured by `{command}`{harness}:\n\n" + "\n".join(lines)


def _harness(value: Any) -> str:
    return " ".join(map(str, value.values())) if isinstance(value, Mapping) else str(value)


def parity_table(figures: Mapping[str, Any]) -> str:
    """The gate's figures as a table."""
    rounded = figures.get("scale_rounding")
    rows: Rows = [("codes and scales equal to those of the source", "bit for bit")]
    if rounded:
        largest = f"{rounded['largest_relative']:.1e}"
        rows = [
            ("codes equal to those of the source", "bit for bit"),
            ("float32 scales, to the nearest that the format has", f"within {largest} of themselves"),
        ]
    if rounded and "logits_relative" in rounded:
        rows.append(
            ("which moves logits, largest difference / largest logit", f"{rounded['logits_relative']:.1e}")
        )
    if figures.get("dense_identical"):
        rows.append(("dense tensors equal to those of the source", "bit for bit"))
    if "exact" in figures:
        exact, fp32 = figures["exact"], figures["exact_greedy"]
        rows += [
            ("positions compared", f"{figures['positions']} in {figures['records']} records"),
            ("fp32 logits, largest difference / largest logit", f"{exact['relative']:.1e}"),
            ("fp32 greedy answers identical", f"{fp32['identical']} of {fp32['records']}"),
        ]
    if "deployed" in figures:
        deployed, greedy = figures["deployed"], figures["greedy"]
        gaps = [item["gap"] for item in deployed["top1_differences"] + greedy["parted"]]
        rows += [
            ("bfloat16 logits, largest difference", f"{deployed['max_abs']:.3g}"),
            ("bfloat16 logits, mean difference", f"{deployed['mean_abs']:.3g}"),
            ("tolerance (4x the effect of bfloat16 itself)", f"{deployed['tolerance']:.3g}"),
            ("KL divergence, mean / max, nats", f"{deployed['kl_mean']:.1e} / {deployed['kl_max']:.1e}"),
            ("same best token", f"{deployed['top1_agreement']:.2%}"),
            ("bfloat16 greedy answers identical", f"{greedy['identical']} of {greedy['records']}"),
            ("largest logit gap where tokens differ", f"{max(gaps):.3g}" if gaps else "they do not"),
        ]
    said = "Checked by the export on its own files before they were published; `grace_export.json` has the figures."
    return f"## Parity with the source\n\n{said}\n\n{table(('figure', 'value'), rows)}"


def bullets(title: str, facts: Rows) -> str:
    return "\n".join([title, "", *(f"- {name}: {value}" for name, value in facts)])


def table(head: tuple[str, str], rows: Rows) -> str:
    lines = [f"| {name} | {value} |" for name, value in rows]
    return "\n".join([f"| {head[0]} | {head[1]} |", "| --- | --- |", *lines])


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
