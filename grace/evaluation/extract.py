"""Reads an option's letter, or yes or no, from what a model said. Nothing is guessed: what cannot be read is None.

The rules are our own, and stricter than the published ones (VLMEvalKit's `can_infer`, MMMU's `parse_multi_choice_response`,
lmms-eval's `extract_mcq_answer`), which take a random letter, or any letter at all, where these give up. In order:

1. a letter alone, in any dress: "B", "(b)", "**B**.", full-width;
2. the whole answer is the text of one option;
3. the last statement of the kind "the answer is B", "Answer: (B)", "the right option is B", "答案是B", "\\boxed{B}";
4. the only letter that is chosen, "I would choose B", and no other that the answer begins with;
5. of the options that are mentioned, "option B", the one that the answer begins with, or else the only one;
6. a refusal is no answer;
7. a letter that the answer begins with: "B. a dog", "(B) a dog";
8. the only letter that stands by itself in the text, if the article "A" and letters inside option texts are left out;
9. the only option whose text occurs.

A letter or text after "not" does not count, and two answers ("A and B", a list of all options) are none.
"""

# ruff: noqa: RUF001 - full-width brackets and the like are what is read here

import re
import unicodedata
from collections.abc import Iterator, Sequence

from grace.evaluation.fields import LETTERS

LONGEST = 20_000  # characters that are looked at
# Up to the last end: of a model whose template opens it in the prompt, only the end is in the answer.
_THINKING = re.compile(r"^.*</think>|<think>.*$", re.DOTALL | re.IGNORECASE)
_TAGS = re.compile(r"</?\s*(?:answer|ans|b|strong|i|em|option|choice)\s*>", re.IGNORECASE)
_MARKUP = re.compile(r"\*\*|__|`|\$|\\(?:text|mathrm|mathbf|textbf)\b")
_BOXED = re.compile(r"\\boxed ?\{ ?([^{}]*)\}")
_BRACKETS = str.maketrans({
    "。": ".", "、": ",", "「": '"', "」": '"', "“": '"', "”": '"', "‘": "'", "’": "'", "【": "(", "】": ")", "〈": "(", "〉": ")",
    "《": "(", "》": ")", "[": "(", "]": ")",
})  # fmt: skip
_BRACES = str.maketrans({"{": "(", "}": ")"})

_ALONE = re.compile(r"[\s(\"']*([A-Za-z])[\s)\"'.,:;!]*")
_COPULA = r"(?:is|are|would be|should be|must be|will be)\b"
_LETTER = (
    r"(?:the\b|option\b|choice\b|letter\b|answer\b|most likely\b|probably\b|clearly\b|therefore\b|选项|[:=>\-\s]){0,12}"
    r"(?P<dress>[(\"'\s]*)(?P<letter>[A-Za-z])(?![A-Za-z0-9'])"
)
_STATED = re.compile(
    rf"(?:\b(?:answers?|letter)\b\s*(?:{_COPULA})?|\b(?:option|choice)\b\s*(?:{_COPULA}|[:=])|\bboxed\b"
    rf"|答案(?:应该)?(?:是|为|选)?|选项(?:应该)?(?:是|为|[:=])){_LETTER}",
    re.IGNORECASE,
)
_CHOSEN = re.compile(
    rf"(?:\b(?:choose|select|pick|chose|go with|would say)\b|选择?(?!项)){_LETTER}", re.IGNORECASE
)
_MENTIONED = re.compile(rf"(?:\b(?:option|choice)\b|选项){_LETTER}", re.IGNORECASE)
_LEADING = re.compile(
    r"\(\s*([A-Za-z])\s*\)|([A-Za-z])\s*[).:](?![A-Za-z]\.)|([A-Z])(?=\s*(?:\n|$|,|;)|\s[\-\u2013\u2014]\s)"
)
_BRACKETED = re.compile(r"\(\s*([A-Z])\s*\)")
_LISTED = re.compile(r"(?<![A-Za-z0-9(])([A-Z])[.):](?=\s|$)")
# Not in a word, a contraction, "X-ray" or "B-52", and no unit after a number: "8.4 A", "20°C".
_STANDING = re.compile(r"(?<![A-Za-z0-9'\-°])(?<!\d\s)([A-Z])(?![A-Za-z0-9]|['\-][A-Za-z0-9])")
_JOINED = re.compile(
    r"[)\"'\s]*(?:,?\s*\b(?:and|or|nor)\b|[,/&+]|和|或|与)\s*(?:option\s)?[(\"']*([A-Za-z])(?![A-Za-z0-9'])",
    re.IGNORECASE,
)
_FOLLOWED = re.compile(r" [a-z]")
_AFTER_ANSWER = re.compile(r" (?:because|since|as|is|and|or|for|which|due|based|given|from|in|with)\b")
_NEGATED = re.compile(
    r"(?:\bnot|n't|\bneither|\bnor|\brather than|\binstead of|\bunlike|不是|不选|而非)"
    r"(?:\s*(?:the|an?|option|answer|is)\b)*[(\"'\s]*$",
    re.IGNORECASE,
)
_NEAR = 60  # characters before a letter in which a "not" may stand
_WRONG = re.compile(
    r"[)\"'.]*\s*(?:(?:is|are|was|would be)\s+(?:clearly |definitely |also )?(?:not|wrong|incorrect|false)\b|isn't\b)",
    re.IGNORECASE,
)
_REFUSAL = re.compile(
    r"\b(?:sorry|apologi[sz]e|unable to|not able to|can(?:not|'t| not)\s+(?:\w+\s+)?(?:be\s+)?"
    r"(?:determine|answer|help|assist|see|view|process|identify|provide|tell|access|say|judge|conclude)\w*"
    r"|don't know|do not know|no (?:image|picture) (?:is|was)|insufficient information)\b|无法|抱歉|不知道",
    re.IGNORECASE,
)
_WORD = re.compile(r"[a-z]+")


def letter(answer: str, choices: Sequence[str]) -> str | None:
    """The option that an answer names, as "A", "B", ...; None where it names none, or several.

    Args:
        choices: the options' texts; an empty text is never looked for.
    """
    known, text = LETTERS[: len(choices)], plain(answer)
    if alone := _ALONE.fullmatch(text):
        return alone[1].upper() if alone[1].upper() in known else None
    wanted = [_folded(choice) for choice in choices]
    same = [mark for mark, choice in zip(known, wanted, strict=True) if choice and choice == _folded(text)]
    if len(same) == 1:
        return same[0]
    if stated := list(_named(_STATED, text, known, wanted)):
        return stated[-1]
    leading = _leading(text, known)
    if chosen := set(_named(_CHOSEN, text, known, wanted)):
        return _only(chosen | leading)
    if mentioned := set(_named(_MENTIONED, text, known, wanted)):
        return _only(leading) or _only(mentioned)
    if _REFUSAL.search(text) and not any(_REFUSAL.search(choice) for choice in choices):
        return None
    return _only(leading or _standing(_masked(text, wanted), known) or _by_text(text, known, wanted))


def yes_no(answer: str) -> str | None:
    """ "yes" or "no"; None where neither is said, or both without one of them first.

    The rule of VLMEvalKit (`YOrN_Extraction`), and before it: the first word counts, if it is one of them.
    """
    words = _WORD.findall(plain(answer).lower())
    if words and words[0] in ("yes", "no"):
        return words[0]
    said = {"yes", "no"} & set(words)
    return said.pop() if len(said) == 1 else None


def plain(answer: str) -> str:
    """An answer without thinking, markup, full-width forms and repeated spaces; \\boxed{B} as "boxed (B)"."""
    text = unicodedata.normalize("NFKC", _TAGS.sub(" ", _THINKING.sub(" ", answer[:LONGEST])))
    text = re.sub(r"[^\S\n]*\n\s*", "\n", re.sub(r"[^\S\n]+", " ", text))  # one space, or one line break
    text = _MARKUP.sub("", text).translate(_BRACKETS)
    return _BOXED.sub(r" boxed (\1) ", text).translate(_BRACES).strip()


# ---------------------------------------------------------------- the rules


def _only(found: set[str] | set[str | None]) -> str | None:
    return next(iter(found)) if len(found) == 1 else None


def _named(pattern: re.Pattern[str], text: str, known: str, wanted: Sequence[str]) -> Iterator[str | None]:
    """What each explicit statement says; None where it names two letters."""
    for match in pattern.finditer(text):
        mark, end, start = match["letter"], match.end(), match.start("letter")
        if mark.upper() not in known or _denied(text, start, end):
            continue
        in_brackets = match["dress"].strip()
        if not in_brackets and (_is_word(mark, text, end) or _begins_option(text[start:], wanted)):
            continue
        joined = _JOINED.match(text, end)
        two = (
            joined
            and joined[1].upper() in known.replace(mark.upper(), "")
            and not _is_word(joined[1], text, joined.end())
        )
        yield None if two else mark.upper()


def _leading(text: str, known: str) -> set[str]:
    """The letter that a text begins with; with it others that it lists or joins to the first."""
    match = _LEADING.match(text)
    if match is None or match[match.lastindex or 0].upper() not in known or _denied(text, 0, match.end()):
        return set()
    found = {match[match.lastindex or 0].upper()} | _undenied(_LISTED, text, known)
    if match[1]:
        found |= _undenied(_BRACKETED, text, known)
    joined = _JOINED.match(text, match.end(match.lastindex or 0))
    return found | ({joined[1]} & set(known) if joined else set())


def _standing(text: str, known: str) -> set[str]:
    """Letters that stand by themselves and are not denied: those in brackets, or else those that are no article."""
    words = _STANDING.sub(lambda match: " " if _is_word(match[1], text, match.end()) else match[0], text)
    return _undenied(_BRACKETED, text, known) or _undenied(_STANDING, words, known)


def _by_text(text: str, known: str, wanted: Sequence[str]) -> set[str]:
    """The options whose text occurs and is not denied; what lies within a longer option's text does not count."""
    found = set()
    for mark, choice in sorted(zip(known, wanted, strict=True), key=lambda pair: -len(pair[1])):
        if choice and wanted.count(choice) == 1:
            occurs = _occurrence(choice)
            if any(not _negated(text, match.start()) for match in occurs.finditer(text)):
                found.add(mark)
            text = occurs.sub(lambda match: "\0" * len(match[0]), text)
    return found


# ---------------------------------------------------------------- what a letter's surroundings say


def _is_word(mark: str, text: str, end: int) -> bool:
    """Whether a bare letter is the article or the pronoun: another word follows, and none that follows an answer."""
    return mark in "AaIi" and _FOLLOWED.match(text, end) is not None and not _AFTER_ANSWER.match(text, end)


def _denied(text: str, start: int, end: int) -> bool:
    return _negated(text, start) or _WRONG.match(text, end) is not None


def _negated(text: str, start: int) -> bool:
    return _NEGATED.search(text[max(0, start - _NEAR) : start]) is not None


def _undenied(pattern: re.Pattern[str], text: str, known: str) -> set[str]:
    """The options' letters that a pattern finds and that are not denied."""
    matches = (match for match in pattern.finditer(text) if match[1] in known)
    return {match[1] for match in matches if not _denied(text, match.start(), match.end())}


def _begins_option(text: str, wanted: Sequence[str]) -> bool:
    """Whether an option's text stands at the beginning, as in "A rabbit"."""
    rest = _folded(text[: 2 * max(map(len, wanted), default=0) + 2])
    return any(len(choice) > 1 and rest.startswith(choice) for choice in wanted)


def _masked(text: str, wanted: Sequence[str]) -> str:
    """A text without the options' texts of more than one letter."""
    for choice in sorted(wanted, key=len, reverse=True):
        if len(choice) > 1:
            text = _occurrence(choice).sub(lambda match: " " * len(match[0]), text)
    return text


def _occurrence(choice: str) -> re.Pattern[str]:
    """Finds an option's text as whole words or numbers, whatever its case and spacing."""
    words = r"\s+".join(re.escape(word) for word in choice.split())
    return re.compile(rf"(?<![\w.\-]){words}(?!\w|[.,]\d)", re.IGNORECASE)


def _folded(text: str) -> str:
    """For comparing texts: one case, single spaces, no full stop or quotes around."""
    return " ".join(plain(text).casefold().split()).strip(" .,:;!\"'")
