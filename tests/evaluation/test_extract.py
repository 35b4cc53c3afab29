"""Answers as models write them: what is read from them, and that nothing is ever made up."""

# ruff: noqa: RUF001 - full-width letters and brackets are what is read here

import string
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grace.evaluation.extract import letter, yes_no

ANIMALS = ("a cat", "a dog", "a red fox", "a fox")
LETTERS = {
    # a letter alone
    "B": "B", "b": "B", " B ": "B", "(B)": "B", "(b)": "B", "B.": "B", "B)": "B", "**B**": "B", "`B`": "B", "[B]": "B",
    "B。": "B", "（Ｂ）": "B", "Ｂ": "B", "【B】": "B", "$B$": "B", '"B"': "B", "'B'.": "B", "\\boxed{B}": "B", "<answer>B</answer>": "B",
    "a": "A", "A": "A", "\n\nC\n": "C", "<think>maybe A</think>\nC": "C", "__D__": "D", "$\\boxed{\\text{D}}$": "D",
    # statements
    "The answer is (B).": "B", "The answer is B": "B", "the answer is b": "B", "The correct answer is **B**.": "B",
    "Answer: B": "B", "ANSWER: (C)": "C", "Answer：B。": "B", "answer:b": "B", "Final answer: \\boxed{C}": "C", "答案是B": "B", "答案：Ｃ": "C",
    "答案为（D）。": "D", "选B": "B", "应选择 C。": "C", "I would choose option B.": "B", "I pick C": "C", "The correct option is D, a fox.": "D",
    "The answer is A.": "A", "The answer is A because of the ears.": "A", "The answer is a.": "A", "Option A": "A", "option (a) is right": "A",
    "Based on the picture, the answer should be B.": "B", "It is A. Wait, no. The answer is B.": "B",
    "The answer is A. On reflection, the answer is C.": "C", "Answer with B": "B", "My choice is C!": "C", "The answer is:\n\nB": "B",
    "The answer is option B": "B", "The right answer is the option (C)": "C", "So the answer is\n**B. a dog**": "B",
    # led by
    "B. a dog": "B", "B: a dog": "B", "(B) a dog": "B", "b) a dog": "B", "B, a dog": "B", "B\nIt barks.": "B", "B - a dog": "B",
    "**B.** a dog": "B", "B.a dog": "B", "A. a cat": "A", "A: because of the ears": "A", "(A) It has pointed ears.": "A",
    "B. It barks, so (A) is wrong.": "B",
    # in prose
    "It looks like B to me": "B", "I see the animal of (C) here.": "C", "Clearly the picture shows B.": "B",
    "Not A but B": "B", "It is not (A), it is (B).": "B", "A is wrong, so it must be C.": "C", "The answer is not B": None,
    "The answer isn't A, the answer is D": "D",
    # texts
    "a dog": "B", "A dog": "B", "A dog.": "B", "It is a dog.": "B", "The animal is a red fox.": "C", "a red fox": "C", "A fox": "D",
    "The answer is a dog.": "B", "The answer is A dog.": "B", "I see a cat": "A", "It is not a cat, it is a dog": "B",
    "A large animal, probably a dog": "B", "**a dog**": "B", "The answer is: a red fox": "C",
    # neither one nor the other
    "": None, " ": None, "A and B": None, "A or B": None, "A, B": None, "B/C": None, "(A) and (B)": None, "Both A and B": None,
    "The answer is A and B.": None, "The answer is A or B": None, "A和B": None, "A. a cat B. a dog C. a red fox D. a fox": None,
    "A. a cat\nB. a dog\nC. a red fox\nD. a fox": None, "a cat and a dog": None, "It is either a cat or a dog.": None,
    "E": None, "The answer is E.": None, "Z": None, "I don't know": None, "I do not know, maybe a dog": None,
    "I'm sorry, but I can't help with that.": None, "I cannot determine the answer from the picture.": None,
    "Sorry, I can't see A picture": None, "A large animal": None, "An animal": None, "42": None, "?": None,
    "I think so": None, "无法判断": None, "The X-ray shows bones": None, "Plan B-52": None, "There's no dogma": None,
    "It is 20°C outside": None, "A current of 3 A": None, "Options: A. a cat, B. a dog": None, "D.C. is a town": None, "e.g. this": None,
    "A. On the whole B. is not right": "A", "Answer: I think B": "B", "I think the answer is b because it barks": "B", "the correct choice is c, the red one": "C",
    "the answer is a since it meows": "A", "B选项": "B", "我选择B。": "B", '{"answer": "B"}': "B", "\\(B\\)": "B", "Answer: A dog is there": "B",
    "B B B": "B", "Looking at A and B, I would say A.": "A", "I would say a dog": "B", "None of the options": None, "Option (B) and (C)": None, "答案是A和B": None, "I select a dog": "B", "Bad": None, "Dog": None, "ABCD": None, "Both": None,
    # an explanation that names other options
    "The answer is (A). Choice (D) refers to a plant.": "A", "The correct answer is A. Option B is for dogs, option C is for cars.": "A",
    "A. Option B shows a dog.": "A", "**Answer: A**\n\nOption B: there is no dog here.": "A", "A\n\nExplanation: Option C would need wheels.": "A",
    "The answer is A. If we choose B, the tail would be longer.": "A", "正确答案是A。选项B是狗，图中没有。": "A", "Option A. Option B is too large.": None,
    "I would choose B. Option A shows a cat.": "B", "Option C is too small, so I choose D.": "D", "A. One might pick B.": None,
    "I pick B, or rather I pick C": None, "Option B: it barks": "B", "Option: B": "B", "正确选项是B": "B", "我选B，选项A不对": "B",
    "Answer: A\nthe picture shows an animal": "A", "it may be A or C...</think>\n\nB": "B", "<think>A</think><think>C</think>D": "D",
}  # fmt: skip


@pytest.mark.parametrize(
    ("answer", "expected"), LETTERS.items(), ids=[repr(answer)[:40] for answer in LETTERS]
)
def test_letters(answer, expected):
    assert letter(answer, ANIMALS) == expected


@pytest.mark.parametrize(
    ("answer", "choices", "expected"),
    [
        (
            "D",
            ("c", "D", "b", "a"),
            "D",
        ),  # diagrams whose options are letters: what was asked for is the option's letter
        ("vitamin C", ("vitamin A", "vitamin B", "vitamin C"), "C"),
        ("It is vitamin C.", ("vitamin C", "vitamin D"), "A"),
        ("Both A and B", ("red", "blue", "both A and B", "none"), "C"),
        ("The answer is both A and B.", ("red", "blue", "both A and B", "none"), "C"),
        ("It cannot be determined.", ("yes", "no", "It cannot be determined"), "C"),
        ("Cannot be determined", ("3", "4", "cannot be determined"), "C"),
        ("The result is 12.", ("1", "2", "12", "120"), "C"),
        ("12.5", ("12", "12.5"), "B"),
        ("-3", ("3", "-3"), "B"),
        ("0.25 m", ("0.25 m", "25 m"), "A"),
        ("none of the above", ("x1", "x2", "None of the above"), "C"),
        ("H", tuple("qrstuvwx"), "H"),
        ("I", tuple("qrstuvwxy"), "I"),
        ("I think it is (I)", ("p",) * 9, "I"),
        ("I believe it is F", ("p",) * 9, "F"),
        ("yes", ("yes", "no"), "A"),
        ("A", ("only",), "A"),
        ("B", ("only",), None),
        ("B", ("", ""), "B"),
        ("anything", ("", ""), None),
        ("anything", (), None),
        ("red", ("red", "red"), None),
        ("The answer is red", ("dark red", "red"), "B"),
        ("the colour is dark red", ("dark red", "red"), "A"),
    ],
)
def test_letters_of_other_options(answer, choices, expected):
    assert letter(answer, choices) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Yes", "yes"), ("no", "no"), ("Yes.", "yes"), ("**No**", "no"), ("Yes, there is no dog.", "yes"), ("No, yes is wrong", "no"),
        ("The answer is yes.", "yes"), ("There is no dog", "no"), ("I would say yes or no", None), ("", None), ("Maybe", None),
        ("Nothing is known", None), ("Yesterday", None), ("YES!", "yes"), ("Ｙｅｓ。", "yes"), ("not at all", None), ("<think>no</think>yes", "yes"), ("no</think>Yes", "yes"),
    ],
)  # fmt: skip
def test_yes_and_no(answer, expected):
    assert yes_no(answer) == expected


CHOICES = st.lists(st.text(string.ascii_lowercase + " ", max_size=8), min_size=2, max_size=6)
DRESSES = st.sampled_from(
    ["{}", "({})", "{}.", "**{}**", "The answer is {}.", "The answer is ({}).", "Answer: {}", "\\boxed{{{}}}", "（{}）", "答案是{}。",
     "The correct option is **{}**", "  {}\n", "Final answer: ({})"]
)  # fmt: skip


@given(CHOICES, st.integers(0, 5), DRESSES)
def test_a_letter_is_read_whatever_its_dress_and_the_options(choices, index, dress):
    mark = "ABCDEF"[index]
    expected = mark if index < len(choices) else None
    found = letter(dress.format(mark), choices)
    # Where the letter is none of the options', an option's text may still be in the words around it.
    assert found == expected or (expected is None and str(found) in "ABCDEF"[: len(choices)])


@given(st.text(max_size=80), CHOICES)
def test_whatever_is_said_gives_one_of_the_letters_or_nothing_and_always_the_same(answer, choices):
    found = letter(answer, choices)
    assert found is None or found in string.ascii_uppercase[: len(choices)]
    assert letter(answer, choices) == found
    assert yes_no(answer) in ("yes", "no", None)


@given(st.text("efghjklmnopqrstuvwxyz .,!?", max_size=60))
def test_prose_without_any_option_is_never_an_answer(answer):
    assert letter(answer, ("BB1", "BB2", "BB3", "BB4")) is None


@pytest.mark.parametrize(
    "text",
    [
        "answer" + " " * 50_000 + "!",
        "(" * 50_000,
        "not a " * 20_000,
        "A " * 50_000,
        "the " * 9_000,
        "answer the " * 9_000,
    ],
)
def test_long_answers_take_no_longer_than_their_length(text):
    start = time.perf_counter()
    letter(text, ANIMALS)
    yes_no(text)
    assert time.perf_counter() - start < 5


@given(
    st.permutations("ABCD").map(lambda p: p[:2]),
    st.sampled_from(["{} and {}", "{} or {}", "{}, {}", "{}/{}", "({}) and ({})", "The answer is {} and {}"]),
)
def test_two_letters_are_no_answer(pair, form):
    assert letter(form.format(*pair), ("w1", "x1", "y1", "z1")) is None
