"""Which positions are supervised, and what is kept of the teacher."""

import pytest
import torch
from torch import Tensor

from grace.distill.gdkd import confidence_gate
from grace.distill.teacher import IGNORE_INDEX, supervised, teacher_signals


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_a_position_predicts_the_label_after_it() -> None:
    hidden_BLD = torch.arange(2 * 5).reshape(2, 5, 1).float()
    labels_BL = torch.full((2, 5), IGNORE_INDEX)
    labels_BL[0, 0] = 9  # nothing comes before it
    labels_BL[0, 3], labels_BL[0, 4], labels_BL[1, 1] = 7, 8, 6
    hidden_TD, targets_T = supervised(hidden_BLD, labels_BL)
    assert hidden_TD.flatten().tolist() == [2, 3, 5]
    assert targets_T.tolist() == [7, 8, 6]


@pytest.mark.parametrize("length", [0, 1, 4])
def test_nothing_supervised_is_empty(length: int) -> None:
    labels_BL = torch.full((2, length), IGNORE_INDEX)
    hidden_TD, targets_T = supervised(torch.zeros(2, length, 3), labels_BL)
    assert hidden_TD.shape == (0, 3) and targets_T.shape == (0,)


def test_gradient_reaches_supervised_positions_only() -> None:
    hidden_BLD = torch.zeros(1, 4, 2, requires_grad=True)
    labels_BL = torch.tensor([[IGNORE_INDEX, IGNORE_INDEX, 3, IGNORE_INDEX]])
    supervised(hidden_BLD, labels_BL)[0].sum().backward()
    assert hidden_BLD.grad is not None
    assert hidden_BLD.grad.sum(-1).tolist() == [[0, 2, 0, 0]]


@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_signals_are_gates_and_usable_images(tokens: int) -> None:
    hidden_TE, head_VE = randn(tokens, 4, seed=0), randn(10, 4, seed=1)
    visual = [randn(5, 4, seed=2), torch.ones(5, 4), randn(1, 4, seed=3), randn(2, 4, seed=4)]
    signals = teacher_signals(hidden_TE, head_VE, visual, 7)
    expected_T = confidence_gate((hidden_TE @ head_VE.T)[:, :7])
    torch.testing.assert_close(signals.gate_T, expected_T)
    assert signals.hidden_TE is hidden_TE
    assert signals.image_count.item() == 2  # one is constant, one has a single token
    assert all(kept is given for kept, given in zip(signals.visual, visual, strict=True))


def test_text_only_has_no_images() -> None:
    signals = teacher_signals(randn(3, 4, seed=0), randn(10, 4, seed=1), (), 10)
    assert signals.visual == () and signals.image_count.item() == 0


def test_signals_carry_no_graph() -> None:
    hidden_TE, head_VE = randn(3, 4, seed=0).requires_grad_(), randn(10, 4, seed=1).requires_grad_()
    assert not teacher_signals(hidden_TE, head_VE, (), 10).gate_T.requires_grad


def test_bfloat16_teacher_gets_float32_gates() -> None:
    hidden_TE, head_VE = randn(3, 4, seed=0).bfloat16(), randn(10, 4, seed=1).bfloat16()
    gate_T = teacher_signals(hidden_TE, head_VE, (), 10).gate_T
    assert gate_T.dtype == torch.float32
    torch.testing.assert_close(gate_T, confidence_gate((hidden_TE @ head_VE.T).float()))
