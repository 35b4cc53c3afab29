"""Cross-entropy, gated distillation and their gradient for rows of logits: one CUDA program per row.

The same function as `grace.distill.rows` (its docstring has the equations), in two passes over the row:
the first takes maxima, masses, the teacher's entropy and the cross term online; the second writes the gradient
over the student's logits. Everything is float32 inside, whatever the logits are.

Runs on a CPU under TRITON_INTERPRET=1.

Names in the kernels: x, t student and teacher logits; top their maximum over the rest (all but the target);
u, a masses at the temperature; `_one` at temperature 1; o log-odds of the target.
Shape suffixes: C tokens, V student vocabulary, S the part of it that the teacher has too.
"""

# pyright: reportGeneralTypeIssues=false
# (what `triton.jit` makes of a function is no Python function to a type checker)

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_SIZE = 4096
WARPS = 16


@triton.jit
def log1p(x):
    """log(1 + x) with its digits near 0 (Kahan): 1 + x is rounded, and so is its logarithm's argument."""
    shifted = 1.0 + x
    return tl.where(shifted == 1.0, x, tl.log(shifted) * (x / tl.where(shifted == 1.0, 1.0, shifted - 1.0)))


@triton.jit
def expm1(x):
    """exp(x) - 1 with its digits near 0 (Kahan)."""
    power = tl.exp(x)
    log = tl.log(power)
    return tl.where(power == 1.0, x, (power - 1.0) * (x / tl.where(log == 0.0, 1.0, log)))


@triton.jit
def softplus(x):
    """log(1 + exp(x)), the negative of log sigmoid(-x)."""
    return tl.maximum(x, 0.0) + log1p(tl.exp(-tl.abs(x)))


@triton.jit
def sigmoid(x):
    small = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, small) / (1.0 + small)


@triton.jit
def binary_kl(teacher, student):
    """KL of two yes/no distributions given by log-odds (`grace.distill.bernoulli`)."""
    both = (teacher == student) & (tl.abs(teacher) == float("inf"))
    teacher = tl.where(both, 0.0, teacher)
    student = tl.where(both, 0.0, student)
    yes = sigmoid(teacher)
    no = sigmoid(-teacher)
    far = tl.where(yes > 0, yes * (softplus(-student) - softplus(-teacher)), 0.0)
    far += tl.where(no > 0, no * (softplus(student) - softplus(teacher)), 0.0)
    step = tl.where(teacher > 0, teacher - student, student - teacher)
    is_near = tl.abs(step) < 0.5
    step = tl.where(is_near, step, 0.0)
    rare = sigmoid(-tl.abs(teacher))
    return tl.where(is_near, log1p(rare * expm1(step)) - rare * step, far)


@triton.jit
def _gate(own, top, mass, moment, log_size):
    """exp(-H / log S) of a row at temperature 1, from its rest's mass and sum of mass * (logit - top)."""
    odds = (own - top) - tl.log(mass)
    yes = sigmoid(odds)
    no = sigmoid(-odds)
    inside = tl.log(mass) - moment / mass
    entropy = yes * softplus(-odds) + tl.where(no > 0, no * (softplus(odds) + inside), 0.0)
    return tl.exp(-entropy / log_size)


@triton.jit
def move(top, block_top, tau):
    """A running maximum over one more block.

    Returns the maximum, the same but 0 while there is none, how far it moved, and by what sums of exponentials at
    the temperature and at temperature 1 shrink for it.
    """
    new_top = tl.maximum(top, block_top)
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    is_first = top == float("-inf")
    shift = tl.where(is_first, 0.0, base - top)
    fade = tl.where(is_first, 0.0, tl.exp(-shift / tau))
    return new_top, base, shift, fade, tl.where(is_first, 0.0, tl.exp(-shift))


@triton.jit
def _teacher_block(t, x_below, both, shift, top, mass, mass_one, moment, cross, tau, SQUARED: tl.constexpr):
    """The teacher's running sums over one more block, in the order they are given in, and `base` of `move`.

    `moment` is the sum of mass * (t - top) at temperature 1, `cross` that of mass * ((t - top) - (x - student's top))
    at the temperature; both maxima may have moved, the student's by `shift`.
    """
    top, base, moved, fade, fade_one = move(top, tl.max(t, 0), tau)
    a = tl.exp((t - base) / tau)
    a_one = a * a if SQUARED else tl.exp(t - base)
    below = tl.where(both, t - base, 0.0)
    moment = (moment - mass_one * moved) * fade_one + tl.sum(a_one * below, 0)
    mass_one = mass_one * fade_one + tl.sum(a_one, 0)
    cross = (cross + mass * (shift - moved)) * fade + tl.sum(a * (below - x_below), 0)
    mass = mass * fade + tl.sum(a, 0)
    return top, mass, mass_one, moment, cross, base


@triton.jit
def rest_block(student_ptr, start, target, vocabulary, BLOCK: tl.constexpr):
    """Some columns of a row: their indices, which of them belong to the rest, and their logits, -inf elsewhere."""
    columns = start + tl.arange(0, BLOCK)
    rest = (columns < vocabulary) & (columns != target)
    return columns, rest, tl.load(student_ptr + columns, mask=rest, other=float("-inf")).to(tl.float32)


@triton.jit
def decoupled(odds, teacher_odds, nckd, tau, tckd_weight, nckd_weight, PLAIN_KL: tl.constexpr):
    """(KD loss, weight of its NCKD, sigmoid(odds) - sigmoid(teacher's odds)) of a row."""
    weight = sigmoid(-teacher_odds) if PLAIN_KL else nckd_weight
    kd = tau * tau * (tckd_weight * binary_kl(teacher_odds, odds) + weight * nckd)
    swapped = sigmoid(-teacher_odds) - sigmoid(-odds)
    return kd, weight, tl.where(teacher_odds > 0, swapped, sigmoid(odds) - sigmoid(teacher_odds))


@triton.jit
def _distance(
    lead, teacher_lead, cross, mass, teacher_mass, tau, tckd_weight, nckd_weight, PLAIN_KL: tl.constexpr
):
    """`decoupled` of a teacher whose logits are all there.

    `lead` is by how much the target's logit exceeds the rest's largest.
    """
    odds = lead / tau - tl.log(mass)
    teacher_odds = teacher_lead / tau - tl.log(teacher_mass)
    nckd = tl.where(teacher_mass == 0, 0.0, cross / (tau * teacher_mass) + tl.log(mass / teacher_mass))
    return decoupled(odds, teacher_odds, nckd, tau, tckd_weight, nckd_weight, PLAIN_KL)


@triton.jit
def _write_gradient(
    student_ptr, teacher_ptr, target, vocabulary, shared, base, teacher_base, tau,
    ce_factor, student_factor, teacher_factor, at_target,
    HAS_TEACHER: tl.constexpr, SQUARED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The second pass: masses again, times their factors, over the student's logits."""
    kind = student_ptr.dtype.element_ty
    for start in range(0, vocabulary, BLOCK):
        columns, rest, x = rest_block(student_ptr, start, target, vocabulary, BLOCK)
        u = tl.exp((x - base) / tau)
        gradient = (u * u if SQUARED else tl.exp(x - base)) * ce_factor
        if HAS_TEACHER:
            both = rest & (columns < shared)
            t = tl.load(teacher_ptr + columns, mask=both, other=float("-inf")).to(tl.float32)
            kd_gradient = u * student_factor - tl.exp((t - teacher_base) / tau) * teacher_factor
            gradient += tl.where(both, kd_gradient, 0.0)
        tl.store(student_ptr + columns, gradient.to(kind), mask=rest)
    tl.store(student_ptr + target, at_target.to(kind))


@triton.jit
def _rows_kernel(
    student_ptr, teacher_ptr, target_ptr, gate_in_ptr, ce_ptr, kd_ptr, gate_ptr,
    student_stride, teacher_stride, vocabulary, shared,
    ce_scale, kd_scale, tau, tckd_weight, nckd_weight, log_size,
    HAS_TEACHER: tl.constexpr, HAS_GATE: tl.constexpr, PLAIN_KL: tl.constexpr, WITH_GRADIENT: tl.constexpr,
    SQUARED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    student_ptr += row * student_stride
    teacher_ptr += row * teacher_stride
    target = tl.load(target_ptr + row)
    top, mass, mass_one, base = float("-inf"), 0.0, 0.0, 0.0
    teacher_top, teacher_mass, teacher_one = float("-inf"), 0.0, 0.0
    moment, cross, teacher_base = 0.0, 0.0, 0.0
    for start in range(0, vocabulary, BLOCK):
        columns, rest, x = rest_block(student_ptr, start, target, vocabulary, BLOCK)
        both = rest & (columns < shared)
        top, base, shift, fade, fade_one = move(top, tl.max(x, 0), tau)
        u = tl.exp((x - base) / tau)
        mass_one = mass_one * fade_one + tl.sum(u * u if SQUARED else tl.exp(x - base), 0)
        mass = mass * fade + tl.sum(tl.where(both, u, 0.0), 0)
        if HAS_TEACHER:
            t = tl.load(teacher_ptr + columns, mask=both, other=float("-inf")).to(tl.float32)
            teacher_top, teacher_mass, teacher_one, moment, cross, teacher_base = _teacher_block(
                t, tl.where(both, x - base, 0.0), both, shift,
                teacher_top, teacher_mass, teacher_one, moment, cross, tau, SQUARED,
            )  # fmt: skip

    own = tl.load(student_ptr + target).to(tl.float32)
    odds_one = (own - base) - tl.log(mass_one)
    wrong = ce_scale * sigmoid(-odds_one)
    ce_factor = tl.where(mass_one == 0, 0.0, wrong / mass_one)  # an empty rest; NaN stays NaN
    kd, gate, at_target, student_factor, teacher_factor = 0.0, 1.0, -wrong, 0.0, 0.0
    if HAS_TEACHER:
        teacher_own = tl.load(teacher_ptr + target).to(tl.float32)
        if HAS_GATE:
            gate = tl.load(gate_in_ptr + row).to(tl.float32)
        else:
            gate = _gate(teacher_own, teacher_base, teacher_one, moment, log_size)
        kd, weight, delta = _distance(
            own - base, teacher_own - teacher_base, cross, mass, teacher_mass, tau, tckd_weight, nckd_weight, PLAIN_KL
        )  # fmt: skip
        factor = kd_scale * tau * gate
        student_factor = tl.where(mass == 0, 0.0, factor * (weight - tckd_weight * delta) / mass)
        teacher_factor = tl.where(teacher_mass == 0, 0.0, factor * weight / teacher_mass)
        at_target += factor * tckd_weight * delta
    tl.store(ce_ptr + row, softplus(-odds_one))
    tl.store(kd_ptr + row, kd)
    tl.store(gate_ptr + row, gate)
    if WITH_GRADIENT:
        _write_gradient(
            student_ptr, teacher_ptr, target, vocabulary, shared, base, teacher_base, tau,
            ce_factor, student_factor, teacher_factor, at_target, HAS_TEACHER, SQUARED, BLOCK,
        )  # fmt: skip


def loss_rows(
    student_CV: Tensor,
    teacher_CS: Tensor | None,
    targets_C: Tensor,
    gate_C: Tensor | None,
    *,
    ce_scale: float,
    kd_scale: float,
    temperature: float,
    tckd_weight: float,
    nckd_weight: float | None,
    shared: int,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy, KD and gate of every row, float32 [C] each; the gradient overwrites `student_CV`.

    Arguments and meaning are those of `grace.distill.rows.loss_rows`, its settings spelt out.

    Raises:
        ValueError: rows that are not contiguous, or float64, which would be computed in float32.
    """
    tokens, vocabulary = student_CV.shape
    for logits in (student_CV, teacher_CS):
        if logits is not None and (logits.dtype == torch.float64 or (tokens and logits.stride(1) != 1)):
            raise ValueError("logits must have contiguous rows of float32, bfloat16 or float16")
    ce_C, kd_C, gate_out_C = (student_CV.new_empty(tokens, dtype=torch.float32) for _ in range(3))
    if not tokens:
        return ce_C, kd_C, gate_out_C
    has_teacher = teacher_CS is not None
    teacher = student_CV if teacher_CS is None else teacher_CS
    tau = temperature if has_teacher else 1.0
    kernel: Any = _rows_kernel  # a launcher's keywords are unknown to a type checker
    kernel[(tokens,)](
        student_CV, teacher, targets_C, targets_C if gate_C is None else gate_C, ce_C, kd_C, gate_out_C,
        student_CV.stride(0), teacher.stride(0), vocabulary, shared if has_teacher else vocabulary,
        ce_scale, kd_scale, tau, tckd_weight, 0.0 if nckd_weight is None else nckd_weight,
        math.log(max(2, shared)),
        HAS_TEACHER=has_teacher, HAS_GATE=gate_C is not None, PLAIN_KL=nckd_weight is None,
        WITH_GRADIENT=with_gradient, SQUARED=tau == 2.0, BLOCK=block_size(vocabulary), num_warps=WARPS,
    )  # fmt: skip
    return ce_C, kd_C, gate_out_C


def block_size(vocabulary: int) -> int:
    """Columns of a row that a program takes at a time."""
    return min(BLOCK_SIZE, 1 << max(0, vocabulary - 1).bit_length())
