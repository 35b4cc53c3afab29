"""Which records an optimizer step sees, as pure functions of the step: resume needs no state.

Records come in parts, one for each annotation file. A part's stream is one seeded permutation of its records after
another, and every epoch takes the next so many of it: a part of which an epoch takes a tenth is walked through whole
in ten epochs, one of which it takes three times its size comes three times in each. The epochs, each in an order of
its own, make the stream of the run. Step t of batch size B takes its positions [tB, (t+1)B), whatever the number of
ranks and micro-batches.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_SHUFFLE = 2**32 - 1  # in place of a part's number: the order of an epoch


@dataclass(frozen=True)
class Mixture:
    """Parts of a data set, whose records are numbered through, and how many of each an epoch takes.

    Raises:
        ValueError: no parts, or one without records or of which nothing is taken.
    """

    sizes: tuple[int, ...]
    takes: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.sizes or len(self.sizes) != len(self.takes) or min(self.sizes + self.takes) < 1:
            raise ValueError(f"need n >= 1 of each part, got sizes={self.sizes}, takes={self.takes}")

    @classmethod
    def whole(cls, n: int) -> "Mixture":
        """One part, taken whole in each epoch."""
        return cls((n,), (n,))

    @property
    def epoch(self) -> int:
        """Records of an epoch."""
        return sum(self.takes)

    @property
    def starts(self) -> list[int]:
        """The number of each part's first record."""
        return list(itertools.accumulate(self.sizes, initial=0))[:-1]


def taken_of(n: int, weight: float, cap: int | None) -> int:
    """How many of `n` records an epoch takes: `weight` times as many, at most `cap`, at least one."""
    wanted = max(1, math.floor(weight * n + 0.5))
    return wanted if cap is None else min(wanted, cap)


def _permutation(n: int, *seed: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(n)


def _stream(n: int, first: int, last: int, part: int, seed: int) -> np.ndarray:
    """Positions [first, last) of the stream of a part of `n` records."""
    positions = np.arange(first, last)
    epochs = positions // n
    pieces = [
        _permutation(n, seed, epoch, part)[positions[epochs == epoch] % n]
        for epoch in range(first // n, -(-last // n))
    ]
    return np.concatenate(pieces)


@functools.lru_cache(maxsize=2)  # a step may reach into the next epoch
def _epoch(mixture: Mixture, epoch: int, seed: int) -> np.ndarray:
    parts = zip(mixture.sizes, mixture.takes, mixture.starts, strict=True)
    picks = np.concatenate(
        [
            start + _stream(size, epoch * take, (epoch + 1) * take, part, seed)
            for part, (size, take, start) in enumerate(parts)
        ]
    )
    if len(mixture.sizes) > 1:  # a single part's stream is shuffled as it is
        picks = picks[_permutation(len(picks), seed, epoch, _SHUFFLE)]
    picks.flags.writeable = False  # shared by every caller
    return picks


def epoch_order(n: int | Mixture, epoch: int, seed: int) -> list[int]:
    """The records of one epoch, in order: of `n` records a permutation; depends on (n, epoch, seed) alone.

    Raises:
        ValueError: n < 1, or a negative epoch or seed.
    """
    if epoch < 0 or seed < 0:
        raise ValueError(f"need n >= 1, epoch >= 0 and seed >= 0, got n={n}, epoch={epoch}, seed={seed}")
    return _epoch(_mixture(n), epoch, seed).tolist()


def _mixture(n: int | Mixture) -> Mixture:
    return n if isinstance(n, Mixture) else Mixture.whole(n)


def steps_of(epochs: float, n: int, batch_size: int) -> int:
    """Optimizer steps that take epochs of `n` records; the last step may go on into the next epoch."""
    return max(1, math.ceil(epochs * n / batch_size))


def visits(steps: int, batch_size: int, n: int | Mixture, seed: int) -> np.ndarray:
    """How often each record is taken in the first `steps` steps, int64 [records]."""
    mixture = _mixture(n)
    epochs, rest = divmod(steps * batch_size, mixture.epoch)
    counts = []
    for part, (size, take) in enumerate(zip(mixture.sizes, mixture.takes, strict=True)):
        rounds, more = divmod(epochs * take, size)
        count = np.full(size, rounds, dtype=np.int64)
        count[_permutation(size, seed, rounds, part)[:more]] += 1
        counts.append(count)
    whole = np.concatenate(counts)
    np.add.at(whole, _epoch(mixture, epochs, seed)[:rest], 1)
    return whole


def step_indices(step: int, batch_size: int, n: int | Mixture, seed: int) -> list[int]:
    """The `batch_size` records of optimizer step `step` (from 0), by number.

    Raises:
        ValueError: step < 0, or batch_size, n < 1.
    """
    if step < 0 or batch_size < 1 or seed < 0:
        raise ValueError(f"bad step={step}, batch_size={batch_size}, n={n} or seed={seed}")
    mixture = _mixture(n)
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs = positions // mixture.epoch
    parts = [
        _epoch(mixture, epoch, seed)[positions[epochs == epoch] % mixture.epoch]
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1)
    ]
    return np.concatenate(parts).tolist()


def split_step(indices: Sequence[int], rank: int, world_size: int, micro_batch_size: int) -> list[list[int]]:
    """This rank's micro-batches of a step: contiguous shares, as even as possible.

    Every rank gets the same number of micro-batches, so that collectives stay in step; the last
    ones may be smaller or empty.

    Raises:
        ValueError: rank outside [0, world_size), or micro_batch_size < 1.
    """
    if not 0 <= rank < world_size or micro_batch_size < 1:
        raise ValueError(f"bad rank={rank}, world_size={world_size} or micro_batch_size={micro_batch_size}")
    bounds = [len(indices) * r // world_size for r in range(world_size + 1)]
    largest = max(high - low for low, high in itertools.pairwise(bounds))
    share = list(indices[bounds[rank] : bounds[rank + 1]])
    micro_batches = -(-largest // micro_batch_size)
    return [share[m * micro_batch_size : (m + 1) * micro_batch_size] for m in range(micro_batches)]
