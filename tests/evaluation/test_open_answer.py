"""Short answers, by MMMU's own rules; each case worked out by hand from them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grace.evaluation.judge import read
from grace.evaluation.open_answer import candidates, matches, normalized
from grace.evaluation.question import Question


@pytest.mark.parametrize(
    ("answer", "gold", "right"),
    [
        ("8.4", ["8.4"], True), ("8.40", ["8.4"], True), ("The current is 8.4 A.", ["8.4"], True), ("It is 8.5", ["8.4"], False),
        ("1,200", ["1200"], True), ("So x = 12", ["12"], True), ("x = 12\nbut the answer is 13", ["12"], False),
        ("2.834", ["2.83"], True), ("-120", ["-120"], True), ("120", ["-120"], False), ("3e2", ["300"], True), ("5%", ["5"], True),
        ("MgS", ["$MgS$", "MgS"], True), ("the salt is mgs.", ["$MgS$", "MgS"], True), ("MgO", ["$MgS$", "MgS"], False),
        ("Tampa, Florida", ["Tampa", "Florida"], True), ("C", ["C"], True), ("vitamin C", ["C"], True), ("carbon", ["C"], False),
        ("", ["8.4"], False), (" . ", ["x"], False), ("1/64", ["1/64"], True), ("The embryonic stage", ["embryonic"], True),
    ],
)  # fmt: skip
def test_open_answers(answer, gold, right):
    assert matches(candidates(answer), gold) is right


@pytest.mark.parametrize(
    "gold", ["$1,000", "$\\frac{1}{2}$", "[2, 3]", "CO₂", "x²", "L\u2019Orfeo", "µm", "**bold**"]
)
def test_a_right_answer_may_have_markup(gold):
    asked = Question("1", "p", (), (), (gold,), kind="open")
    assert read(asked, f"The answer is {gold}")[1] and not read(asked, "something else")[1]


def test_numbers_are_told_from_words():
    assert (
        normalized(" 1,234.567 ") == [1234.57]
        and normalized("MgS") == ["mgs"]
        and normalized("C") == [" c", "c "]
    )
    assert candidates("") == [] and candidates("The answer is 4") == [4.0]


@given(st.text(max_size=60), st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=2))
def test_nothing_breaks_it(answer, gold):
    assert matches(candidates(answer), gold) in (True, False)
    assert candidates(answer) == candidates(answer)


@given(st.decimals(-10_000, 10_000, places=2, allow_nan=False))
def test_a_number_is_found_in_a_sentence(number):
    assert matches(candidates(f"The result is {number}"), [str(number)])
