"""What a step tells of gates, images and work: against numpy, and however the step is cut."""

import math

import numpy as np
import pytest
import torch

from grace import step_stats
from grace.data.batch import Batch
from grace.distill.gate import PUBLISHED, GateShape
from grace.distill.objective import LossParts


def parts(relation: list[float], compared: list[bool]) -> LossParts:
    zero = torch.zeros(())
    loss, valid = torch.tensor(relation), torch.tensor(compared, dtype=torch.bool)
    return LossParts(zero, zero, loss.sum(), zero, zero, (~valid).sum(), loss, valid)


def reduced(rank_batches: list[list[LossParts]]) -> list[float]:
    """What all ranks get: each one's micro-batches joined, and their slots summed."""
    vectors = []
    for rank, batches in enumerate(rank_batches):
        seen = step_stats.no_image_sums(torch.device("cpu"))
        for one in batches:
            seen = step_stats.add_image_sums(seen, step_stats.image_sums(one))
        vectors.append(step_stats.in_slots(seen, rank, len(rank_batches)))
    return torch.stack(vectors).sum(0).tolist()


def test_gates():
    gates = torch.tensor([0.3679, 0.41, 0.9, 0.95, 0.999, 1.0])
    sums = step_stats.gate_sums(gates[:2]) + step_stats.gate_sums(gates[2:])
    found = step_stats.gate_stats(sums.tolist(), PUBLISHED, 512)
    expected, _ = np.histogram(gates.numpy(), step_stats.GATE_BINS, step_stats.GATE_RANGE)
    assert found["gate/histogram"] == pytest.approx((expected / 6).tolist())
    assert found["gate/mean"] == pytest.approx(gates.mean().item())
    assert found["teacher/entropy"] == pytest.approx((-gates.log() * math.log(512)).mean().item(), rel=1e-5)


def test_the_entropy_behind_other_gates():
    """It is that of the tokens looked at, whatever the sharpness; gates that are all 1 do not tell it."""
    entropy = torch.tensor([0.1, 0.9, 2.0])
    for shape, most in ((GateShape(8.0), math.log(512)), (GateShape(3.0, 16), math.log(16))):
        sums = step_stats.gate_sums(torch.exp(-shape.sharpness * entropy / most))
        stats = step_stats.gate_stats(sums.tolist(), shape, 512)
        assert stats["teacher/entropy"] == pytest.approx(1.0, rel=1e-5)
    off = step_stats.gate_stats(step_stats.gate_sums(torch.ones(4)).tolist(), GateShape(0.0), 512)
    assert off["gate/mean"] == 1 and "teacher/entropy" not in off


def test_no_tokens_tell_nothing():
    assert step_stats.gate_stats(step_stats.gate_sums(torch.ones(0)).tolist(), PUBLISHED, 512) == {}


def test_images_however_they_are_shared_out():
    losses = [0.02, 0.5, 0.11, 0.0, 0.31]
    valid = [True, True, True, False, True]  # the fourth is degenerate: its 0 is no CKA of 1
    cuts = [
        [[parts(losses, valid)]],
        [
            [parts(losses[:1], valid[:1]), parts([], [])],
            [parts(losses[1:4], valid[1:4]), parts(losses[4:], valid[4:])],
        ],
        [[parts(losses, valid)], []],
    ]
    cka = 1 - np.array(losses)[valid]
    expected, _ = np.histogram(cka, step_stats.CKA_BINS, step_stats.CKA_RANGE)
    for cut in cuts:
        found = step_stats.image_stats(reduced(cut), sum(losses))
        assert found["rcka/cka_mean"] == pytest.approx(cka.mean())
        assert found["rcka/cka_min"] == pytest.approx(0.5) and found["rcka/cka_max"] == pytest.approx(0.98)
        assert found["rcka/cka_histogram"] == pytest.approx((expected / 4).tolist())


@pytest.mark.parametrize("batches", [[], [parts([], [])], [parts([0.0, 0.0], [False, False])]])
def test_no_image_compared_tells_nothing(batches):
    assert step_stats.image_stats(reduced([batches, []]), 0.0) == {}


def batch(lengths: list[int], packed: bool, grids: list[list[int]]) -> Batch:
    longest = sum(lengths) if packed else max(lengths)
    ids = torch.zeros(1 if packed else len(lengths), longest, dtype=torch.long)
    mask = None if packed else (torch.arange(longest) < torch.tensor(lengths)[:, None]).long()
    grid = torch.tensor(grids) if grids else None
    names = [str(i) for i in range(len(lengths))]
    return Batch(ids, mask, ids, ids, None, grid, names, lengths=lengths if packed else None)


def test_work_of_packed_and_padded_batches():
    padded = step_stats.step_work([batch([3, 5], False, [[1, 4, 6]]), None])
    packed = step_stats.step_work([batch([3, 5], True, [[1, 4, 6]])])
    known = dict(zip(step_stats.WORK, padded, strict=True))
    assert known == {
        "records": 2, "tokens": 8, "token_squares": 34, "positions": 10,
        "images": 1, "patches": 24, "patch_squares": 576,
    }  # fmt: skip
    assert dict(zip(step_stats.WORK, packed, strict=True)) == {**known, "positions": 8}
    assert step_stats.padding_share(padded) == pytest.approx(0.2)
    assert step_stats.padding_share(packed) == 0
    both = step_stats.step_work([batch([3, 5], False, [[1, 4, 6]]), batch([2], True, [])])
    assert both[0] == 3 and both[1] == 10
