"""HallusionBench: yes/no questions in which pictures, edited pictures and common knowledge disagree.

Source: Guan et al., arXiv:2310.14566; tianyi-lab/HallusionBench, utils.py (what counts together: `get_eval_all`,
`get_eval_fig`, `get_eval_pair_all`); VLMEvalKit e8e78f0 (prompt of its Qwen3-VL, `YOrN_Extraction`). Ours: no judge model,
as in VLMEvalKit; where neither yes nor no can be read, the answer is wrong, also on a question without a picture, on
which the authors' judge accepts "uncertain".

A row: category (VD, VS), subcategory, visual_input, set_id, figure_id, question_id, gt_answer ("1" is yes), question, and
image or filename. The Hub's `image` split has the 951 questions with a picture, which published scores are about; rows
without one (visual_input 0) are asked without, if a local dataset has them, and count for aAcc and qAcc.

| metric | share of |
| --- | --- |
| aAcc | questions |
| fAcc | pictures, all questions about which are right (category, subcategory, set, figure) |
| qAcc | questions, right on every picture of their set (category, subcategory, set, question) |
"""

from collections.abc import Mapping, Sequence

from grace.evaluation.dataset import Table
from grace.evaluation.fields import Fields, without_marks
from grace.evaluation.question import (
    YES_NO_RULES,
    Decoding,
    Hub,
    Picture,
    Question,
    Sample,
    Task,
    Unit,
    together,
)

PROMPT = "{question} Please answer yes or no."
PLACE = ("category", "subcategory", "set_id")


def questions(table: Table) -> tuple[list[Question], Mapping[str, int]]:
    """One question a row, named as the authors do: VD_chart_0_1_2 is set 0, figure 1, question 2."""
    fields = Fields(table, (*PLACE, "visual_input", "figure_id", "question_id", "gt_answer", "question"))
    column = "image" if fields.has("image") else "filename"
    if not fields.has(column):
        Fields(table, ("image",))
    asked = []
    for row in range(len(fields)):
        picture = None if fields.table.cell(row, column) in (None, "") else Picture(row, column)
        if picture is None and fields.text(row, "visual_input") != "0":
            fields.wrong(row, column, "there is no picture, and visual_input is not 0")
        gold = fields.text(row, "gt_answer")
        if gold not in ("0", "1"):
            fields.wrong(row, "gt_answer", f"expected 0 or 1, found {gold!r}")
        labels = {name: fields.text(row, name) for name in (*PLACE, "figure_id", "question_id")}
        labels["picture"] = "yes" if picture else "no"
        prompt = PROMPT.format(question=without_marks(fields.text(row, "question")))
        asked.append(
            Question(
                "_".join(labels[name] for name in (*PLACE, "figure_id", "question_id")),
                f"<image>\n{prompt}" if picture else prompt,
                (picture,) if picture else (),
                (),
                ("yes" if gold == "1" else "no",),
                _set_of(labels),
                labels,
                "yes_no",
                row,
            )
        )
    fields.unique([question.id for question in asked], range(len(asked)), "question_id")
    return asked, {}


def _set_of(labels: Mapping[str, str]) -> str:
    return "_".join(labels[name] for name in PLACE)


def measure(samples: Sequence[Sample]) -> Mapping[str, list[Unit]]:
    """The three accuracies."""
    seen = [sample for sample in samples if sample.labels["picture"] == "yes"]
    return {
        "aAcc": [Unit(s.id, float(s.correct), s.group, s.labels) for s in samples],
        "fAcc": together(seen, lambda s: f"{_set_of(s.labels)}_{s.labels['figure_id']}"),
        "qAcc": together(samples, lambda s: f"{_set_of(s.labels)}_{s.labels['question_id']}"),
    }


TASK = Task(
    name="hallusionbench",
    title="HallusionBench",
    source="arXiv:2310.14566; VLMEvalKit e8e78f0 HallusionBench",
    hub=Hub("lmms-lab/HallusionBench", "ea5fd49f1b711d12cc8b0ec75be0c0593e17befe", "image"),
    decoding=Decoding(max_new_tokens=128),
    prompts={"question": PROMPT},
    rules=YES_NO_RULES,
    primary="aAcc",
    questions=questions,
    measure=measure,
    breakdown=("category", "subcategory"),
    family=lambda question: _set_of(question.labels),
)
