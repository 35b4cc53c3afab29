"""AI2D, test split: 3,088 questions about school-book diagrams.

Source: Kembhavi et al., arXiv:1603.07396; lmms_eval/tasks/ai2d at lmms-eval 75571cfe (prompt, 16 tokens). Ours: letters are
read by `grace.evaluation.extract`.

A row: question, options (a list), answer (a number from 0, as text), image.
"""

from collections.abc import Mapping

from grace.evaluation.dataset import Table
from grace.evaluation.fields import Fields, options, without_marks
from grace.evaluation.question import MCQ_RULES, Decoding, Hub, Picture, Question, Task, accuracy

PROMPT = "<image>\n{question}\n{options}\nAnswer with the option's letter from the given choices directly."


def questions(table: Table) -> tuple[list[Question], Mapping[str, int]]:
    """One question a row; its id is the row, as the dataset gives none."""
    fields = Fields(table, ("question", "options", "answer", "image"))
    asked = []
    for row in range(len(fields)):
        choices = fields.texts(row, "options")
        prompt = PROMPT.format(
            question=without_marks(fields.text(row, "question")), options=without_marks(options(choices))
        )
        gold = fields.letter(row, "answer", choices, index=True)
        asked.append(Question(str(row), prompt, (Picture(row, "image"),), tuple(choices), (gold,)))
    return asked, {}


TASK = Task(
    name="ai2d",
    title="AI2D test",
    source="arXiv:1603.07396; lmms-eval 75571cfe ai2d",
    hub=Hub("lmms-lab/ai2d", "c83a9b9692933aff8349157c88a413df9d02c4e5", "test"),
    decoding=Decoding(max_new_tokens=16),
    prompts={"question": PROMPT},
    rules=MCQ_RULES,
    primary="accuracy",
    questions=questions,
    measure=accuracy,
)
