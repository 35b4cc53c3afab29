"""How sure a score is, and whether two differ: bootstrap over groups of questions, and McNemar's exact test.

Questions about one picture, or in one family, stand or fall together; so whole groups are drawn, with replacement, and the
score of a draw is the ratio of its sums (Field & Welsh 2007, section 3). All draws come from one seed.

Shape suffixes: R draws, G groups.
"""

from collections.abc import Sequence

import numpy as np

from grace.evaluation.question import Unit

DRAWS, SEED, LEVEL = 2000, 0, 0.95
_AT_ONCE = 4_000_000  # numbers of a block of draws


def mean(units: Sequence[Unit]) -> float:
    """The score."""
    return sum(unit.value for unit in units) / len(units)


def interval(units: Sequence[Unit]) -> tuple[float, float] | None:
    """The 95 % bootstrap interval of a score; None where there is but one group."""
    names, index = _groups(units)
    if len(names) < 2:
        return None
    values_G = np.bincount(index, weights=[unit.value for unit in units])
    counts_G = np.bincount(index).astype(np.float64)
    return _between(np.concatenate([v / c for v, c in _drawn(values_G, counts_G)]))


def difference_interval(first: Sequence[Unit], second: Sequence[Unit]) -> tuple[float, float] | None:
    """The 95 % interval of second - first, both of the same units in the same order; None with but one group."""
    names, index = _groups(first)
    if len(names) < 2:
        return None
    gains = [b.value - a.value for a, b in zip(first, second, strict=True)]
    values_G = np.bincount(index, weights=gains)
    counts_G = np.bincount(index).astype(np.float64)
    return _between(np.concatenate([v / c for v, c in _drawn(values_G, counts_G)]))


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided exact p of McNemar's test.

    Args:
        only_first, only_second: units that one of the two has right and the other wrong.
    """
    total, fewer = only_first + only_second, min(only_first, only_second)
    term = tail = 1  # binomial coefficients, in whole numbers: exact whatever their size
    for k in range(1, fewer + 1):
        term = term * (total - k + 1) // k
        tail += term
    return min(1.0, 2 * tail / 2**total)


def _groups(units: Sequence[Unit]) -> tuple[list[str], list[int]]:
    numbers: dict[str, int] = {}
    index = [numbers.setdefault(unit.group, len(numbers)) for unit in units]
    return list(numbers), index


def _drawn(values_G: np.ndarray, counts_G: np.ndarray):
    """Sums and counts of each draw, block by block."""
    rng = np.random.default_rng(SEED)
    groups = len(values_G)
    rows = max(1, min(DRAWS, _AT_ONCE // groups))
    for start in range(0, DRAWS, rows):
        drawn = rng.integers(groups, size=(min(rows, DRAWS - start), groups))
        yield values_G[drawn].sum(1), counts_G[drawn].sum(1)


def _between(draws_R: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(draws_R, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
