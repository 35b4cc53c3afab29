"""Gated decoupled KD against a float64 oracle that goes token by token over plain sums.

The oracle never subtracts a probability from 1: the mass of the non-targets is a sum of its own.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from grace.distill.gate import GateShape
from grace.distill.gdkd import confidence_gate, dkd_per_token, gated_dkd, kl_per_token, teacher_gates

INF = torch.inf


def oracle_token(student_V: Tensor, teacher_V: Tensor, y: int, T: float, alpha: float, beta: float) -> Tensor:
    """T^2 (alpha TCKD + beta NCKD) of one token whose logits are float64 and finite."""
    others = [v for v in range(len(student_V)) if v != y]
    if not others:
        return 0 * student_V.sum()

    def parts(logits_V: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scaled_V = logits_V / T
        rest = torch.logsumexp(scaled_V[others], 0)
        odds, zero = scaled_V[y] - rest, rest.new_zeros(())
        return -torch.logaddexp(zero, -odds), -torch.logaddexp(zero, odds), scaled_V[others] - rest

    (t_yes, t_no, t_rest), (s_yes, s_no, s_rest) = parts(teacher_V), parts(student_V)
    tckd = t_yes.exp() * (t_yes - s_yes) + t_no.exp() * (t_no - s_no)
    nckd = (t_rest.exp() * (t_rest - s_rest)).sum()
    return T**2 * (alpha * tckd + beta * nckd)


def oracle_gate(teacher_TV: Tensor) -> Tensor:
    p_TV = torch.softmax(teacher_TV.double(), -1)
    entropy_T = -torch.special.xlogy(p_TV, p_TV).sum(-1)
    return torch.exp(-entropy_T / math.log(teacher_TV.shape[-1]))


def oracle(
    student_TV: Tensor,
    teacher_TV: Tensor,
    targets: list[int],
    T: float = 2.0,
    alpha: float = 1.0,
    beta: float = 4.0,
) -> Tensor:
    """L_GDKD; tokens that the teacher excludes (-inf) are cut out of both distributions."""
    losses = []
    for student_V, teacher_V, y in zip(student_TV.double(), teacher_TV.double(), targets, strict=True):
        kept = [v for v in range(len(teacher_V)) if teacher_V[v] > -INF]
        losses.append(oracle_token(student_V[kept], teacher_V[kept], kept.index(y), T, alpha, beta))
    gate_T = oracle_gate(teacher_TV)
    return (gate_T * torch.stack(losses)).sum() / gate_T.sum()


def check(
    student_TV: Tensor,
    teacher_TV: Tensor,
    targets: list[int],
    T: float = 2.0,
    alpha: float = 1.0,
    beta: float = 4.0,
    rel: float = 1e-5,
    floor: float = 0.0,
) -> None:
    """Value and gradient; `floor` is what the value may be off absolutely."""
    student_TV = student_TV.detach().requires_grad_()
    loss = gated_dkd(student_TV, teacher_TV, torch.tensor(targets), T, alpha, beta)
    loss.backward()
    wide_TV = student_TV.detach().double().requires_grad_()
    expected = oracle(wide_TV, teacher_TV, targets, T, alpha, beta)
    expected.backward()
    assert student_TV.grad is not None and wide_TV.grad is not None
    exact, narrow = student_TV.dtype == torch.float64, student_TV.dtype == torch.bfloat16
    assert loss.dtype == (torch.float64 if exact else torch.float32)
    assert loss.item() == pytest.approx(expected.item(), rel=rel, abs=floor)
    # Gradients are differences of two probabilities times T (alpha + beta).
    rounding = (1e-15 if exact else 1e-6) * T * (alpha + beta)
    torch.testing.assert_close(
        student_TV.grad.double(), wide_TV.grad, rtol=2**-8 if narrow else rel, atol=rounding
    )


def logits(
    tokens: int, vocabulary: int, scale: float, seed: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(tokens, vocabulary, generator=generator, dtype=torch.float64) * scale).to(dtype)


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(1, 5),
    vocabulary=st.integers(2, 40),
    scale=st.sampled_from([0.3, 3.0, 20.0]),
    temperature=st.sampled_from([0.5, 1.0, 2.0, 7.0]),
    alpha=st.sampled_from([0.0, 1.0, 2.5]),
    beta=st.sampled_from([0.0, 1.0, 4.0]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_value_and_gradient(tokens, vocabulary, scale, temperature, alpha, beta, dtype, seed) -> None:
    student_TV = logits(tokens, vocabulary, scale, seed, dtype)
    teacher_TV = logits(tokens, vocabulary, scale, seed + 1, dtype)
    targets = [(seed + 7 * t) % vocabulary for t in range(tokens)]
    exact = dtype == torch.float64
    floor = (1e-14 if exact else 2e-7) * temperature**2 * (alpha + beta)
    rel = 1e-10 if exact else 1e-5
    check(student_TV, teacher_TV, targets, temperature, alpha, beta, rel, floor)


@pytest.mark.parametrize("doubt", [1e-3, 1e-6, 1e-9, 1e-12])
def test_a_teacher_that_is_all_but_certain_keeps_its_digits(doubt: float) -> None:
    # At temperature 1 the teacher gives the target 1 - doubt; float32 cannot even hold 1 - 1e-9.
    teacher_TV = torch.zeros(2, 6)
    teacher_TV[:, 2] = math.log((1 - doubt) / doubt) + math.log(5)
    check(logits(2, 6, 1.0, 0), teacher_TV, [2, 2], T=1.0)
    check(logits(2, 6, 1.0, 0), teacher_TV, [2, 2], T=2.0)
    # Student and teacher both certain: what is left of the divergence is as small as the doubt.
    student_TV = teacher_TV + torch.tensor([0.0, 0.5, 3.0, -0.5, 0.0, 0.0])
    check(student_TV, teacher_TV, [2, 2], T=1.0, beta=0.0)


@pytest.mark.parametrize("signs", [(1, 1), (1, -1), (-1, 1), (-1, -1)])
@pytest.mark.parametrize("magnitude", [80.0, 1000.0])
def test_large_logits(signs: tuple[int, int], magnitude: float) -> None:
    student_TV, teacher_TV = torch.zeros(2, 5), logits(2, 5, 1.0, 1)
    student_TV[:, 1] = signs[0] * magnitude
    teacher_TV[:, 1] = signs[1] * magnitude
    check(student_TV, teacher_TV, [1, 3], T=1.0)
    check(student_TV, teacher_TV, [1, 3], T=2.0)


@pytest.mark.parametrize(("distance", "rel"), [(0.3, 1e-5), (0.1, 1e-5), (0.01, 1e-3)])
@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_a_student_close_to_its_teacher_keeps_its_digits(scale: float, distance: float, rel: float) -> None:
    # The divergence goes with the distance squared, the rounding of log-probabilities does not.
    teacher_TV = logits(4, 1000, scale, 0)
    student_TV = teacher_TV + logits(4, 1000, distance, 1)
    targets = [0, 5, 9, 7]
    check(student_TV, teacher_TV, targets, rel=rel)
    check(student_TV, teacher_TV, targets, beta=0.0, rel=rel)
    kl = kl_per_token(student_TV, teacher_TV).sum().item()
    assert kl == pytest.approx(kl_per_token(student_TV.double(), teacher_TV.double()).sum().item(), rel=rel)


def test_adding_a_constant_to_the_logits_changes_nothing() -> None:
    student_TV, teacher_TV = logits(3, 7, 2.0, 0), logits(3, 7, 2.0, 1)
    targets_T = torch.tensor([0, 3, 6])
    shifted = gated_dkd(student_TV + 64, teacher_TV - 64, targets_T)
    assert shifted.item() == pytest.approx(gated_dkd(student_TV, teacher_TV, targets_T).item(), rel=1e-4)


def test_logits_of_minus_infinity_are_outside_the_vocabulary() -> None:
    student_TV, teacher_TV = logits(3, 9, 2.0, 0), logits(3, 9, 2.0, 1)
    student_TV[:, 6:], teacher_TV[:, 6:] = -INF, -INF
    targets_T = torch.tensor([0, 5, 2])
    inputs_TV = student_TV.clone().requires_grad_()
    dkd_per_token(inputs_TV, teacher_TV, targets_T).sum().backward()
    short_TV = student_TV[:, :6].clone().requires_grad_()
    loss_T = dkd_per_token(short_TV, teacher_TV[:, :6], targets_T)
    loss_T.sum().backward()
    assert inputs_TV.grad is not None and short_TV.grad is not None
    torch.testing.assert_close(dkd_per_token(student_TV, teacher_TV, targets_T), loss_T)
    torch.testing.assert_close(inputs_TV.grad[:, :6], short_TV.grad)
    assert torch.equal(inputs_TV.grad[:, 6:], torch.zeros(3, 3))
    torch.testing.assert_close(
        kl_per_token(student_TV, teacher_TV), kl_per_token(student_TV[:, :6], teacher_TV[:, :6])
    )


def test_a_token_only_the_teacher_excludes_counts_as_probability_zero() -> None:
    student_TV, teacher_TV = logits(1, 4, 1.0, 0, torch.float64), logits(1, 4, 1.0, 1, torch.float64)
    teacher_TV[0, 3] = -INF
    limit_TV = teacher_TV.clone()
    limit_TV[0, 3] = -1e4
    for target in range(4):
        student_TV.grad = None
        student_TV.requires_grad_()
        loss_T = dkd_per_token(student_TV, teacher_TV, torch.tensor([target]))
        loss_T.sum().backward()
        assert student_TV.grad is not None and torch.isfinite(student_TV.grad).all()
        torch.testing.assert_close(loss_T, dkd_per_token(student_TV, limit_TV, torch.tensor([target])))


def test_a_student_that_excludes_what_the_teacher_expects_is_infinitely_far() -> None:
    student_TV, teacher_TV = torch.tensor([[0.0, 1.0, -INF]]), torch.zeros(1, 3)
    assert dkd_per_token(student_TV, teacher_TV, torch.tensor([0])).item() == INF
    assert kl_per_token(student_TV, teacher_TV).item() == INF


def test_nan_is_not_hidden() -> None:
    student_TV = torch.tensor([[0.0, torch.nan, 1.0], [0.0, 1.0, 2.0]])
    loss_T = dkd_per_token(student_TV, torch.zeros(2, 3), torch.tensor([0, 0]))
    assert torch.isnan(loss_T).tolist() == [True, False]


def test_two_tokens_have_no_non_target_divergence() -> None:
    student_TV, teacher_TV = logits(4, 2, 3.0, 0), logits(4, 2, 3.0, 1)
    targets_T = torch.tensor([0, 1, 1, 0])
    assert torch.equal(dkd_per_token(student_TV, teacher_TV, targets_T, tckd_weight=0.0), torch.zeros(4))
    # What is left is the whole KL.
    torch.testing.assert_close(
        dkd_per_token(student_TV, teacher_TV, targets_T), kl_per_token(student_TV, teacher_TV)
    )


def test_one_token_of_vocabulary_has_nothing_to_say() -> None:
    student_TV = torch.tensor([[3.0]], requires_grad=True)
    loss = gated_dkd(student_TV, torch.tensor([[-2.0]]), torch.tensor([0]))
    loss.backward()
    assert loss.item() == 0 and student_TV.grad is not None and student_TV.grad.item() == 0


def test_no_tokens_give_zero_with_a_graph() -> None:
    student_TV = torch.zeros(0, 11, requires_grad=True)
    loss = gated_dkd(student_TV, torch.zeros(0, 11), torch.zeros(0, dtype=torch.long))
    loss.backward()
    assert loss.item() == 0 and student_TV.grad is not None and student_TV.grad.shape == (0, 11)
    assert confidence_gate(torch.zeros(0, 11)).shape == (0,)


def test_student_that_equals_its_teacher_has_no_loss_and_no_gradient() -> None:
    teacher_TV = logits(3, 50, 5.0, 0)
    student_TV = teacher_TV.clone().requires_grad_()
    loss = gated_dkd(student_TV, teacher_TV, torch.tensor([1, 2, 3]))
    loss.backward()
    assert student_TV.grad is not None
    assert loss.item() == pytest.approx(0, abs=1e-7) and student_TV.grad.abs().max().item() < 1e-6


def test_analytic_gradients_are_those_of_finite_differences() -> None:
    student_TV = logits(3, 5, 2.0, 0, torch.float64).requires_grad_()
    teacher_TV, targets_T = logits(3, 5, 2.0, 1, torch.float64), torch.tensor([0, 2, 4])
    assert torch.autograd.gradcheck(lambda s: gated_dkd(s, teacher_TV, targets_T), (student_TV,))
    assert torch.autograd.gradcheck(lambda s: kl_per_token(s, teacher_TV), (student_TV,))


def test_layout_in_memory_does_not_matter() -> None:
    student_VT, teacher_VT = logits(8, 3, 2.0, 0), logits(8, 3, 2.0, 1)
    targets_T = torch.tensor([0, 9, 4, 9, 7, 9])[::2]
    expected = gated_dkd(student_VT.T.contiguous(), teacher_VT.T.contiguous(), targets_T.contiguous())
    torch.testing.assert_close(gated_dkd(student_VT.T, teacher_VT.T, targets_T), expected)


def test_the_teacher_gets_no_gradient() -> None:
    student_TV = logits(2, 5, 1.0, 0).requires_grad_()
    teacher_TV = logits(2, 5, 1.0, 1).requires_grad_()
    gated_dkd(student_TV, teacher_TV, torch.tensor([0, 1])).backward()
    assert teacher_TV.grad is None and not confidence_gate(teacher_TV).requires_grad


def test_plain_kl() -> None:
    student_TV, teacher_TV = logits(4, 30, 3.0, 0), logits(4, 30, 3.0, 1)
    p_TV = torch.softmax(teacher_TV.double() / 2, -1)
    q_TV = torch.softmax(student_TV.double() / 2, -1)
    expected_T = 4 * (p_TV * (p_TV / q_TV).log()).sum(-1)
    torch.testing.assert_close(kl_per_token(student_TV, teacher_TV).double(), expected_T, rtol=1e-5, atol=0)


@settings(max_examples=40, deadline=None)
@given(
    vocabulary=st.integers(2, 60),
    scale=st.sampled_from([0.0, 0.5, 5.0, 80.0]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_gate(vocabulary: int, scale: float, dtype: torch.dtype, seed: int) -> None:
    teacher_TV = logits(3, vocabulary, scale, seed, dtype)
    gate_T = confidence_gate(teacher_TV)
    assert gate_T.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(gate_T.double(), oracle_gate(teacher_TV), rtol=2e-6, atol=0)
    assert ((gate_T >= math.exp(-1) * (1 - 1e-6)) & (gate_T <= 1)).all()


@settings(max_examples=40, deadline=None)
@given(
    vocabulary=st.integers(2, 60),
    scale=st.sampled_from([0.0, 0.5, 5.0, 80.0]),
    sharpness=st.sampled_from([0.0, 0.5, 1.0, 8.0]),
    top_k=st.sampled_from([None, 2, 5, 60]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_other_shapes_of_the_gate(
    vocabulary: int, scale: float, sharpness: float, top_k: int | None, dtype: torch.dtype, seed: int
) -> None:
    """Against plain sums over the sorted logits, here and in the pre-pass of the fused loss."""
    teacher_TV = logits(3, vocabulary, scale, seed, dtype)
    shape = GateShape(sharpness, top_k)
    kept = sorted(range(vocabulary), key=lambda v: -teacher_TV[0, v].item())[: top_k or vocabulary]
    oracle = oracle_gate(teacher_TV[:1, kept]) ** sharpness
    plain_T = confidence_gate(teacher_TV, shape)
    torch.testing.assert_close(plain_T[:1].double(), oracle, rtol=2e-5, atol=0)
    head_VV = torch.eye(vocabulary, dtype=dtype)
    fused_T = teacher_gates(teacher_TV, head_VV, shape=shape, chunk=2)
    assert fused_T.dtype == plain_T.dtype
    torch.testing.assert_close(fused_T, plain_T, rtol=2e-5, atol=0)


def test_gate_at_its_ends() -> None:
    certain_TV = torch.tensor([[0.0, -INF, -INF], [200.0, -200.0, 0.0]])
    assert confidence_gate(certain_TV).tolist() == [1.0, 1.0]
    assert confidence_gate(torch.zeros(1, 17)).item() == pytest.approx(math.exp(-1))
    assert confidence_gate(torch.zeros(2, 1)).tolist() == [1.0, 1.0]
    # The gate looks at temperature 1, whatever the loss uses.
    assert confidence_gate(torch.tensor([[2.0, 0.0]])).item() == pytest.approx(
        oracle_gate(torch.tensor([[2.0, 0.0]])).item(), rel=1e-6
    )


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="vocabulary they share"):
        gated_dkd(torch.zeros(2, 5), torch.zeros(2, 6), torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match="do not fit 2 tokens"):
        gated_dkd(torch.zeros(2, 5), torch.zeros(2, 5), torch.zeros(3, dtype=torch.long))
    for temperature in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="temperature must be positive"):
            kl_per_token(torch.zeros(2, 5), torch.zeros(2, 5), temperature)
