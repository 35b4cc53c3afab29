"""Intervals and tests against independent ways to compute them."""

import math
import random
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from grace.evaluation import stats
from grace.evaluation.question import Unit


def units(values, groups=None) -> list[Unit]:
    groups = groups or range(len(values))
    return [Unit(str(i), float(v), str(g), {}) for i, (v, g) in enumerate(zip(values, groups, strict=True))]


def span(found: tuple[float, float] | None) -> tuple[float, float]:
    assert found is not None
    return found


def test_the_interval_of_independent_questions_is_about_the_binomial_one():
    values = [1] * 700 + [0] * 300
    low, high = span(stats.interval(units(values)))
    width = 1.96 * math.sqrt(0.7 * 0.3 / 1000)
    assert low == pytest.approx(0.7 - width, abs=0.005) and high == pytest.approx(0.7 + width, abs=0.005)
    assert stats.interval(units(values)) == (low, high)  # seeded


def test_questions_that_stand_and_fall_together_widen_the_interval():
    """Each group of ten alike: as if there were a tenth of the questions."""
    values = [int(i // 10 % 10 < 7) for i in range(1000)]
    low, high = span(stats.interval(units(values, [i // 10 for i in range(1000)])))
    width = 1.96 * math.sqrt(0.7 * 0.3 / 100)
    assert high - low == pytest.approx(2 * width, rel=0.1)
    assert stats.interval(units(values, [0] * 1000)) is None


def test_groups_of_different_size_count_by_their_questions():
    """A brute-force bootstrap of the ratio, with another generator."""
    rng = random.Random(0)
    groups = [g for g in range(40) for _ in range(1 + g % 7)]
    values = [int(rng.random() < 0.3 + 0.01 * g) for g in groups]
    members = {g: [v for v, o in zip(values, groups, strict=True) if o == g] for g in set(groups)}
    draws = []
    for _ in range(4000):
        drawn = [v for g in rng.choices(range(40), k=40) for v in members[g]]
        draws.append(sum(drawn) / len(drawn))
    low, high = span(stats.interval(units(values, groups)))
    assert (low, high) == pytest.approx(tuple(np.quantile(draws, [0.025, 0.975])), abs=0.015)


def test_blocks_of_draws_give_what_one_block_gives(monkeypatch):
    data = units([i % 3 == 0 for i in range(50)])
    whole = stats.interval(data)
    monkeypatch.setattr(stats, "_AT_ONCE", 50 * 7)
    assert stats.interval(data) == whole


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_the_exact_binomial_test(b, c):
    expected = scipy_stats.binomtest(b, b + c, 0.5).pvalue if b + c else 1.0
    assert stats.mcnemar(b, c) == pytest.approx(expected, rel=1e-9)


def test_mcnemar_of_many_questions():
    assert stats.mcnemar(3000, 3200) == pytest.approx(scipy_stats.binomtest(3000, 6200, 0.5).pvalue, rel=1e-9)
    assert all(a >= b for a, b in pairwise(stats.mcnemar(0, n) for n in range(1, 1200, 100)))


def test_a_paired_difference_is_surer_than_two_scores():
    rng = random.Random(1)
    hard = [rng.random() for _ in range(600)]
    first, second = [int(h < 0.6) for h in hard], [int(h < 0.65) for h in hard]
    low, high = span(stats.difference_interval(units(first), units(second)))
    gain = (sum(second) - sum(first)) / 600
    alone = span(stats.interval(units(first)))
    assert low < gain < high and high - low < 0.5 * (alone[1] - alone[0])
    assert low > 0
    assert stats.difference_interval(units(first), units(first)) == (0.0, 0.0)
    assert stats.difference_interval(units([1]), units([0])) is None
