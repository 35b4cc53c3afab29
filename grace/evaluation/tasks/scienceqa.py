"""ScienceQA-IMG, test split: school science, the 2,017 questions that come with a picture.

Source: Lu et al., arXiv:2209.09513; lmms_eval/tasks/scienceqa at lmms-eval 75571cfe (prompt, 16 tokens). Ours: letters are
read by `grace.evaluation.extract`. The lecture is not shown, as there.

A row: question, choices (a list), answer (a number from 0), hint, image, and with them, as far as published, lecture,
subject, topic. Rows without a picture (of ScienceQA-FULL) are left out.
"""

from collections.abc import Mapping

from grace.evaluation.dataset import Table
from grace.evaluation.fields import Fields, options, without_marks
from grace.evaluation.question import MCQ_RULES, Decoding, Hub, Picture, Question, Task, accuracy

PROMPT = "<image>\n{context}{question}\n{options}\nAnswer with the option's letter from the given choices directly."
CONTEXT = "Context: {hint}\n"


def questions(table: Table) -> tuple[list[Question], Mapping[str, int]]:
    """The questions with a picture; a question's id is its row, as the dataset gives none."""
    fields = Fields(table, ("question", "choices", "answer", "hint", "image"))
    asked, left_out = [], 0
    for row in range(len(fields)):
        if fields.table.cell(row, "image") in (None, ""):
            left_out += 1
            continue
        choices = fields.texts(row, "choices")
        hint = fields.optional(row, "hint")
        prompt = PROMPT.format(
            context=CONTEXT.format(hint=without_marks(hint)) if hint else "",
            question=without_marks(fields.text(row, "question")), options=without_marks(options(choices)),
        )  # fmt: skip
        gold = fields.letter(row, "answer", choices, index=True)
        labels = {"subject": fields.optional(row, "subject") or "none"}
        asked.append(
            Question(str(row), prompt, (Picture(row, "image"),), tuple(choices), (gold,), labels=labels)
        )
    return asked, {"without a picture": left_out} if left_out else {}


TASK = Task(
    name="scienceqa",
    title="ScienceQA-IMG test",
    source="arXiv:2209.09513; lmms-eval 75571cfe scienceqa_img",
    hub=Hub("lmms-lab/ScienceQA", "69dd4d6b67373d38f96a5badd5d24d0eb5bcdc50", "test", "ScienceQA-IMG"),
    decoding=Decoding(max_new_tokens=16),
    prompts={"question": PROMPT, "context": CONTEXT},
    rules=MCQ_RULES,
    primary="accuracy",
    questions=questions,
    measure=accuracy,
    breakdown=("subject",),
)
