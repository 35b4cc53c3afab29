"""Questions about a scene of the small world, with fixed wordings and fixed forms of answer.

For every kind, all questions a scene allows are listed with their results; the *result* is drawn
first, uniformly over those possible, then a question that has it. So no result is common. Answers
that follow from something say it first: "red 3 5: 2", "7 and 3: yes", "middle right: 7", "3 plus 9 is 12".
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from grace.data.records import Record
from grace.data.scenes import CELLS, COLOUR_NAMES, EMPTY, Scene, random_scene

KINDS = ("read", "colour", "count", "compare", "position", "sum", "describe", "list")
SHORT_KINDS, LONG_KINDS = KINDS[:6], KINDS[6:]
RESULTS: dict[str, tuple[str, ...]] = {
    "read": tuple(str(digit) for digit in range(10)),
    "colour": COLOUR_NAMES,
    "count": tuple(str(count) for count in range(5)),
    "compare": ("yes", "no"),
    "position": tuple(str(digit) for digit in range(10)),
    "sum": tuple(str(total) for total in range(19)),
}
WORDINGS: dict[str, tuple[str, ...]] = {
    "read": ("What is the digit at the {}?", "Which digit is in the {} cell?"),
    "colour": ("What colour is the digit at the {}?", "Which colour does the {} digit have?"),
    "count": ("How many {} digits are there?", "What is the number of {} digits?"),
    "compare": (
        "Is the digit at the {} greater than the digit at the {}?",
        "Is the {} digit larger than the {} digit?",
    ),
    "position": ("What is {} the {} cell?", "Which digit is {} the {} digit?"),
    "sum": ("What is the sum of the digits at the {} and the {}?", "What do the {} and {} digits add up to?"),
    "describe": ("Describe the picture.", "List all cells row by row."),
    "list": ("List the digits by colour.",),
}
# Each relation and its step in (rows, columns).
RELATIONS = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}
PLUS = "What is {} plus {}?"
GREATER = "Which is greater, {} or {}?"


def possible(kind: str, scene: Scene) -> list[tuple[tuple[str, ...], str]]:
    """Every question of a kind that the scene allows: what to fill into the wording, and the result."""
    digits, colours, cells = scene.digits, scene.colours, scene.occupied
    counts = Counter(colours)
    if kind == "read":
        return [((CELLS[cell],), str(digits[cell])) for cell in cells]
    if kind == "colour":
        return [((CELLS[cell],), COLOUR_NAMES[colours[cell]]) for cell in cells]
    if kind == "count":
        numbers = [((name,), str(counts[i])) for i, name in enumerate(COLOUR_NAMES)]
        return [(filling, number) for filling, number in numbers if number in RESULTS["count"]]
    if kind == "position":
        places = [(relation, cell, neighbour(cell, relation)) for relation in RELATIONS for cell in cells]
        return [
            ((relation, CELLS[cell]), str(digits[other]))
            for relation, cell, other in places
            if other in cells
        ]
    if kind in LONG_KINDS:
        return [((), "")]
    pairs = [(a, b) for a in cells for b in cells if a != b]
    if kind == "compare":
        return [
            ((CELLS[a], CELLS[b]), "yes" if digits[a] > digits[b] else "no")
            for a, b in pairs
            if digits[a] != digits[b]
        ]
    return [((CELLS[a], CELLS[b]), str(digits[a] + digits[b])) for a, b in pairs]


def answer_text(kind: str, scene: Scene, filling: tuple[str, ...], result: str) -> str:
    """The answer in the form of its kind."""
    if kind == "describe":
        return describe(scene)
    if kind == "list":
        return "; ".join(_of_colour(scene, name) for name in COLOUR_NAMES)
    if kind == "count":
        return f"{_of_colour(scene, filling[0])}: {result}"
    if kind == "compare":
        first, second = (scene.digits[CELLS.index(name)] for name in filling)
        return f"{first} and {second}: {result}"
    if kind == "position":
        other = neighbour(CELLS.index(filling[1]), filling[0])
        assert other is not None
        return f"{CELLS[other]}: {result}"
    if kind == "sum":
        first, second = (scene.digits[CELLS.index(name)] for name in filling)
        return f"{first} plus {second} is {result}"
    return result


def neighbour(cell: int, relation: str) -> int | None:
    """The cell that lies `relation` of `cell` in a 3 x 3 scene, or None."""
    down, right = RELATIONS[relation]
    row, column = cell // 3 + down, cell % 3 + right
    return row * 3 + column if row in range(3) and column in range(3) else None


def describe(scene: Scene) -> str:
    """All cells row by row: "red 3 none blue 7; none ...", or "red 3" for a close-up."""
    names = [
        "none" if digit == EMPTY else f"{COLOUR_NAMES[colour]} {digit}"
        for colour, digit in zip(scene.colours, scene.digits, strict=True)
    ]
    return "; ".join(" ".join(names[row : row + scene.grid]) for row in range(0, len(names), scene.grid))


def _of_colour(scene: Scene, name: str) -> str:
    """The digits of one colour in reading order: "red 3 5", or "red none"."""
    cells = [cell for cell in scene.occupied if COLOUR_NAMES[scene.colours[cell]] == name]
    return " ".join([name, *(str(scene.digits[cell]) for cell in cells)]) if cells else f"{name} none"


@dataclass(frozen=True)
class Asked:
    """A question with its answer; `result` is the part of the answer that was drawn."""

    kind: str
    question: str
    answer: str
    result: str
    filling: tuple[str, ...] = ()


def ask(kind: str, scene: Scene, rng: np.random.Generator, result: str | None = None) -> Asked | None:
    """A question of a kind about the scene, or None if the scene has none.

    Args:
        result: the result wanted; None draws one uniformly from those the scene allows.
    """
    by_result: dict[str, list[tuple[str, ...]]] = defaultdict(list)
    for filling, value in possible(kind, scene):
        by_result[value].append(filling)
    if result is None and by_result:
        result = list(by_result)[rng.integers(len(by_result))]
    if result not in by_result:
        return None
    filling = by_result[result][rng.integers(len(by_result[result]))]
    question = WORDINGS[kind][rng.integers(len(WORDINGS[kind]))].format(*filling)
    return Asked(kind, question, answer_text(kind, scene, filling, result), result, filling)


def scene_with_question(kind: str, rng: np.random.Generator) -> tuple[Scene, Asked]:
    """A question whose result is uniform over all results of its kind, and a random scene that has it."""
    result = None if kind in LONG_KINDS else RESULTS[kind][rng.integers(len(RESULTS[kind]))]
    while True:
        scene = random_scene(rng)
        asked = ask(kind, scene, rng, result)
        if asked is not None:
            return scene, asked


def ask_without_picture(rng: np.random.Generator) -> Asked:
    """A small sum or comparison in words alone, of kind "sum" or "read" by its result."""
    if rng.random() < 0.5:
        total = int(rng.integers(19))
        a = int(rng.integers(max(0, total - 9), min(9, total) + 1))
        return Asked("sum", PLUS.format(a, total - a), f"{a} plus {total - a} is {total}", str(total))
    a, b = (int(digit) for digit in rng.permutation(10)[:2])
    return Asked("read", GREATER.format(a, b), str(max(a, b)), str(max(a, b)))


def wrong_answer(asked: Asked, scene: Scene | None, rng: np.random.Generator) -> str:
    """The answer with another result, drawn uniformly; long answers have two cells told wrong."""
    if asked.kind not in LONG_KINDS:
        others = [other for other in RESULTS[asked.kind] if other != asked.result]
        return asked.answer.removesuffix(asked.result) + others[rng.integers(len(others))]
    assert scene is not None  # only scenes have long answers
    colours, digits = list(scene.colours), list(scene.digits)
    for cell in rng.permutation(len(digits))[:2]:
        told = (colours[cell], digits[cell])
        while (colours[cell], digits[cell]) == told:
            colours[cell], digits[cell] = int(rng.integers(len(COLOUR_NAMES))), int(rng.integers(10))
    return answer_text(asked.kind, Scene(tuple(colours), tuple(digits)), (), "")


def kind_of(record_id: str) -> str | None:
    """The question kind at the end of a validation or test record's id, or None."""
    kind = record_id.rsplit("-", 1)[-1]
    return kind if kind in KINDS else None


def majority_rate(records: Iterable[Record]) -> dict[str, float]:
    """Exact match per kind of the best guess that reads the question but never sees the picture.

    The guess is the commonest answer to each wording, with the cells and colours that the question
    names filled in. Only records with a kind count.
    """
    names = re.compile("|".join((*CELLS, *COLOUR_NAMES)))
    answers: dict[str, dict[str, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))
    for record in records:
        if kind := kind_of(record.id):
            question, answer = record.turns[-2].text, record.turns[-1].text
            for name in names.findall(question):
                answer = answer.replace(name, "_")
            answers[kind][names.sub("_", question)][answer] += 1
    return {
        kind: sum(max(counter.values()) for counter in answers[kind].values())
        / sum(counter.total() for counter in answers[kind].values())
        for kind in KINDS
        if kind in answers
    }
