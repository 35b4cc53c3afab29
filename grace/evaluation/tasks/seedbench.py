"""SEED-Bench, the questions about single pictures (14,232 in nine dimensions).

Source: Li et al., arXiv:2307.16125; lmms_eval/tasks/seedbench at lmms-eval 75571cfe (prompt, `seed_image`). Ours: letters
are read by `grace.evaluation.extract`, not off the first character; the length of an answer is limited.

A row: question, choice_a .. choice_d, answer, question_type_id, data_type, image (a list, or one picture), and with them, as
far as published, question_id and data_id. Rows of another `data_type` than "image" are left out.
"""

from collections.abc import Mapping

from grace.evaluation.dataset import Table
from grace.evaluation.fields import Fields, options, without_marks
from grace.evaluation.question import MCQ_RULES, Decoding, Hub, Picture, Question, Task, accuracy

PROMPT = "<image>\n{question}\n{options}\nAnswer with the option's letter from the given choices directly."
CHOICES = ("choice_a", "choice_b", "choice_c", "choice_d")
DIMENSIONS = {
    "1": "scene understanding", "2": "instance identity", "3": "instance attributes", "4": "instance location",
    "5": "instances counting", "6": "spatial relation", "7": "instance interaction", "8": "visual reasoning",
    "9": "text understanding",
}  # fmt: skip


def questions(table: Table) -> tuple[list[Question], Mapping[str, int]]:
    """The questions about pictures."""
    fields = Fields(table, ("question", *CHOICES, "answer", "question_type_id", "data_type", "image"))
    rows = [row for row in range(len(fields)) if fields.text(row, "data_type") == "image"]
    # Of all rows alike, so one tells: reading every picture for it would take longer than all the rest.
    place = 0 if rows and isinstance(fields.table.cell(rows[0], "image"), list) else None
    asked = []
    for row in rows:
        choices = [fields.text(row, name) for name in CHOICES]
        kind = fields.text(row, "question_type_id")
        prompt = PROMPT.format(
            question=without_marks(fields.text(row, "question")), options=without_marks(options(choices))
        )
        asked.append(
            Question(
                fields.optional(row, "question_id") or str(row),
                prompt,
                (Picture(row, "image", place),),
                tuple(choices),
                (fields.letter(row, "answer", choices),),
                labels={"dimension": DIMENSIONS.get(kind, kind)},
            )
        )
    fields.unique([question.id for question in asked], rows, "question_id")
    left_out = len(fields) - len(rows)
    return asked, {"not about a picture": left_out} if left_out else {}


TASK = Task(
    name="seedbench",
    title="SEED-Bench (image)",
    source="arXiv:2307.16125; lmms-eval 75571cfe seedbench, seed_image",
    hub=Hub("lmms-lab/SEED-Bench", "92acad169cd5ffa23a1db506b3ef235330112b96", "test"),
    decoding=Decoding(max_new_tokens=128),
    prompts={"question": PROMPT},
    rules=MCQ_RULES,
    primary="accuracy",
    questions=questions,
    measure=accuracy,
    breakdown=("dimension",),
)
