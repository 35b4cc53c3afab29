"""MMMU, validation split: 900 college questions in 30 subjects, some about several pictures, some without options.

Source: Yue et al., arXiv:2311.16502; MMMU-Benchmark/MMMU at bb0b95a (open answers, accuracy over all questions);
lmms_eval/tasks/mmmu at lmms-eval 75571cfe (prompt, 128 tokens, pictures where the text names them). Ours: letters are read
by `grace.evaluation.extract`, and no letter is drawn at random where none can be read, as both of them do.

A row: id (validation_SUBJECT_NUMBER), question with <image 1> .. <image 7>, options (a text that spells a list), answer,
question_type (multiple-choice, open), image_1 .. image_7. A picture stands where it is first named; where the same one is
named again, its name stays as text.
"""

import re
from collections.abc import Mapping

from grace.evaluation.dataset import Table
from grace.evaluation.fields import Fields, options, without_marks
from grace.evaluation.question import MCQ_RULES, OPEN_RULES, Decoding, Hub, Picture, Question, Task, accuracy

CHOICE = "{question}\n{options}\n\nAnswer with the option's letter from the given choices directly."
OPEN = "{question}\n\nAnswer the question using a single word or phrase."
_ID = re.compile(r"(?:dev|validation|test)_(.+)_\d+")
_NAMED = re.compile(r"<image (\d+)>")


def questions(table: Table) -> tuple[list[Question], Mapping[str, int]]:
    """One question a row."""
    fields = Fields(table, ("id", "question", "options", "answer", "question_type", "image_1"))
    asked = [_asked(fields, row) for row in range(len(fields))]
    fields.unique([question.id for question in asked], range(len(asked)), "id")
    return asked, {}


def _asked(fields: Fields, row: int) -> Question:
    name = fields.text(row, "id")
    subject = _ID.fullmatch(name)
    if subject is None:
        fields.wrong(row, "id", f"expected validation_SUBJECT_NUMBER, found {name!r}")
    kind = fields.text(row, "question_type")
    if kind not in ("multiple-choice", "open"):
        fields.wrong(row, "question_type", f"expected multiple-choice or open, found {kind!r}")
    question = without_marks(fields.text(row, "question"))
    choices: list[str] = []
    if kind == "multiple-choice":
        choices = fields.texts(row, "options")
        gold = (fields.letter(row, "answer", choices),)
        text = CHOICE.format(question=question, options=without_marks(options(choices)))
    else:
        answer = fields.text(row, "answer")  # several right ones are spelled as a list
        gold = tuple(fields.texts(row, "answer")) if answer.startswith("[") else (answer,)
        text = OPEN.format(question=question)
    text, pictures = _with_pictures(fields, row, text)
    read = "letter" if choices else "open"
    return Question(
        name,
        text,
        pictures,
        tuple(choices),
        gold,
        labels={"subject": subject[1], "type": kind},
        kind=read,
        row=row,
    )


def _with_pictures(fields: Fields, row: int, text: str) -> tuple[str, tuple[Picture, ...]]:
    """The text with marks where pictures are first named, and those pictures; one that is not named comes first."""
    pictures: list[Picture] = []

    def mark(match: re.Match[str]) -> str:
        column = f"image_{match[1]}"
        if any(picture.column == column for picture in pictures):
            return match[0]
        if not fields.has(column) or fields.table.cell(row, column) in (None, ""):
            fields.wrong(row, column, f"the question names {match[0]}, and it is not there")
        pictures.append(Picture(row, column))
        return "<image>"

    text = _NAMED.sub(mark, text)
    if not pictures and fields.table.cell(row, "image_1") not in (None, ""):
        return f"<image>\n{text}", (Picture(row, "image_1"),)
    return text, tuple(pictures)


TASK = Task(
    name="mmmu",
    title="MMMU validation",
    source="arXiv:2311.16502; MMMU-Benchmark/MMMU bb0b95a; lmms-eval 75571cfe mmmu_val",
    hub=Hub("lmms-lab/MMMU", "364f2e2eb107b36e07ff4c5a15f5947a759cef47", "validation"),
    decoding=Decoding(max_new_tokens=128),
    prompts={"multiple-choice": CHOICE, "open": OPEN},
    rules=f"{MCQ_RULES}, {OPEN_RULES}",
    primary="accuracy",
    questions=questions,
    measure=accuracy,
    breakdown=("subject", "type"),
)
