"""Relational CKA against the textbook form in float64, with the centring matrix written out."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from grace.distill.rcka import gram_is_degenerate, rcka_loss, rcka_per_image, rcka_per_image_plain


def gram_oracle(visual: Tensor) -> Tensor:
    """H V V^T H of the l2-normalised rows, float64."""
    rows = visual.double()
    rows = rows / rows.norm(dim=-1, keepdim=True)
    n = rows.shape[0]
    centre = torch.eye(n, dtype=torch.float64) - torch.ones(n, n, dtype=torch.float64) / n
    return centre @ (rows @ rows.T) @ centre


def oracle(student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    """Mean over images of 1 - <K_T, K_S> / (|K_T| |K_S|)."""
    losses = []
    for s, t in zip(student, teacher, strict=True):
        k_s, k_t = gram_oracle(s), gram_oracle(t)
        losses.append(1 - (k_s * k_t).sum() / (k_s.norm() * k_t.norm()))
    return torch.stack(losses).mean()


def tokens(n: int, d: int, seed: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(n, d, generator=generator, dtype=torch.float64) * scale).to(dtype)


def check(student: list[Tensor], teacher: list[Tensor], rel: float = 1e-5, floor: float = 1e-6) -> None:
    """Value and gradients; `floor` is relative to the largest gradient."""
    student = [s.detach().requires_grad_() for s in student]
    loss = rcka_loss(student, teacher)
    loss.backward()
    wide = [s.detach().double().requires_grad_() for s in student]
    expected = oracle(wide, teacher)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=rel, abs=1e-7)
    for s, w in zip(student, wide, strict=True):
        assert s.grad is not None and w.grad is not None and s.grad.dtype == s.dtype
        narrow = s.dtype == torch.bfloat16
        torch.testing.assert_close(
            s.grad.double(), w.grad, rtol=2**-8 if narrow else rel, atol=floor * w.grad.abs().max().item()
        )


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(3, 12), min_size=1, max_size=4),
    d_student=st.integers(2, 20),
    d_teacher=st.integers(2, 20),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_value_and_gradient(sizes, d_student, d_teacher, scale, dtype, seed) -> None:
    student = [tokens(n, d_student, seed + i, scale, dtype) for i, n in enumerate(sizes)]
    teacher = [tokens(n, d_teacher, seed + 100 + i, scale, dtype) for i, n in enumerate(sizes)]
    exact = dtype == torch.float64
    check(student, teacher, rel=1e-9 if exact else 2e-5, floor=1e-10 if exact else 1e-5)


def test_many_tokens_of_images_of_different_sizes() -> None:
    sizes = [(5, 8), (196, 64), (33, 64)]
    check(
        [tokens(n, d, i) for i, (n, d) in enumerate(sizes)],
        [tokens(n, 2 * d, 10 + i) for i, (n, d) in enumerate(sizes)],
    )


def test_the_plain_form_is_the_textbook_one() -> None:
    student = [tokens(n, 8, n, dtype=torch.float64).requires_grad_() for n in (3, 40)]
    teacher = [tokens(n, 5, 10 + n, dtype=torch.float64) for n in (3, 40)]
    loss_N, valid_N = rcka_per_image_plain(student, teacher)
    expected = oracle(student, teacher)
    assert valid_N.all() and loss_N.mean().item() == pytest.approx(expected.item(), rel=1e-12)
    for grad, wide in zip(
        torch.autograd.grad(loss_N.mean(), student), torch.autograd.grad(expected, student), strict=True
    ):
        torch.testing.assert_close(grad, wide, rtol=1e-9, atol=1e-12)


def test_every_image_counts_the_same_whatever_its_size() -> None:
    student, teacher = [tokens(4, 8, 0), tokens(40, 8, 1)], [tokens(4, 8, 2), tokens(40, 8, 3)]
    one, two = (rcka_loss([s], [t]).item() for s, t in zip(student, teacher, strict=True))
    assert rcka_loss(student, teacher).item() == pytest.approx((one + two) / 2, rel=1e-6)


def test_the_same_relations_cost_nothing() -> None:
    teacher = tokens(12, 16, 0)
    rotation, _ = torch.linalg.qr(tokens(16, 16, 1))
    lengths = 1 + tokens(12, 1, 2).abs()
    assert rcka_loss([teacher @ rotation * lengths], [teacher]).item() == pytest.approx(0, abs=1e-6)


def test_nearly_the_same_relations_keep_their_digits() -> None:
    # The loss is about 1e-8 here: 1 - CKA in float32 would have no digit of it.
    teacher = [tokens(12, 16, 0)]
    student = [teacher[0] + tokens(12, 16, 1, scale=1e-4)]
    assert rcka_loss(student, teacher).item() == pytest.approx(oracle(student, teacher).item(), rel=1e-2)
    assert oracle(student, teacher).item() < 1e-7


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_lengths_that_cannot_be_squared_in_float32(scale: float) -> None:
    student, teacher = [tokens(6, 8, 0)], [tokens(6, 8, 1)]
    expected = rcka_loss(student, teacher).item()
    huge = (student[0] * scale).requires_grad_()
    loss = rcka_loss([huge], [teacher[0] * scale])
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert huge.grad is not None and torch.isfinite(huge.grad).all()


def test_analytic_gradients_are_those_of_finite_differences() -> None:
    student = tokens(5, 4, 0, dtype=torch.float64).requires_grad_()
    teacher = tokens(5, 6, 1, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda s: rcka_loss([s], [teacher]), (student,))


DEGENERATE = {
    "constant": torch.full((6, 8), 0.3),
    "constant row": tokens(1, 8, 5).expand(6, 8),
    "same direction": tokens(1, 8, 5) * torch.arange(1.0, 7.0)[:, None],
    "zeros": torch.zeros(6, 8),
    "bfloat16": tokens(1, 8, 5, dtype=torch.bfloat16).expand(6, 8),
}


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("kind", DEGENERATE)
def test_degenerate_image_contributes_nothing(kind: str, side: str) -> None:
    good_student, good_teacher = tokens(9, 8, 0).requires_grad_(), tokens(9, 8, 1)
    flat, other = DEGENERATE[kind].clone().requires_grad_(), tokens(6, 8, 2).requires_grad_()
    student, teacher = (flat, other.detach()) if side == "student" else (other, flat.detach())
    loss_N, valid_N = rcka_per_image([good_student, student], [good_teacher, teacher])
    assert valid_N.tolist() == [True, False] and loss_N[1].item() == 0
    loss = rcka_loss([good_student, student], [good_teacher, teacher])
    assert loss.item() == pytest.approx(oracle([good_student], [good_teacher]).item(), rel=1e-5)
    loss.backward()
    assert student.grad is not None and torch.equal(student.grad, torch.zeros_like(student))
    assert good_student.grad is not None and good_student.grad.abs().max() > 0
    assert gram_is_degenerate(flat).item() and not gram_is_degenerate(good_teacher).item()


@pytest.mark.parametrize("n", [0, 1])
def test_image_of_one_token_or_none_contributes_nothing(n: int) -> None:
    student = tokens(n, 8, 0).requires_grad_()
    loss = rcka_loss([student], [tokens(n, 5, 1)])
    loss.backward()
    assert loss.item() == 0
    assert student.grad is not None and torch.equal(student.grad, torch.zeros(n, 8))
    assert gram_is_degenerate(student).item()


def test_no_images_give_zero() -> None:
    assert rcka_loss([], []).item() == 0
    loss_N, valid_N = rcka_per_image([], [])
    assert loss_N.shape == valid_N.shape == (0,)


def test_one_zero_token_among_others_gets_no_gradient() -> None:
    student = tokens(5, 8, 0)
    student[2] = 0
    student.requires_grad_()
    loss = rcka_loss([student], [tokens(5, 8, 1)])
    loss.backward()
    assert math.isfinite(loss.item()) and student.grad is not None
    assert torch.isfinite(student.grad).all() and torch.equal(student.grad[2], torch.zeros(8))


def test_two_tokens_have_one_relation_only() -> None:
    # Every centred 2 x 2 Gram is a multiple of [[1, -1], [-1, 1]]: always alike.
    assert rcka_loss([tokens(2, 8, 0)], [tokens(2, 5, 1)]).item() == pytest.approx(0, abs=1e-6)


def test_nan_is_not_taken_for_degenerate() -> None:
    student = tokens(4, 8, 0)
    student[1, 1] = torch.nan
    loss_N, valid_N = rcka_per_image([student], [tokens(4, 8, 1)])
    assert torch.isnan(loss_N).all() and valid_N.all()


def test_layout_in_memory_and_autocast_do_not_matter() -> None:
    student, teacher = tokens(8, 6, 0), tokens(8, 6, 1)
    expected = rcka_loss([student.T], [teacher.T])
    torch.testing.assert_close(rcka_loss([student.T.contiguous()], [teacher.T.contiguous()]), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(rcka_loss([student.T], [teacher.T]), expected)


def test_the_teacher_gets_no_gradient() -> None:
    student, teacher = tokens(4, 8, 0).requires_grad_(), tokens(4, 8, 1).requires_grad_()
    rcka_loss([student], [teacher]).backward()
    assert teacher.grad is None and student.grad is not None


def test_oracle_agrees_with_a_value_worked_out_by_hand() -> None:
    # Three orthonormal rows: K_c = I - 1/3, norm sqrt(2). Rows e1, e1, e2: K_c = u u^T with
    # u = (1, 1, -2) / 3, times 2, norm 4/3. <.,.> = 2 u^T u = 4/3. CKA = 1 / sqrt(2).
    student, teacher = torch.eye(3), torch.eye(3)[[0, 0, 1]]
    expected = 1 - 1 / np.sqrt(2)
    assert oracle([student], [teacher]).item() == pytest.approx(expected, rel=1e-12)
    assert rcka_loss([student], [teacher]).item() == pytest.approx(expected, rel=1e-6)


def test_images_that_do_not_pair_up_are_refused() -> None:
    with pytest.raises(ValueError, match="1 images of the student against 0 of the teacher"):
        rcka_loss([tokens(2, 3, 0)], [])
    with pytest.raises(ValueError, match="do not pair up"):
        rcka_loss([tokens(2, 3, 0)], [tokens(3, 3, 0)])
    with pytest.raises(ValueError, match="do not pair up"):
        rcka_loss([tokens(2, 3, 0)[None]], [tokens(2, 3, 0)])
