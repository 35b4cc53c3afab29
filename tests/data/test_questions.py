"""Questions are true of their scene, and no answer can be guessed from the question."""

import re
from collections import Counter

import numpy as np
import pytest

from grace.data.questions import (
    KINDS,
    LONG_KINDS,
    RESULTS,
    SHORT_KINDS,
    answer_text,
    ask,
    ask_without_picture,
    describe,
    kind_of,
    majority_rate,
    possible,
    scene_with_question,
    wrong_answer,
)
from grace.data.records import Record, Turn
from grace.data.scenes import EMPTY, Scene

E_ = EMPTY
# red 3 | none | blue 7  //  red 5 | green 0 | none  //  none | red 3 | yellow 9
SCENE = Scene((0, E_, 2, 0, 1, E_, E_, 0, 3), (3, E_, 7, 5, 0, E_, E_, 3, 9))


def facts(kind: str) -> dict[tuple[str, ...], str]:
    return dict(possible(kind, SCENE))


def test_answers_of_a_known_scene() -> None:
    assert facts("read") == {
        ("top left",): "3",
        ("top right",): "7",
        ("middle left",): "5",
        ("centre",): "0",
        ("bottom middle",): "3",
        ("bottom right",): "9",
    }
    assert facts("colour")[("bottom right",)] == "yellow" and ("top middle",) not in facts("colour")
    expected = {"red": "3", "green": "1", "blue": "1", "yellow": "1", "purple": "0", "orange": "0"}
    assert facts("count") == {(colour,): count for colour, count in expected.items()}
    assert facts("position") == {
        ("below", "top left"): "5",
        ("above", "middle left"): "3",
        ("left of", "centre"): "5",
        ("right of", "middle left"): "0",
        ("below", "centre"): "3",
        ("above", "bottom middle"): "0",
        ("right of", "bottom middle"): "9",
        ("left of", "bottom right"): "3",
    }
    assert (
        facts("compare")[("top right", "centre")] == "yes"
        and facts("compare")[("centre", "top right")] == "no"
    )
    assert ("top left", "bottom middle") not in facts("compare")  # both are 3
    assert facts("sum")[("top right", "bottom right")] == "16"
    assert describe(SCENE) == "red 3 none blue 7; red 5 green 0 none; none red 3 yellow 9"
    by_colour = "red 3 5 3; green 0; blue 7; yellow 9; purple none; orange none"
    assert answer_text("describe", SCENE, (), "") == describe(SCENE)
    assert answer_text("list", SCENE, (), "") == by_colour
    assert answer_text("count", SCENE, ("red",), "3") == "red 3 5 3: 3"
    assert answer_text("count", SCENE, ("purple",), "0") == "purple none: 0"
    assert answer_text("position", SCENE, ("left of", "centre"), "5") == "middle left: 5"
    assert answer_text("compare", SCENE, ("top left", "centre"), "yes") == "3 and 0: yes"
    assert answer_text("sum", SCENE, ("top right", "bottom right"), "16") == "7 plus 9 is 16"


def test_a_close_up_is_described_as_one_cell() -> None:
    assert describe(SCENE.close_up(2)) == "blue 7"


def test_asking_for_an_answer_the_scene_lacks() -> None:
    rng = np.random.default_rng(0)
    assert ask("sum", SCENE, rng, result="1") is None
    assert ask("position", Scene((0, E_, 0) + (E_,) * 6, (1, E_, 1) + (E_,) * 6), rng) is None
    asked = ask("sum", SCENE, rng, result="16")
    assert asked is not None and asked.result == "16" and asked.answer.endswith(" is 16")


@pytest.mark.parametrize("kind", SHORT_KINDS)
def test_answers_are_uniform_whatever_the_wording(kind: str) -> None:
    rng = np.random.default_rng(3)
    asked = [scene_with_question(kind, rng) for _ in range(1200)]
    counts = Counter(one.result for _, one in asked)
    assert set(counts) == set(RESULTS[kind])
    expected = len(asked) / len(RESULTS[kind])
    chi2 = sum((count - expected) ** 2 / expected for count in counts.values())
    assert chi2 < len(counts) - 1 + 5 * (2 * (len(counts) - 1)) ** 0.5
    for scene, one in asked[:50]:
        assert (one.filling, one.result) in possible(kind, scene)
        assert one.answer == answer_text(kind, scene, one.filling, one.result)


def test_later_questions_prefer_no_answer_of_their_scene() -> None:
    rng = np.random.default_rng(4)
    scene = Scene((0, 0, 0, 0, 0, 0, 1, E_, E_), (1, 1, 1, 1, 1, 1, 8, E_, E_))
    answers = Counter(asked.answer for _ in range(600) if (asked := ask("read", scene, rng)))
    assert 240 < answers["8"] < 360  # one cell of seven, yet half of the questions


def test_sums_in_words_are_right() -> None:
    rng = np.random.default_rng(5)
    for _ in range(200):
        asked = ask_without_picture(rng)
        a, b = (int(number) for number in re.findall(r"\d+", asked.question))
        assert min(a, b) >= 0 and max(a, b) <= 9
        is_sum = "plus" in asked.question
        assert asked.answer == (f"{a} plus {b} is {a + b}" if is_sum else str(max(a, b)))
        assert asked.result in RESULTS[asked.kind] and asked.answer.endswith(asked.result)


@pytest.mark.parametrize("kind", SHORT_KINDS)
def test_wrong_answers_are_uniform_over_the_others(kind: str) -> None:
    rng = np.random.default_rng(6)
    _, asked = scene_with_question(kind, rng)
    stem = asked.answer.removesuffix(asked.result)
    wrong = Counter(wrong_answer(asked, SCENE, rng) for _ in range(300 * len(RESULTS[kind])))
    assert set(wrong) == {stem + result for result in RESULTS[kind] if result != asked.result}
    assert min(wrong.values()) > 0.6 * max(wrong.values())


def test_a_wrong_description_has_two_wrong_cells() -> None:
    rng = np.random.default_rng(7)

    def told_cells(description: str) -> list[str]:
        return re.findall(r"none|\w+ \d", description)

    asked = ask("describe", SCENE, rng)
    assert asked is not None
    truth = told_cells(asked.answer)
    for _ in range(100):
        told = told_cells(wrong_answer(asked, SCENE, rng))
        assert len(told) == 9 and sum(a != b for a, b in zip(truth, told, strict=True)) == 2


def test_a_wrong_list_keeps_its_form() -> None:
    rng = np.random.default_rng(8)
    asked = ask("list", SCENE, rng)
    assert asked is not None
    for _ in range(50):
        told = wrong_answer(asked, SCENE, rng)
        assert told != asked.answer and len(told.split("; ")) == 6


def test_every_scene_has_the_long_questions() -> None:
    rng = np.random.default_rng(9)
    assert all(ask(kind, SCENE.close_up(0), rng) is not None for kind in LONG_KINDS)


def test_kind_of_a_record() -> None:
    assert kind_of("test-000123-sum") == "sum" and kind_of("qat_train-000123") is None
    assert all(kind_of(f"validation-000001-{kind}") == kind for kind in KINDS)


def test_majority_rate_reads_the_question_but_not_the_names_in_it() -> None:
    def one(number: int, question: str, answer: str, kind: str = "count") -> Record:
        turns = (Turn("user", "<image>\n" + question), Turn("assistant", answer))
        return Record(f"test-{number:06d}-{kind}", (), turns)

    records = [
        one(0, "How many red digits are there?", "red none: 0"),
        one(1, "How many blue digits are there?", "blue none: 0"),
        one(2, "How many green digits are there?", "green 2: 1"),
        one(3, "What is the number of red digits?", "red 1 2 3 4: 4"),
        one(4, "Is the digit at the top left greater than the digit at the centre?", "yes", "compare"),
        Record("qat_train-000000", (), (Turn("user", "?"), Turn("assistant", "x"))),
    ]
    assert majority_rate(records) == {"count": 0.75, "compare": 1.0}
