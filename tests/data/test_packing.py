"""Packed rows hold every token once, at the model's own positions, and little room is left."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grace.data.batch import collate
from grace.data.packing import collate_packed, pack, pack_evenly, positions_3L
from grace.data.template import Sample


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(0, 120), max_size=60),
    budget=st.integers(1, 150),
    window=st.one_of(st.none(), st.integers(1, 70)),
)
def test_every_sample_is_in_one_row_and_rows_fit(lengths: list[int], budget: int, window: int | None) -> None:
    rows = pack(lengths, budget, window)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    for row in rows:
        assert row and (sum(lengths[i] for i in row) <= budget or len(row) == 1)
        if window is not None:
            assert len({i // window for i in row}) == 1
    assert rows == pack(lengths, budget, window)


def test_no_two_rows_could_be_one() -> None:
    lengths = np.random.default_rng(0).integers(1, 100, 200).tolist()
    loads = sorted(sum(lengths[i] for i in row) for row in pack(lengths, 128))
    assert loads[0] + loads[1] > 128


@pytest.mark.parametrize("budget", [4096, 8192])
def test_rows_of_sharegpt4v_lengths_are_full(budget: int) -> None:
    """Captions of 942 characters on average, a picture of up to 196 tokens; some long conversations."""
    random = np.random.default_rng(1)
    captions = (
        random.lognormal(5.25, 0.4, 8000) + 30 + random.choice([0, 140, 196], 8000, p=[0.02, 0.28, 0.7])
    )
    lengths = (
        np.minimum(np.where(random.random(8000) < 0.05, captions * 5, captions), 4000).astype(int).tolist()
    )
    rows = pack(lengths, budget, window=512)
    assert sum(lengths) / (len(rows) * budget) >= 0.97


@settings(deadline=None)
@given(lengths=st.lists(st.integers(0, 120), max_size=60), budget=st.integers(1, 150))
def test_even_rows_are_as_many_and_no_longer(lengths: list[int], budget: int) -> None:
    plain, even = pack(lengths, budget), pack_evenly(lengths, budget)
    assert sorted(i for row in even for i in row) == list(range(len(lengths)))
    assert len(even) <= len(plain)
    longest = [max((sum(lengths[i] for i in row) for row in rows), default=0) for rows in (plain, even)]
    assert longest[1] <= longest[0] <= max(budget, max(lengths, default=0))


def test_a_ragged_last_row_is_spread_over_all() -> None:
    """A process's 32 records of the published step: some four rows and a bit."""
    random = np.random.default_rng(0)
    full = []
    for _ in range(100):
        lengths = np.minimum(random.lognormal(6.1, 0.4, 32), 4000).astype(int).tolist()
        loads = [sum(lengths[i] for i in row) for row in pack_evenly(lengths, 4096)]
        assert max(loads) <= 4096
        full.append(sum(lengths) / (len(loads) * max(loads)))
    assert sum(full) / len(full) >= 0.97


@pytest.mark.parametrize(("budget", "window"), [(0, None), (8, 0)])
def test_nonsense_is_refused(budget: int, window: int | None) -> None:
    with pytest.raises(ValueError, match="bad budget"):
        pack([1, 2], budget, window)
    with pytest.raises(ValueError, match="negative length"):
        pack([1, -2], 8)


def sample(types: list[int], grids: list[list[int]], name: str = "a", start: int = 10) -> Sample:
    """Tokens of these types, 1 being those of pictures; the last two have labels."""
    ids = torch.arange(start, start + len(types))
    labels = torch.where(torch.arange(len(types)) >= len(types) - 2, ids, -100)
    grid = torch.tensor(grids) if grids else None
    patches = int(grid.prod(-1).sum()) if grid is not None else 0
    pixels = torch.full((patches, 6), float(start)) if patches else None
    return Sample(ids, labels, torch.tensor(types), pixels, grid, name)


SAMPLES = [
    sample([0, 0, 1, 1, 1, 1, 1, 1, 0, 0, 1, 0, 0], [[1, 4, 6], [1, 2, 2]]),
    sample([0] * 5, [], "b", 50),
    sample([0, 1, 1, 0, 0, 0], [[1, 2, 4]], "c", 80),
]


def test_positions_by_hand() -> None:
    """A picture of 2 x 3 tokens at position 2: what follows starts at 5."""
    time, height, width = positions_3L(SAMPLES[0], 2).tolist()
    assert time == [0, 1, 2, 2, 2, 2, 2, 2, 5, 6, 7, 8, 9]
    assert height == [0, 1, 2, 2, 2, 3, 3, 3, 5, 6, 7, 8, 9]
    assert width == [0, 1, 2, 3, 4, 2, 3, 4, 5, 6, 7, 8, 9]


def test_a_row_is_its_samples_side_by_side() -> None:
    packed, padded = collate_packed(SAMPLES, 2), collate(SAMPLES, pad_token_id=0)
    assert packed.attention_mask_BL is None and packed.record_ids == ["a", "b", "c"]
    assert padded.attention_mask_BL is not None and packed.position_ids_3BL is not None
    kept = padded.attention_mask_BL.bool()
    for name in ("input_ids_BL", "labels_BL", "mm_token_type_ids_BL"):
        assert torch.equal(getattr(packed, name)[0], getattr(padded, name)[kept])
    for name in ("pixel_values_PD", "image_grid_thw_N3"):
        assert torch.equal(getattr(packed, name), getattr(padded, name))
    assert packed.position_ids_3BL.shape == (3, 1, 24) and packed.lengths == [13, 5, 6]


def test_text_alone_has_no_pictures() -> None:
    packed = collate_packed([SAMPLES[1]], 2)
    assert packed.pixel_values_PD is None and packed.image_grid_thw_N3 is None


def test_what_cannot_be_packed_is_refused() -> None:
    with pytest.raises(ValueError, match="zero samples"):
        collate_packed([], 2)
    labelled = dataclasses.replace(SAMPLES[1], labels_L=SAMPLES[1].input_ids_L)
    with pytest.raises(ValueError, match="first token has a label"):
        collate_packed([SAMPLES[0], labelled], 2)
