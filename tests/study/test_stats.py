"""Means, intervals and differences, by hand."""

import math

import pytest

from grace.study.stats import estimate, paired


def test_an_interval_by_hand():
    """Mean .72, standard deviation .02, t = 4.30265 with two degrees of freedom: 4.30265 * .02 / sqrt 3."""
    found = estimate([0.70, 0.72, 0.74])
    assert found.mean == pytest.approx(0.72)
    assert found.half == pytest.approx(0.0496827, rel=1e-5)
    assert found.n == 3 and found.clear


def test_five_seeds_take_the_t_of_four():
    found = estimate([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found.half == pytest.approx(2.776445 * math.sqrt(2.5) / math.sqrt(5), rel=1e-6)


def test_one_seed_has_no_interval():
    found = estimate([0.5])
    assert found.mean == 0.5 and math.isnan(found.half) and not found.clear


def test_no_seeds_are_refused():
    with pytest.raises(ValueError, match="no seeds"):
        estimate([])


def test_differences_are_taken_seed_by_seed():
    """Seeds that differ a lot, and a difference that does not: +.01, +.02, +.03."""
    found = paired({0: 0.51, 1: 0.72, 2: 0.93, 7: 0.1}, {2: 0.90, 1: 0.70, 0: 0.50, 8: 0.9})
    assert found is not None and found.n == 3
    assert found.mean == pytest.approx(0.02)
    assert found.half == pytest.approx(4.302653 * 0.01 / math.sqrt(3), rel=1e-5)
    assert not found.clear


def test_nothing_in_common():
    assert paired({0: 1.0}, {1: 1.0}) is None
