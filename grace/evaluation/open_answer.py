"""Short answers to MMMU's open questions: numbers and words, found and compared by the benchmark's own rules.

The rules are those of MMMU-Benchmark/MMMU at bb0b95a, mmmu/utils/eval_utils.py (`parse_open_response`, `eval_open`): of each
line what follows the last "is", "answer", "=" and the like, and the numbers in it; numbers are equal at two decimals, and
words if the right answer occurs. One thing differs: candidates are looked at in the order in which they are found.
"""

import re
from collections.abc import Sequence

_KEYS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_TRIVIAL = frozenset(":,.!?;'")
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)


def candidates(answer: str) -> list[float | str]:
    """What an answer may mean, normalized, each once; nothing of an empty one."""
    text = answer.strip().strip(".").lower()
    if not text:
        return []
    lines = text.split("\n")
    tails = [_tail(line, last=number == len(lines) - 1) for number, line in enumerate(lines)]
    kept = [tail for tail in tails if tail and tail not in _TRIVIAL] or [text]
    numbers = [number for tail in kept for pattern in _NUMBERS for number in pattern.findall(tail)]
    return list(dict.fromkeys(form for one in (*kept, *numbers) for form in normalized(one)))


def matches(found: Sequence[float | str], gold: Sequence[str]) -> bool:
    """Whether one of the candidates is one of the right answers."""
    right = [form for one in gold for form in normalized(one)]
    words = [form for form in right if isinstance(form, str)]
    return any(any(word in one for word in words) if isinstance(one, str) else one in right for one in found)


def normalized(text: str) -> list[float | str]:
    """A number at two decimals, or words in lower case; a single letter only where it stands at a word's edge."""
    text = text.strip()
    try:
        return [float(f"{float(text.replace(',', '')):.2f}")]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def _tail(line: str, last: bool) -> str:
    """The shortest text after one of the key words; an equation counts in the last line alone."""
    shortest = ""
    for key in (*_KEYS, "=") if last else _KEYS:
        if key in line:
            tail = line.split(key)[-1].strip()
            if not shortest or len(tail) < len(
                shortest
            ):  # an empty one gives way to any later one, as published
                shortest = tail
    return shortest
