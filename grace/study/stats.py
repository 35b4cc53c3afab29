"""Means over seeds, their 95 % intervals, and differences seed by seed."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy.stats import t as student_t


@dataclass(frozen=True)
class Estimate:
    """A mean over `n` seeds, and half the width of its 95 % interval (Student's t); NaN with fewer than two."""

    mean: float
    half: float
    n: int

    @property
    def clear(self) -> bool:
        """Whether 0 lies outside the interval."""
        return abs(self.mean) > self.half


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of values of different seeds.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("no seeds to take a mean over")
    n, mean = len(values), statistics.fmean(values)
    if n < 2:
        return Estimate(mean, math.nan, n)
    quantile = float(student_t.ppf(0.975, n - 1))
    return Estimate(mean, quantile * statistics.stdev(values) / math.sqrt(n), n)


def paired(values: Mapping[int, float], others: Mapping[int, float]) -> Estimate | None:
    """values - others over the seeds that both have; None without any."""
    differences = [values[seed] - others[seed] for seed in sorted(values.keys() & others.keys())]
    return estimate(differences) if differences else None
