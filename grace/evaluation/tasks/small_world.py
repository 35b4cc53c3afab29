"""The small world's own test: the answer must be the reference's text, character by character.

A row is a ShareGPT4V record (id, image, conversations), as `grace data small-world --splits test=N` writes them; its first
question is asked. The id ends in the kind of question.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from grace.evaluation.dataset import Table
from grace.evaluation.fields import Fields
from grace.evaluation.question import EXACT_RULES, Decoding, Picture, Question, Sample, Task, Unit

PROMPT = "{question}"  # brings its own picture mark


def questions(table: Table) -> tuple[list[Question], Mapping[str, int]]:
    """The first question of each record."""
    fields = Fields(table, ("id", "conversations"))
    asked = []
    for row in range(len(fields)):
        name = fields.text(row, "id")
        exchange = fields.value(row, "conversations")
        if not isinstance(exchange, list) or len(exchange) < 2:
            fields.wrong(row, "conversations", "expected a question and an answer")
        question, answer = (
            _said(fields, row, turn, by) for turn, by in zip(exchange, ("human", "gpt"), strict=False)
        )
        pictures = () if fields.optional(row, "image") is None else (Picture(row, "image"),)
        if question.count("<image>") != len(pictures):
            fields.wrong(row, "conversations", f"expected {len(pictures)} <image> in the first question")
        labels = {"kind": name.rpartition("-")[2]}
        asked.append(Question(name, question, pictures, (), (answer,), name, labels, "exact"))
    fields.unique([question.id for question in asked], range(len(asked)), "id")
    return asked, {}


def _said(fields: Fields, row: int, turn: Any, by: str) -> str:
    value = turn.get("value") if isinstance(turn, dict) else None
    if not isinstance(value, str) or turn.get("from") != by:
        fields.wrong(row, "conversations", f'expected {{"from": "{by}", "value": ...}}')
    return value


def measure(samples: Sequence[Sample]) -> Mapping[str, list[Unit]]:
    """Share of answers that are right to the letter."""
    return {"exact_match": [Unit(s.id, float(s.correct), s.group, s.labels) for s in samples]}


TASK = Task(
    name="small_world",
    title="the small world, test",
    source="grace data small-world",
    hub=None,
    decoding=Decoding(max_new_tokens=64, min_pixels=None, max_pixels=None),
    prompts={"question": PROMPT},
    rules=EXACT_RULES,
    primary="exact_match",
    questions=questions,
    measure=measure,
    breakdown=("kind",),
)
