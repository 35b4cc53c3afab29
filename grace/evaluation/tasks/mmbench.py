"""MMBench, English dev split: perception and reasoning, four options, asked in every rotation of the options.

Source: Liu et al., arXiv:2307.06281 (circular evaluation); lmms_eval/tasks/mmbench at lmms-eval 75571cfe (prompt);
vlmeval/dataset at VLMEvalKit e8e78f0 (`mcq_circular_eval`, `g_index`, pictures that name another row). Ours: letters are
read by `grace.evaluation.extract`; no judge model.

A row: index, question, hint, A, B, C, D, answer, category, image, and with them, as far as published, l2-category (or
L2-category), split, g_index. A row whose index is not below 1,000,000 is a rotation of the row `index % 1,000,000`; a
dataset without any such row is rotated here, in the same numbering.
"""

import dataclasses
from collections.abc import Mapping, Sequence

from grace.evaluation.dataset import Table
from grace.evaluation.fields import LETTERS, Fields, options, without_marks
from grace.evaluation.question import (
    MCQ_RULES,
    Decoding,
    Hub,
    Picture,
    Question,
    Sample,
    Task,
    Unit,
    together,
)

ROTATION = 1_000_000
MOST_OPTIONS = "ABCDE"
LONGEST_INDEX = 20  # digits
REFERENCE = 64  # a shorter text in `image` is the index of the row that holds the picture
PROMPT = "<image>\n{hint}{question} There are several options:\n{options}\n\nAnswer with the option's letter from the given choices directly."


def questions(table: Table) -> tuple[list[Question], Mapping[str, int]]:
    """One question a row; and its rotations, where the table has none."""
    fields = Fields(table, ("index", "question", "A", "B", "answer", "image"))
    index = [_index(fields, row) for row in range(len(fields))]
    fields.unique([str(one) for one in index], range(len(fields)), "index")
    row_of = {one: row for row, one in enumerate(index)}
    rotated = fields.has("g_index") or any(one >= ROTATION for one in index)
    asked = []
    for row in range(len(fields)):
        base = _index(fields, row, "g_index") if fields.has("g_index") else index[row] % ROTATION
        if base not in row_of:
            fields.wrong(row, "index", f"it is a rotation of {base}, which is not there")
        asked += _asked(fields, row, base, _picture(fields, row, row_of), index[row], rotated)
    return asked, {}


def _asked(
    fields: Fields, row: int, base: int, picture: Picture, index: int, rotated: bool
) -> list[Question]:
    """A row's question; with its rotations, unless the dataset brings them."""
    present = [fields.optional(row, mark) for mark in MOST_OPTIONS]
    count = next((i for i, text in enumerate(present) if text is None), len(present))
    choices = [text for text in present[:count] if text is not None]
    if count < 2 or any(text is not None for text in present[count:]):
        fields.wrong(row, MOST_OPTIONS[count], "an option is missing before others")
    gold = LETTERS.index(fields.letter(row, "answer", choices))
    hint = fields.optional(row, "hint")
    labels = {
        "base": str(base),
        "category": fields.optional(row, "category") or "none",
        "l2-category": fields.optional(row, "l2-category") or fields.optional(row, "L2-category") or "none",
    }
    asked = []
    for turn in range(1 if rotated else count):
        turned = choices[turn:] + choices[:turn]
        prompt = PROMPT.format(
            hint=f"{without_marks(hint)} " if hint else "", question=without_marks(fields.text(row, "question")),
            options=without_marks(options(turned)),
        )  # fmt: skip
        right = LETTERS[(gold - turn) % count]
        asked.append(
            Question(str(index + turn * ROTATION), prompt, (picture,), tuple(turned), (right,), labels=labels)
        )
    return asked


def _index(fields: Fields, row: int, name: str = "index") -> int:
    text = fields.text(row, name)
    if not (text.isascii() and text.isdigit() and len(text) < LONGEST_INDEX):
        fields.wrong(row, name, f"expected a whole number, found {text!r}")
    return int(text)


def _picture(fields: Fields, row: int, row_of: Mapping[int, int]) -> Picture:
    """The row's picture, or that of the row which it names."""
    value = fields.table.cell(row, "image")
    if isinstance(value, str) and len(value) <= REFERENCE and value.isascii() and value.isdigit():
        if int(value) not in row_of:
            fields.wrong(row, "image", f"there is no row with index {value}")
        return Picture(row_of[int(value)], "image")
    return Picture(row, "image")


def measure(samples: Sequence[Sample]) -> Mapping[str, list[Unit]]:
    """Circular: right in every rotation. Vanilla: rows as they are, without their rotations."""
    base = [sample for sample in samples if sample.id == sample.labels["base"]]
    return {
        "circular": together(samples, lambda sample: sample.labels["base"]),
        "vanilla": [Unit(s.id, float(s.correct), s.group, s.labels) for s in base],
        "vanilla_all_rotations": [Unit(s.id, float(s.correct), s.group, s.labels) for s in samples],
    }


def vanilla(samples: Sequence[Sample]) -> Mapping[str, list[Unit]]:
    """Rows as they are."""
    return {"vanilla": measure(samples)["vanilla"]}


TASK = Task(
    name="mmbench",
    title="MMBench dev (en)",
    source="arXiv:2307.06281; lmms-eval 75571cfe mmbench_en_dev_static; VLMEvalKit e8e78f0 mcq_circular_eval",
    hub=Hub("lmms-lab/MMBench", "ac155b9c318a37ac5a75267b18cbca12cbcc6bab", "dev", "en"),
    decoding=Decoding(max_new_tokens=128),
    prompts={"question": PROMPT},
    rules=MCQ_RULES,
    primary="circular",
    questions=questions,
    measure=measure,
    breakdown=("l2-category", "category"),
    family=lambda question: question.labels["base"],
)

# For answers that came without those to the rotations.
VANILLA = dataclasses.replace(TASK, primary="vanilla", measure=vanilla)
