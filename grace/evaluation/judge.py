"""From what a model said to a judged sample, and from all samples of a task to its scores."""

from collections.abc import Mapping, Sequence
from typing import Any

from grace.evaluation import extract, open_answer, stats
from grace.evaluation.question import Question, Sample, Task, Unit


def judged(question: Question, output: str, pictures: Sequence[str]) -> Sample:
    """The sample that an output makes; an answer that cannot be read is wrong.

    Args:
        pictures: a digest of each of the question's.
    """
    extracted, correct = read(question, output)
    first = pictures[0] if pictures else question.id
    return Sample(
        question.id,
        question.prompt_sha256,
        output,
        extracted,
        " | ".join(question.gold),
        correct,
        first if question.group is None else question.group,
        question.labels,
        " ".join(pictures),
    )


def read(question: Question, output: str) -> tuple[str | None, bool]:
    """What is read from an output, and whether it is right."""
    if question.kind == "open":
        found = open_answer.candidates(extract.plain(output))
        gold = (*question.gold, *map(extract.plain, question.gold))  # as the output is written, too
        return " | ".join(map(str, found)) or None, open_answer.matches(found, gold)
    if question.kind == "exact":
        found = output.strip() or None
    elif question.kind == "yes_no":
        found = extract.yes_no(output)
    else:
        found = extract.letter(output, question.choices)
    return found, found in question.gold


def scores(task: Task, samples: Sequence[Sample]) -> dict[str, Any]:
    """All that is said of a task: `metric`, `score`, `ci_low`, `ci_high`, `n` of the primary metric; the others; its parts.

    Scores are shares from 0 to 1; the interval is None where all questions belong to one group.
    """
    metrics = {name: _described(units) for name, units in task.measure(samples).items()}
    primary = task.measure(samples)[task.primary]
    return {
        "metric": task.primary,
        **metrics[task.primary],
        "metrics": metrics,
        "breakdown": {label: _broken_down(primary, label) for label in task.breakdown},
        "unextractable": sum(sample.extracted is None for sample in samples),
        "questions": len(samples),
    }


def _described(units: Sequence[Unit]) -> dict[str, Any]:
    """Score, interval and number of one metric; a metric without units is not known."""
    if not units:
        return {"score": None, "ci_low": None, "ci_high": None, "n": 0}
    low, high = stats.interval(units) or (None, None)
    return {"score": stats.mean(units), "ci_low": low, "ci_high": high, "n": len(units)}


def _broken_down(units: Sequence[Unit], label: str) -> Mapping[str, Any]:
    parts: dict[str, list[Unit]] = {}
    for unit in units:
        parts.setdefault(unit.labels[label], []).append(unit)
    return {name: {"score": stats.mean(part), "n": len(part)} for name, part in sorted(parts.items())}
