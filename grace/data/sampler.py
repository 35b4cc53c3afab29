"""Which records an optimizer step sees, as pure functions of the step: resume needs no state.

The stream of records is one seeded permutation after another. Step t of batch size B takes
positions [tB, (t+1)B) of the stream, whatever the number of ranks and micro-batches.
"""

import functools
import itertools
import math
from collections.abc import Sequence

import numpy as np


@functools.lru_cache(maxsize=4)
def _permutation(n: int, epoch: int, seed: int) -> np.ndarray:
    order = np.random.default_rng([seed, epoch]).permutation(n)
    order.flags.writeable = False  # shared by every caller
    return order


def epoch_order(n: int, epoch: int, seed: int) -> list[int]:
    """The order of `n` records in one epoch: a permutation that depends on (n, epoch, seed) alone.

    Raises:
        ValueError: n < 1, or a negative epoch or seed.
    """
    if n < 1 or epoch < 0 or seed < 0:
        raise ValueError(f"need n >= 1, epoch >= 0 and seed >= 0, got n={n}, epoch={epoch}, seed={seed}")
    return _permutation(n, epoch, seed).tolist()


def steps_of(epochs: float, n: int, batch_size: int) -> int:
    """Optimizer steps that take `n` records `epochs` times; the last may go on into the next epoch."""
    return max(1, math.ceil(epochs * n / batch_size))


def visits(steps: int, batch_size: int, n: int, seed: int) -> np.ndarray:
    """How often each of `n` records is taken in the first `steps` steps, int64 [n]."""
    epochs, rest = divmod(steps * batch_size, n)
    counts = np.full(n, epochs, dtype=np.int64)
    counts[_permutation(n, epochs, seed)[:rest]] += 1
    return counts


def step_indices(step: int, batch_size: int, n: int, seed: int) -> list[int]:
    """Indices of the `batch_size` records of optimizer step `step` (from 0).

    Raises:
        ValueError: step < 0, or batch_size, n < 1.
    """
    if step < 0 or batch_size < 1 or n < 1 or seed < 0:
        raise ValueError(f"bad step={step}, batch_size={batch_size}, n={n} or seed={seed}")
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs = positions // n
    parts = [
        _permutation(n, int(epoch), seed)[positions[epochs == epoch] % n]
        for epoch in range(epochs[0], epochs[-1] + 1)
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
