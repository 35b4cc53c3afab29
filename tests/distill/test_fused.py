"""The fused loss against the plain definitions in float64: losses, gradients, memory."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from grace.distill.gdkd import (
    confidence_gate,
    dkd_per_token,
    fused_ce_gdkd,
    gated_dkd,
    kl_per_token,
    teacher_gates,
)

CE, KD = 0.01, 0.07


def inputs(tokens: int, vocabulary: int, teacher_vocabulary: int, scale: float = 1.0, seed: int = 0):
    torch.manual_seed(seed)
    hidden, head = torch.randn(tokens, 12) * scale, torch.randn(vocabulary, 12)
    teacher, teacher_head = torch.randn(tokens, 20) * scale, torch.randn(teacher_vocabulary, 20)
    targets = torch.randint(min(vocabulary, teacher_vocabulary), (tokens,))
    return hidden, head, teacher, teacher_head, targets


def oracle(hidden, head, teacher, teacher_head, targets, *, temperature=2.0, tckd=1.0, nckd=4.0, gates=None):
    """(total, grad of hidden, grad of head) in float64 from full logits."""
    hidden, head = (t.detach().double().requires_grad_() for t in (hidden, head))
    shared = min(len(head), len(teacher_head))
    student_TV = hidden @ head.T
    teacher_TV = teacher.double() @ teacher_head[:shared].double().T
    total = CE * F.cross_entropy(student_TV, targets, reduction="sum")
    if nckd is None:
        total = total + KD * kl_per_token(student_TV[:, :shared], teacher_TV, temperature).sum()
    else:
        gate_T = confidence_gate(teacher_TV) if gates is None else gates.double()
        dkd_T = dkd_per_token(student_TV[:, :shared], teacher_TV, targets, temperature, tckd, nckd)
        total = total + KD * (gate_T * dkd_T).sum()
    total.backward()
    return total.detach(), hidden.grad, head.grad


def run(hidden, head, teacher, teacher_head, targets, *, upstream=1.0, **options):
    hidden, head = (t.detach().requires_grad_() for t in (hidden, head))
    total, parts = fused_ce_gdkd(
        hidden, head, teacher, teacher_head, targets, ce_scale=CE, gdkd_scale=KD, **options
    )
    (upstream * total).backward()
    assert hidden.grad is not None and head.grad is not None
    return total.detach(), hidden.grad, head.grad, parts


def close(got: Tensor, expected: Tensor, rel: float = 1e-5) -> None:
    assert torch.isfinite(got).all()
    assert (got.double() - expected).norm() <= rel * expected.norm() + 1e-12


@settings(deadline=None, max_examples=60)
@given(
    tokens=st.integers(0, 9),
    vocabulary=st.integers(2, 40),
    teacher_vocabulary=st.integers(2, 40),
    chunk=st.one_of(st.none(), st.integers(1, 5)),
    temperature=st.sampled_from([1.0, 2.0, 3.5]),
    nckd=st.sampled_from([4.0, 0.25, 0.0, None]),
    tckd=st.sampled_from([1.0, 0.0]),
    scale=st.sampled_from([0.01, 1.0, 8.0]),
    upstream=st.sampled_from([1.0, -3.0]),
)
def test_losses_and_gradients(
    tokens, vocabulary, teacher_vocabulary, chunk, temperature, nckd, tckd, scale, upstream
):
    if nckd is None:
        tckd = 1.0
    data = inputs(tokens, vocabulary, teacher_vocabulary, scale)
    total, grad_hidden, grad_head, _ = run(
        *data, upstream=upstream, chunk=chunk, temperature=temperature, tckd_weight=tckd, nckd_weight=nckd
    )
    expected, expected_hidden, expected_head = oracle(*data, temperature=temperature, tckd=tckd, nckd=nckd)
    close(total, expected)
    close(grad_hidden, upstream * expected_hidden)
    close(grad_head, upstream * expected_head)


def test_parts_add_up_to_the_plain_loss():
    hidden, head, teacher, teacher_head, targets = inputs(37, 50, 50)
    total, _, _, parts = run(hidden, head, teacher, teacher_head, targets, chunk=8)
    student_TV, teacher_TV = hidden @ head.T, teacher @ teacher_head.T
    gate_T = confidence_gate(teacher_TV)
    assert parts.tokens == 37
    close(parts["ce_sum"], F.cross_entropy(student_TV, targets, reduction="sum").double())
    close(parts.gdkd_sum / parts.gate_sum, gated_dkd(student_TV, teacher_TV, targets).double())
    close(parts.gate_sum, gate_T.sum().double())
    close(parts.gate_square_sum, gate_T.square().sum().double())
    close(parts.gate_min, gate_T.min().double())
    close(parts.gate_max, gate_T.max().double())
    close(total, (CE * parts.ce_sum + KD * parts.gdkd_sum).double())
    assert not any(value.requires_grad for value in vars(parts).values())


@pytest.mark.parametrize("shared", [None, 30])
def test_gates_of_the_pre_pass_are_those_of_the_loss(shared):
    hidden, head, teacher, teacher_head, targets = inputs(21, shared or 45, 45)
    gates = teacher_gates(teacher, teacher_head, shared=shared, chunk=4)
    close(gates, confidence_gate((teacher @ teacher_head[:shared].T).double()))
    inside = run(hidden, head, teacher, teacher_head, targets)
    given_ones = run(hidden, head, teacher, teacher_head, targets, gates_T=gates, chunk=7)
    for one, two in zip(inside[:3], given_ones[:3], strict=True):
        close(one, two.double())
    half = run(hidden, head, teacher, teacher_head, targets, gates_T=gates / 2)
    close(half[0], oracle(hidden, head, teacher, teacher_head, targets, gates=gates / 2)[0])


@pytest.mark.parametrize(
    ("dtype", "rel"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3), (torch.float64, 1e-12)]
)
def test_other_dtypes(dtype, rel):
    data = [t.to(dtype) if t.is_floating_point() else t for t in inputs(64, 300, 310)]
    total, grad_hidden, grad_head, _ = run(*data, chunk=16)
    assert grad_hidden.dtype == grad_head.dtype == dtype
    expected = oracle(*data)
    for got, right in zip((total, grad_hidden, grad_head), expected, strict=True):
        close(got, right, rel)


def test_float16_keeps_the_gradients_of_small_scales():
    """A step of a million tokens scales each by 1e-6, below what float16 holds."""
    hidden, head, teacher, teacher_head, targets = (
        t.half() if t.is_floating_point() else t for t in inputs(32, 200, 200)
    )
    grads = []
    for scale in (1.0, 2.0**-20):
        leaf = head.detach().float().requires_grad_()  # float32 latents, as in training
        total, _ = fused_ce_gdkd(
            hidden, leaf, teacher, teacher_head, targets, ce_scale=scale, gdkd_scale=scale
        )
        total.backward()
        assert leaf.grad is not None
        grads.append(leaf.grad)
    assert torch.equal(grads[0] * 2.0**-20, grads[1])


def test_autocast_computes_in_its_dtype_and_gives_gradients_in_the_leaves():
    data = inputs(40, 100, 100)
    with torch.autocast("cpu", torch.bfloat16):
        total, grad_hidden, grad_head, _ = run(*data)
    assert grad_hidden.dtype == grad_head.dtype == torch.float32
    halves = [t.bfloat16() if t.is_floating_point() and i < 2 else t for i, t in enumerate(data)]
    expected = oracle(*halves)
    assert total == pytest.approx(expected[0].item(), rel=1e-2)
    close(grad_head, expected[2], 2e-2)


@pytest.mark.parametrize("margin", [40.0, 80.0, 700.0])
@pytest.mark.parametrize("who", ["teacher", "student", "both"])
@pytest.mark.parametrize("right", [True, False])
def test_extreme_logits(margin, who, right):
    """Hidden states are the logits themselves: the head is the identity."""
    torch.manual_seed(1)
    head = torch.eye(20)
    student, teacher, targets = torch.randn(6, 20), torch.randn(6, 20), torch.arange(6)
    peak = targets if right else targets + 1
    if who != "teacher":
        student[torch.arange(6), peak] += margin
    if who != "student":
        teacher[torch.arange(6), peak] += margin
    total, grad, _, _ = run(student, head, teacher, head, targets)
    expected, expected_grad, _ = oracle(student, head, teacher, head, targets)
    close(total, expected)
    close(grad, expected_grad)


def test_nearly_equal_models_keep_their_digits():
    torch.manual_seed(2)
    head, teacher, targets = torch.eye(30), torch.randn(8, 30) * 3, torch.randint(30, (8,))
    student = teacher + 1e-2 * torch.randn(8, 30)
    hidden = student.detach().requires_grad_()
    total, _ = fused_ce_gdkd(hidden, head, teacher, head, targets, ce_scale=0.0, gdkd_scale=1.0)
    total.backward()
    gate_T = confidence_gate(teacher.double())
    wide = student.double().requires_grad_()
    expected = (gate_T * dkd_per_token(wide, teacher.double(), targets)).sum()
    expected.backward()
    assert hidden.grad is not None and wide.grad is not None
    # A sum of float32 masses is right to some 1e-7, and a KL is made of two such sums: T^2 nckd of it per token.
    assert abs(total.item() - expected.item()) < 2**2 * 4.0 * len(targets) * 1e-7
    close(hidden.grad, wide.grad, 5e-5)  # differences of probabilities that are 1 % apart


def test_equal_models_have_no_divergence():
    hidden, head, _, _, targets = inputs(8, 30, 30)
    leaf = hidden.requires_grad_()
    total, _ = fused_ce_gdkd(leaf, head, hidden.detach(), head, targets, ce_scale=0.0, gdkd_scale=1.0)
    total.backward()
    assert total == 0 and leaf.grad is not None and leaf.grad.abs().max() < 1e-6


def test_cross_entropy_alone():
    hidden, head, _, _, targets = inputs(23, 40, 40)
    hidden, head = hidden.requires_grad_(), head.requires_grad_()
    total, parts = fused_ce_gdkd(hidden, head, None, None, targets, ce_scale=0.5, gdkd_scale=9.0, chunk=4)
    total.backward()
    wide_hidden, wide_head = (t.detach().double().requires_grad_() for t in (hidden, head))
    expected = 0.5 * F.cross_entropy(wide_hidden @ wide_head.T, targets, reduction="sum")
    expected.backward()
    assert hidden.grad is not None and head.grad is not None
    assert wide_hidden.grad is not None and wide_head.grad is not None
    close(total.detach(), expected.detach())
    close(hidden.grad, wide_hidden.grad)
    close(head.grad, wide_head.grad)
    assert parts.gdkd_sum == 0 and parts.gate_sum == 23


@pytest.mark.parametrize("frozen", ["head", "hidden", "both"])
def test_frozen_sides_cost_and_get_nothing(frozen):
    hidden, head, teacher, teacher_head, targets = inputs(9, 30, 30)
    hidden.requires_grad_(frozen == "head")
    head.requires_grad_(frozen == "hidden")
    total, _ = fused_ce_gdkd(hidden, head, teacher, teacher_head, targets, ce_scale=CE, gdkd_scale=KD)
    assert total.requires_grad == (frozen != "both")
    if frozen == "both":
        return
    total.backward()
    expected = oracle(hidden, head, teacher, teacher_head, targets)
    got, right = (hidden.grad, expected[1]) if frozen == "head" else (head.grad, expected[2])
    assert got is not None
    close(got, right)


def test_tied_head_adds_up_with_the_embedding():
    hidden, head, teacher, teacher_head, targets = inputs(9, 30, 30)
    head.requires_grad_()
    embedded = F.embedding(targets, head)
    total, _ = fused_ce_gdkd(
        embedded + hidden, head, teacher, teacher_head, targets, ce_scale=CE, gdkd_scale=KD
    )
    total.backward()
    wide = head.detach().double().requires_grad_()
    student_TV = (F.embedding(targets, wide) + hidden.double()) @ wide.T
    teacher_TV = teacher.double() @ teacher_head.double().T
    plain = CE * F.cross_entropy(student_TV, targets, reduction="sum")
    plain = plain + KD * (confidence_gate(teacher_TV) * dkd_per_token(student_TV, teacher_TV, targets)).sum()
    plain.backward()
    assert head.grad is not None and wide.grad is not None
    close(head.grad, wide.grad)


def test_gradients_are_handed_out_once():
    hidden, head, teacher, teacher_head, targets = inputs(5, 10, 10)
    hidden.requires_grad_()
    total, _ = fused_ce_gdkd(hidden, head, teacher, teacher_head, targets, ce_scale=CE, gdkd_scale=KD)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="hands its gradients out once"):
        total.backward()


def test_nan_reaches_the_loss():
    hidden, head, teacher, teacher_head, targets = inputs(5, 10, 10)
    hidden[2, 3] = math.nan
    total, _ = fused_ce_gdkd(hidden, head, teacher, teacher_head, targets, ce_scale=CE, gdkd_scale=KD)
    assert total.isnan()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets_T": torch.tensor([0, 10])}, "outside the shared vocabulary of 10"),
        ({"targets_T": torch.tensor([-100, 1])}, "outside the shared vocabulary"),
        ({"targets_T": torch.tensor([0])}, "do not fit"),
        ({"teacher_head_VE": None}, "go together"),
        ({"student_head_VD": torch.zeros(10, 3)}, "student hidden states"),
        ({"teacher_hidden_TE": torch.zeros(3, 5)}, "teacher hidden states"),
        ({"gates_T": torch.ones(3)}, "gates"),
        ({"temperature": 0.0}, "must be positive"),
        ({"chunk": 0}, "must be positive"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    arguments = {
        "student_hidden_TD": torch.zeros(2, 4), "student_head_VD": torch.zeros(10, 4), "teacher_hidden_TE": torch.zeros(2, 5),
        "teacher_head_VE": torch.zeros(12, 5), "targets_T": torch.tensor([0, 1]),
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        fused_ce_gdkd(**{**arguments, **change}, ce_scale=CE, gdkd_scale=KD)


class NoLargeTensor(torch.utils._python_dispatch.TorchDispatchMode):
    """Fails where an operation makes more than `limit` elements."""

    def __init__(self, limit: int):
        super().__init__()
        self.limit = limit

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            assert not isinstance(value, Tensor) or value.numel() <= self.limit, (
                f"{func}: {tuple(value.shape)}"
            )
        return result


def test_no_tensor_of_tokens_times_vocabulary():
    hidden, head, teacher, teacher_head, targets = inputs(512, 1000, 1000)
    hidden.requires_grad_(), head.requires_grad_()
    with NoLargeTensor(32 * 1000):
        total, _ = fused_ce_gdkd(
            hidden, head, teacher, teacher_head, targets, ce_scale=CE, gdkd_scale=KD, chunk=32
        )
        total.backward()
        teacher_gates(teacher, teacher_head, chunk=32)
