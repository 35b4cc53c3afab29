"""What an optimizer step tells beside its losses: the gates, the CKA of its images, the work that it was.

Everything is a sum over micro-batches and ranks in a vector that is reduced together with the sums that the
loss needs anyway: watching adds no collective and no wait for the device. The smallest and the largest CKA go
through the same sum, each rank having a slot of its own.

Shape suffixes: T supervised tokens, N images, K numbers of a vector, R ranks.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from grace.data.batch import Batch
from grace.distill.gate import GateShape
from grace.distill.objective import LossParts

# A gate is exp(-H / log V), hence in [1/e, 1]: 16 bins of .04. CKA is in [0, 1]: 20 bins of .05.
GATE_BINS, GATE_RANGE = 16, (0.36, 1.0)
CKA_BINS, CKA_RANGE = 20, (0.0, 1.0)
WORK = ("records", "tokens", "token_squares", "positions", "images", "patches", "patch_squares")

Stats = dict[str, float | list[float]]


def histogram(values_N: Tensor, weights_N: Tensor, bins: int, low: float, high: float) -> Tensor:
    """Sum of the weights in each bin [bins] float64; values outside count at the ends. Never waits."""
    index_N = ((values_N.double() - low) * (bins / (high - low))).nan_to_num().long().clamp_(0, bins - 1)
    zeros = torch.zeros(bins, dtype=torch.float64, device=values_N.device)
    return zeros.index_add_(0, index_N, weights_N.double())


# ---------------------------------------------------------------- gates


def gate_sums(gate_T: Tensor) -> Tensor:
    """Of the gates of some tokens [2 + GATE_BINS]: sum of g, sum of -log g, histogram."""
    wide_T = gate_T.double()
    sums = torch.stack([wide_T.sum(), -wide_T.log().sum()])
    return torch.cat([sums, histogram(wide_T, torch.ones_like(wide_T), GATE_BINS, *GATE_RANGE)])


def gate_stats(sums: Sequence[float], shape: GateShape, vocabulary: int) -> Stats:
    """What `gate_sums` amount to: mean gate, the teacher's entropy H = -log(g) log V / k in nats, shares of the bins.

    The entropy is that of the tokens that the gate looks at, and not known where every gate is 1 by design.
    """
    gates, log_gates, *counts = sums
    tokens = math.fsum(counts)
    if not tokens:
        return {}
    stats: Stats = {"gate/mean": gates / tokens, "gate/histogram": [count / tokens for count in counts]}
    if shape.sharpness > 0:
        stats["teacher/entropy"] = log_gates * shape.most(vocabulary) / shape.sharpness / tokens
    return stats


# ---------------------------------------------------------------- images


def image_sums(parts: LossParts) -> Tensor:
    """CKA of a micro-batch's images [CKA_BINS + 2]: histogram, largest 1 - CKA, largest CKA (-inf without images).

    Add up the histograms of micro-batches, and take the maximum of the last two: `add_image_sums`.
    """
    cka_N, compared_N = 1 - parts.relation_N.double(), parts.compared_N.bool()
    counts = histogram(cka_N, compared_N, CKA_BINS, *CKA_RANGE)
    if not len(cka_N):
        return torch.cat([counts, counts.new_full((2,), -math.inf)])
    both_2N = torch.stack([1 - cka_N, cka_N]).masked_fill_(~compared_N, -math.inf)
    return torch.cat([counts, both_2N.amax(-1)])


def no_image_sums(device: torch.device) -> Tensor:
    """`image_sums` of no images."""
    zeros = torch.zeros(CKA_BINS + 2, dtype=torch.float64, device=device)
    zeros[CKA_BINS:] = -math.inf
    return zeros


def add_image_sums(one: Tensor, two: Tensor) -> Tensor:
    """`image_sums` of two micro-batches together."""
    return torch.cat([one[:CKA_BINS] + two[:CKA_BINS], torch.maximum(one[CKA_BINS:], two[CKA_BINS:])])


def in_slots(sums: Tensor, rank: int, ranks: int) -> Tensor:
    """[CKA_BINS + 2 R]: what can be summed over ranks, each one's extremes at its own place."""
    slots = sums.new_zeros(ranks, 2)
    slots[rank] = sums[CKA_BINS:]
    return torch.cat([sums[:CKA_BINS], slots.flatten()])


def image_stats(sums: Sequence[float], relation_sum: float) -> Stats:
    """What the sum of `in_slots` over ranks amounts to; nothing, if no image was compared.

    Args:
        relation_sum: of 1 - CKA over the images.
    """
    counts, slots = sums[:CKA_BINS], sums[CKA_BINS:]
    images = math.fsum(counts)
    if not images:
        return {}
    return {
        "rcka/cka_mean": 1 - relation_sum / images,
        "rcka/cka_min": 1 - max(slots[0::2]),
        "rcka/cka_max": max(slots[1::2]),
        "rcka/cka_histogram": [count / images for count in counts],
    }


# ---------------------------------------------------------------- work


def step_work(batches: Sequence[Batch | None]) -> list[float]:
    """The work of some micro-batches in the order of `WORK`; on the CPU, where batches are made.

    Records; tokens without padding, and the squares of the samples' lengths; positions with padding;
    images, their patches and the squares of these.
    """
    total = [0.0] * len(WORK)
    for batch in batches:
        if batch is None:
            continue
        lengths = batch.lengths
        if lengths is None:
            assert batch.attention_mask_BL is not None  # only packed rows do without
            lengths = batch.attention_mask_BL.sum(-1).tolist()
        grids = batch.image_grid_thw_N3
        patches = [] if grids is None else grids.prod(-1).tolist()
        row = (len(batch.record_ids), sum(lengths), sum(n * n for n in lengths), batch.input_ids_BL.numel(),
               len(patches), sum(patches), sum(n * n for n in patches))  # fmt: skip
        total = [a + b for a, b in zip(total, row, strict=True)]
    return total


def padding_share(work: Sequence[float]) -> float:
    """Share of the positions that are padding."""
    known = dict(zip(WORK, work, strict=True))
    return 1 - known["tokens"] / max(known["positions"], 1.0)
