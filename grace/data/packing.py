"""Samples side by side in one row, without padding and without attention from one to another.

A row carries the positions of its tokens and the lengths of its samples, by which the attention keeps them apart
(`grace.models.attention`). Nothing is ever cut: a sample is in a row with all of its tokens, an image span with it.

Shape suffixes: B rows, L tokens of a row, 3 (time, height, width).
"""

import bisect
from collections.abc import Sequence

import torch
from torch import Tensor

from grace.data.batch import Batch
from grace.data.template import IGNORED, IMAGE_TOKEN_TYPE, Sample


def pack(lengths: Sequence[int], budget: int, window: int | None = None) -> list[list[int]]:
    """Samples by index, in rows of at most `budget` tokens: the longest first, each where it fits best.

    Args:
        lengths: tokens of each sample; one that exceeds the budget gets a row of its own.
        window: samples looked at together, in the order given; None is all of them.

    Raises:
        ValueError: budget or window below 1, or a negative length.
    """
    if budget < 1 or (window is not None and window < 1) or any(length < 0 for length in lengths):
        raise ValueError(f"bad budget={budget}, window={window} or a negative length")
    size = window or max(1, len(lengths))
    return [
        [start + i for i in row]
        for start in range(0, len(lengths), size)
        for row in _best_fit(lengths[start : start + size], budget)
    ]


def pack_evenly(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """As few rows as `pack` needs for these samples, and none longer than it must be for that.

    A step's records rarely fill whole rows: the remainder, which `pack` leaves to the last row, is spread over all. So
    the longest row, which decides over memory, is the shortest there can be, and the micro-batches take as long as each
    other, which matters where processes wait for each other after each. A sample that exceeds the budget keeps its row of
    its own and makes no other row longer.
    """
    rows = pack(lengths, budget)
    fitting = [length for length in lengths if length <= budget]
    if len(rows) < 2 or not fitting:
        return rows

    def longest(rows: Sequence[Sequence[int]]) -> int:
        return max(total for row in rows if (total := sum(lengths[i] for i in row)) <= budget)

    low, high = max(-(-sum(fitting) // len(rows)), 1), longest(rows)
    while low < high:  # the smallest budget that search finds to need no more rows
        middle = (low + high) // 2
        tried = pack(lengths, middle)
        if len(tried) <= len(rows) and longest(tried) <= high:
            rows, high = tried, middle
        else:
            low = middle + 1
    return rows


def _best_fit(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Best fit decreasing: each sample goes where it leaves the least room."""
    rows: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (tokens left, row), ascending
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect.bisect_left(rooms, (lengths[i], -1))
        if at < len(rooms):
            room, row = rooms.pop(at)
        else:
            room, row = budget, len(rows)
            rows.append([])
        rows[row].append(i)
        bisect.insort(rooms, (room - lengths[i], row))
    return rows


def collate_packed(samples: Sequence[Sample], merge_size: int) -> Batch:
    """One row of all samples, in order.

    Args:
        merge_size: patches along an edge of what one visual token stands for.

    Raises:
        ValueError: no samples, or one whose first token has a label: the sample before it would be asked for it.
    """
    if not samples:
        raise ValueError("cannot pack zero samples")
    if any(len(sample.labels_L) and sample.labels_L[0] != IGNORED for sample in samples):
        raise ValueError("a sample's first token has a label, which nothing before it could predict")

    def row(parts: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(parts)).unsqueeze(0)

    pixels = [sample.pixel_values_PD for sample in samples if sample.pixel_values_PD is not None]
    grids = [sample.image_grid_thw_N3 for sample in samples if sample.image_grid_thw_N3 is not None]
    return Batch(
        input_ids_BL=row([sample.input_ids_L for sample in samples]),
        attention_mask_BL=None,
        mm_token_type_ids_BL=row([sample.mm_token_type_ids_L for sample in samples]),
        labels_BL=row([sample.labels_L for sample in samples]),
        pixel_values_PD=torch.cat(pixels) if pixels else None,
        image_grid_thw_N3=torch.cat(grids) if grids else None,
        record_ids=[sample.record_id for sample in samples],
        position_ids_3BL=torch.cat([positions_3L(sample, merge_size) for sample in samples], 1).unsqueeze(1),
        lengths=[len(sample.input_ids_L) for sample in samples],
    )


def positions_3L(sample: Sample, merge_size: int) -> Tensor:
    """(Time, height, width) of every token, int64, as Qwen3-VL counts them.

    A picture's tokens lie on a grid that starts at the next free position on all three axes; what comes after it
    starts where its longer side ends.
    """
    length = len(sample.input_ids_L)
    is_image_L = sample.mm_token_type_ids_L == IMAGE_TOKEN_TYPE
    grids = [] if sample.image_grid_thw_N3 is None else sample.image_grid_thw_N3.tolist()
    found_3L = torch.empty(3, length, dtype=torch.int64)
    starts = (is_image_L & ~is_image_L.roll(1)).nonzero().flatten().tolist() if length else []
    at = position = 0
    for start, (frames, height, width) in zip(starts, grids, strict=True):
        found_3L[:, at:start] = torch.arange(position, position + start - at)
        position += start - at
        rows, columns = height // merge_size, width // merge_size
        grid = torch.cartesian_prod(*(torch.arange(n) for n in (frames, rows, columns)))
        at = start + len(grid)
        found_3L[:, start:at] = grid.T + position
        position += max(rows, columns)
    found_3L[:, at:] = torch.arange(position, position + length - at)
    return found_3L
