"""Order is a pure function of the step, and no cut of a step changes which records it sees."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grace.data.sampler import Mixture, epoch_order, split_step, step_indices, taken_of, visits


@given(n=st.integers(1, 50), batch_size=st.integers(1, 70), seed=st.integers(0, 5))
def test_steps_are_consecutive_slices_of_one_stream(n: int, batch_size: int, seed: int) -> None:
    steps = 4
    epochs = -(-steps * batch_size // n)
    stream = [index for epoch in range(epochs) for index in epoch_order(n, epoch, seed)]
    for step in reversed(range(steps)):  # any step on its own, in any order
        assert step_indices(step, batch_size, n, seed) == stream[step * batch_size : (step + 1) * batch_size]


def test_epochs_are_different_permutations_and_seeds_matter() -> None:
    orders = [epoch_order(100, epoch, seed) for epoch in range(3) for seed in range(3)]
    assert all(sorted(order) == list(range(100)) for order in orders)
    assert len({tuple(order) for order in orders}) == 9
    assert epoch_order(100, 1, 2) == epoch_order(100, 1, 2)


def test_the_order_never_changes() -> None:
    # A stored value: a different order would silently change every resumed run.
    assert epoch_order(10, 0, 0) == FIRST_ORDER
    assert step_indices(2, 4, 10, 0)[:2] == FIRST_ORDER[8:]


FIRST_ORDER = [4, 6, 2, 7, 3, 5, 9, 0, 8, 1]


def test_callers_cannot_spoil_the_order() -> None:
    epoch_order(10, 0, 0).reverse()
    step_indices(0, 10, 10, 0).reverse()
    assert epoch_order(10, 0, 0) == FIRST_ORDER


@given(size=st.integers(0, 40), world_size=st.integers(1, 7), micro=st.integers(1, 9))
def test_ranks_share_a_step_without_loss_or_overlap(size: int, world_size: int, micro: int) -> None:
    indices = list(range(100, 100 + size))
    shares = [split_step(indices, rank, world_size, micro) for rank in range(world_size)]
    assert [index for share in shares for batch in share for index in batch] == indices
    assert len({len(share) for share in shares}) == 1
    assert all(len(batch) <= micro for share in shares for batch in share)
    sizes = [sum(map(len, share)) for share in shares]
    assert max(sizes) - min(sizes) <= 1
    assert len(shares[0]) == -(-max(sizes) // micro)


def test_uneven_step_leaves_the_last_micro_batch_empty() -> None:
    assert split_step([1, 2, 3], 0, 2, 1) == [[1], []]
    assert split_step([1, 2, 3], 1, 2, 1) == [[2], [3]]
    assert split_step([1, 2, 3, 4, 5, 6, 7, 8], 1, 2, 2) == [[5, 6], [7, 8]]


@pytest.mark.parametrize(
    "call",
    [
        lambda: epoch_order(0, 0, 0),
        lambda: epoch_order(3, -1, 0),
        lambda: step_indices(-1, 4, 10, 0),
        lambda: step_indices(0, 0, 10, 0),
        lambda: step_indices(0, 4, 0, 0),
        lambda: split_step([1], 2, 2, 1),
        lambda: split_step([1], 0, 1, 0),
    ],
)
def test_impossible_arguments(call: object) -> None:
    with pytest.raises(ValueError, match=r"need n >= 1|bad (step|rank)="):
        call()  # type: ignore[operator]


MIXTURES = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 30)), min_size=1, max_size=4).map(
    lambda parts: Mixture(*zip(*parts, strict=True))  # type: ignore[arg-type]
)


@given(mixture=MIXTURES, batch_size=st.integers(1, 70), seed=st.integers(0, 5))
def test_steps_of_a_mixture_are_slices_of_its_epochs(mixture: Mixture, batch_size: int, seed: int) -> None:
    steps = 4
    epochs = -(-steps * batch_size // mixture.epoch)
    stream = [index for epoch in range(epochs) for index in epoch_order(mixture, epoch, seed)]
    for step in reversed(range(steps)):
        got = step_indices(step, batch_size, mixture, seed)
        assert got == stream[step * batch_size : (step + 1) * batch_size]
    counts = visits(steps, batch_size, mixture, seed).tolist()
    seen = stream[: steps * batch_size]
    assert counts == [seen.count(i) for i in range(sum(mixture.sizes))]


@given(mixture=MIXTURES, seed=st.integers(0, 5))
def test_every_epoch_takes_its_share_of_each_part_and_none_again_before_all(
    mixture: Mixture, seed: int
) -> None:
    parts = list(zip(mixture.starts, mixture.sizes, mixture.takes, strict=True))
    taken = np.zeros(sum(mixture.sizes), dtype=int)
    for epoch in range(5):
        order = epoch_order(mixture, epoch, seed)
        for start, size, take in parts:
            assert sum(start <= i < start + size for i in order) == take
        taken += np.bincount(order, minlength=len(taken))
        for start, size, _ in parts:
            part = taken[start : start + size]
            assert part.max() - part.min() <= 1


def test_a_mixture_is_mixed_and_its_order_never_changes() -> None:
    mixture = Mixture((6, 4), (3, 4))
    assert [epoch_order(mixture, epoch, 0) for epoch in range(2)] == MIXED
    assert epoch_order(Mixture((10,), (10,)), 0, 0) == FIRST_ORDER
    order = np.array(epoch_order(Mixture((1000, 1000), (1000, 1000)), 0, 1))
    assert 400 < (order[:1000] < 1000).sum() < 600
    assert epoch_order(mixture, 0, 0) != epoch_order(mixture, 0, 1)


MIXED = [[5, 8, 9, 3, 2, 6, 7], [4, 1, 8, 6, 7, 9, 0]]


@pytest.mark.parametrize(
    ("n", "weight", "cap", "taken"),
    [(10, 1.0, None, 10), (10, 0.1, None, 1), (25, 0.1, None, 3), (3, 0.01, None, 1), (10, 2.5, None, 25),
     (10, 1.0, 4, 4), (10, 1.0, 40, 10), (10, 2.0, 15, 15)],
)  # fmt: skip
def test_weights_and_caps(n: int, weight: float, cap: int | None, taken: int) -> None:
    assert taken_of(n, weight, cap) == taken
