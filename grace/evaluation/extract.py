"""Reads an option's letter, or yes or no, from what a model said. Nothing is guessed: what cannot be read is None.

The rules are our own, and stricter than the published ones (VLMEvalKit's `can_infer`, MMMU's `parse_multi_choice_response`,
lmms-eval's `extract_mcq_answer`), which take a random letter, or any letter at all, where these give up. In order:

1. a letter alone, in any dress: "B", "(b)", "**B**.", "（Ｂ）";
2. the whole answer is the text of one option;
3. the last statement of the kind "the answer is B", "Answer: (B)", "option B", "答案是B", "\\boxed{B}";
4. a refusal is no answer;
5. a letter that the answer begins with: "B. a dog", "(B) a dog";
6. the only letter that stands by itself in the text, if the article "A" and letters inside option texts are left out;
7. the only option whose text occurs.

A letter or text after "not" does not count, and two answers ("A and B", a list of all options) are none.
"""

import re
import unicodedata
from collections.abc import Sequence

from grace.evaluation.fields import LETTERS

_MARKUP = re.compile(r"\*\*|__|`|\$|\\(?:text|mathrm|mathbf|textbf)\b")
_BOXED = re.compile(r"\\boxed\s*\{\s*([^{}]*?)\s*\}")
_TAGS = re.compile(r"</?\s*(?:answer|ans|b|strong|i|em|option|choice)\s*>", re.IGNORECASE)
_THINKING = re.compile(r"<think>.*?(?:</think>|$)", re.DOTALL | re.IGNORECASE)
_PUNCTUATION = str.maketrans({"。": ".", "、": ",", "「": '"', "」": '"', "【": "(", "】": ")", "〈": "(", "〉": ")", "《": "(", "》": ")",
                              "“": '"', "”": '"', "‘": "'", "’": "'", "{": "(", "}": ")", "[": "(", "]": ")"})  # fmt: skip
_ALONE = re.compile(r"[\s(\"']*([A-Za-z])[\s)\"'.,:;!]*")
_STATED = re.compile(
    r"(?:\b(?:answer|option|choice|letter)s?\b\s*(?:(?:is|are|would be|should be|must be|will be)\b|[:=]|is:)?"
    r"|\b(?:choose|select|pick|chose|go with|boxed)\b"
    r"|答案(?:应该)?(?:是|为|选)?|选择?|选项)"
    r"\s*(?:the\b|option\b|choice\b|letter\b|answer\b|most likely\b|probably\b|clearly\b|therefore\b|[:=>\-]|\s)*"
    r"(?P<dress>[\s(\"']*)(?P<letter>[A-Za-z])(?![A-Za-z0-9'])",
    re.IGNORECASE,
)
_LEADING = re.compile(
    r"\s*(?:\(\s*([A-Za-z])\s*\)|([A-Za-z])\s*[).:](?=\s|$|\S)|([A-Z])(?=\s*(?:\n|$|,|;| - | – | — )))"
)
_BRACKETED = re.compile(r"\(\s*([A-Z])\s*\)")
_STANDING = re.compile(r"(?<![A-Za-z0-9'\-])([A-Z])(?![A-Za-z0-9]|['\-][A-Za-z0-9])")
_LISTED = re.compile(r"(?<![A-Za-z0-9(])([A-Z])[.):](?=\s)")
_JOINED = re.compile(
    r"\s*[)\"']*\s*(?:,?\s*\b(?:and|or|nor)\b|[,/&+]|和|或|与)\s*(?:option\s*)?[(\"']*([A-Za-z])(?![A-Za-z0-9'])",
    re.IGNORECASE,
)
_NEGATED = re.compile(r"(?:\bnot|n't|\bneither|\bnor|\brather than|\binstead of|\bunlike|不是|不选|而非)\s*(?:the\b|an?\b|option\b|answer\b|is\b|\s)*[(\"']*$",
                      re.IGNORECASE)  # fmt: skip
_WRONG = re.compile(
    r"[)\"'.]*\s*(?:is|are|was|would be)\s*(?:clearly |definitely |also )?(?:not\b|wrong\b|incorrect\b|false\b)|[)\"'.]*\s*isn't\b",
    re.IGNORECASE,
)
_REFUSAL = re.compile(
    r"\b(?:sorry|apologi[sz]e|unable to|not able to|can(?:not|'t| not)\s+(?:\w+\s+)?(?:be\s+)?"
    r"(?:determine|answer|help|assist|see|view|process|identify|provide|tell|access|say|judge|conclude)\w*"
    r"|don't know|do not know|no (?:image|picture) (?:is|was)|insufficient information|无法|抱歉|不知道)",
    re.IGNORECASE,
)
_YES_NO = re.compile(r"[a-z]+")


def letter(answer: str, choices: Sequence[str]) -> str | None:
    """The option that an answer names, as "A", "B", ...; None where it names none, or several.

    Args:
        choices: the options' texts; an empty text is never looked for.
    """
    known = LETTERS[: len(choices)]
    text = plain(answer)
    if alone := _ALONE.fullmatch(text):
        return _known(alone[1], known)
    wanted = [_folded(choice) for choice in choices]
    same = [mark for mark, choice in zip(known, wanted, strict=True) if choice and choice == _folded(text)]
    if len(same) == 1:
        return same[0]
    found, settled = _stated(text, known, wanted)
    if settled:
        return found
    if _REFUSAL.search(text) and not any(_REFUSAL.search(choice) for choice in choices):
        return None
    masked = _masked(text, wanted)
    found, settled = _leading(text, known)
    if settled:
        return found
    standing = _standing(masked, known)
    if standing:
        return standing.pop() if len(standing) == 1 else None
    return _by_text(text, known, wanted)


def yes_no(answer: str) -> str | None:
    """ "yes" or "no"; None where neither is said, or both without one of them first.

    The rule of VLMEvalKit (`YOrN_Extraction`), and before it: the first word counts, if it is one of them.
    """
    words = _YES_NO.findall(plain(answer).lower())
    if words and words[0] in ("yes", "no"):
        return words[0]
    said = {word for word in words if word in ("yes", "no")}
    return said.pop() if len(said) == 1 else None


def plain(answer: str) -> str:
    """An answer without thinking, markup and full-width forms; of the last \\boxed{} its content in words."""
    text = _THINKING.sub(" ", answer)
    text = unicodedata.normalize("NFKC", _TAGS.sub(" ", text)).translate(_PUNCTUATION_BUT_BRACES)
    text = _MARKUP.sub("", text)
    text = _BOXED.sub(r" boxed (\1) ", text)
    return text.translate(_PUNCTUATION).strip()


_PUNCTUATION_BUT_BRACES = {key: value for key, value in _PUNCTUATION.items() if chr(key) not in "{}"}


def _known(mark: str, known: str) -> str | None:
    return mark.upper() if mark.upper() in known else None


def _stated(text: str, known: str, wanted: Sequence[str]) -> tuple[str | None, bool]:
    """The last explicit statement, and whether there is one."""
    found: str | None = None
    settled = False
    for match in _STATED.finditer(text):
        mark, after = match["letter"], text[match.end() :]
        bare = not match["dress"].strip()
        if _NEGATED.search(text[: match.start("letter")]) or _WRONG.match(after):
            continue
        if bare and _is_word(mark, after) or (mark.upper() not in known):
            continue
        if bare and _inside_option(text, match.start("letter"), wanted):
            continue
        joined = _JOINED.match(after)
        both = joined is not None and joined[1].upper() in known and joined[1].upper() != mark.upper() and (
            joined[1].isupper() or not _is_word(joined[1], after[joined.end() :])
        )  # fmt: skip
        found, settled = (None if both else mark.upper()), True
    return found, settled


def _is_word(mark: str, after: str) -> bool:
    """Whether a bare letter is the article, the pronoun, or a letter in passing: followed by another word."""
    follows_word = re.match(r"\s+[a-z]", after) is not None
    if mark in "Aa":
        return (
            follows_word
            and re.match(r"\s+(?:because|since|as|is|and|or|for|which|due|based|given|from|in|with)\b", after)
            is None
        )
    if mark == "I":
        return follows_word
    return mark.islower() and follows_word


def _inside_option(text: str, position: int, wanted: Sequence[str]) -> bool:
    """Whether a letter is part of an option's text that stands there, as in "the answer is A rabbit"."""
    rest = _folded(text[position:])
    return any(len(choice) > 1 and rest.startswith(choice) for choice in wanted)


def _leading(text: str, known: str) -> tuple[str | None, bool]:
    """The letter that a text begins with, and whether it begins with one."""
    match = _LEADING.match(text)
    if match is None:
        return None, False
    mark = next(part for part in match.groups() if part)
    if mark.upper() not in known or _WRONG.match(text[match.end() :]):
        return None, False
    rivals = _undenied(_LISTED, text, known) | (_undenied(_BRACKETED, text, known) if match[1] else set())
    joined = _JOINED.match(text[match.end(match.lastindex or 0) :])
    if joined is not None and joined[1].isupper():
        rivals |= {joined[1]} & set(known)
    return (None if rivals - {mark.upper()} else mark.upper()), True


def _undenied(pattern: re.Pattern[str], text: str, known: str) -> set[str]:
    """The options' letters that a pattern finds and that are not denied."""
    return {
        match[1]
        for match in pattern.finditer(text)
        if match[1] in known
        and not _NEGATED.search(text[: match.start()])
        and not _WRONG.match(text[match.end() :])
    }


def _standing(text: str, known: str) -> set[str]:
    """Letters that stand by themselves and are not denied: those in brackets, or else those that are no article."""
    words = _STANDING.sub(lambda match: " " if _is_word(match[1], text[match.end() :]) else match[0], text)
    return _undenied(_BRACKETED, text, known) or _undenied(_STANDING, words, known)


def _masked(text: str, wanted: Sequence[str]) -> str:
    """A text without the options' texts of more than one letter, where they stand in it as written."""
    for choice in sorted(wanted, key=len, reverse=True):
        if len(choice) > 1:
            text = _occurrence(choice).sub(lambda match: " " * len(match[0]), text)
    return text


def _by_text(text: str, known: str, wanted: Sequence[str]) -> str | None:
    """The only option whose text occurs; one that lies within another's occurrence does not count."""
    found = []
    rest = text
    for mark, choice in sorted(zip(known, wanted, strict=True), key=lambda pair: -len(pair[1])):
        if not choice or wanted.count(choice) > 1:
            continue
        hits = [
            match
            for match in _occurrence(choice).finditer(rest)
            if not _NEGATED.search(rest[: match.start()])
        ]
        if hits:
            found.append(mark)
        rest = _occurrence(choice).sub(lambda match: "\0" * len(match[0]), rest)
    return found[0] if len(found) == 1 else None


def _occurrence(choice: str) -> re.Pattern[str]:
    """Finds an option's text as whole words, whatever its case and spacing."""
    words = r"\s+".join(re.escape(word) for word in choice.split())
    return re.compile(rf"(?<![\w.])(?<![\d]-){words}(?!\w|[.,]\d)", re.IGNORECASE)


def _folded(text: str) -> str:
    """For comparing texts: one case, single spaces, no full stop or quotes around."""
    return " ".join(plain(text).casefold().split()).strip(" .,:;!\"'")
