"""MMStar: 1,500 questions that cannot be answered without the picture, in six categories of 250.

Source: Chen et al., arXiv:2403.20330; lmms_eval/tasks/mmstar at lmms-eval 75571cfe (prompt, without a full stop as there).
Ours: letters are read by `grace.evaluation.extract`; the score is the share of right answers, as in VLMEvalKit, which is also
the mean over the six categories, and not the mean over their 18 parts.

A row: index, question (its options written into it: "Options: A: a cat, B: a dog, ..."), image, answer, category, l2_category.
"""

import re
from collections.abc import Mapping

from grace.evaluation.dataset import Table
from grace.evaluation.fields import Fields, without_marks
from grace.evaluation.question import MCQ_RULES, Decoding, Hub, Picture, Question, Task, accuracy

PROMPT = "<image>\n{question}\nAnswer with the option's letter from the given choices directly"
LETTERS = "ABCD"
_OPTIONS = re.compile(r"\b(?:Options|Choices)\s*:", re.IGNORECASE)
_MARK = re.compile(r"(?:^|(?<=[\s,;(]))\(?([A-D])\s*[:.)]\s*")


def questions(table: Table) -> tuple[list[Question], Mapping[str, int]]:
    """One question a row."""
    fields = Fields(table, ("index", "question", "image", "answer", "category", "l2_category"))
    asked = []
    for row in range(len(fields)):
        text = without_marks(fields.text(row, "question")).strip()
        choices = choices_in(text)
        labels = {name: fields.text(row, name) for name in ("category", "l2_category")}
        asked.append(
            Question(
                fields.text(row, "index"),
                PROMPT.format(question=text),
                (Picture(row, "image"),),
                choices,
                (fields.letter(row, "answer", choices),),
                labels=labels,
            )
        )
    fields.unique([question.id for question in asked], range(len(asked)), "index")
    return asked, {}


def choices_in(question: str) -> tuple[str, ...]:
    """Texts of the options A to D in a question; empty where they cannot be told, for then only letters count."""
    start = list(_OPTIONS.finditer(question))
    text = question[start[-1].end() :] if start else question
    marks = list(_MARK.finditer(text))
    if "".join(match[1] for match in marks) not in (LETTERS, LETTERS[:3], LETTERS[:2]):
        return ("",) * len(LETTERS)
    ends = [match.start() for match in marks[1:]] + [len(text)]
    texts = [
        text[match.end() : end].strip().rstrip(",;.").strip() for match, end in zip(marks, ends, strict=True)
    ]
    return tuple(texts) + ("",) * (len(LETTERS) - len(texts))


TASK = Task(
    name="mmstar",
    title="MMStar",
    source="arXiv:2403.20330; lmms-eval 75571cfe mmstar",
    hub=Hub("Lin-Chen/MMStar", "bc98d668301da7b14f648724866e57302778ab27", "val"),
    decoding=Decoding(max_new_tokens=128),
    prompts={"question": PROMPT},
    rules=MCQ_RULES,
    primary="accuracy",
    questions=questions,
    measure=accuracy,
    breakdown=("category", "l2_category"),
)
