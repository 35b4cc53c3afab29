"""The loss against a teacher of which only the likeliest tokens are known: one CUDA program per row.

The same function as `grace.distill.rows` with `TopKRows`, in the two passes and with the pieces of
`grace.kernels.gdkd_triton`. The K known tokens are taken out of the row beforehand and put back afterwards, so that
what the first pass adds up is the residual itself, and no difference of two sums.

Names and suffixes as there; K tokens known of each row, padded to a power of two.
"""

# pyright: reportGeneralTypeIssues=false
# (what `triton.jit` makes of a function is no Python function to a type checker)

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from grace.kernels.gdkd_triton import WARPS, block_size, decoupled, move, rest_block, sigmoid, softplus


@triton.jit
def _residual(student_ptr, target, vocabulary, shared, tau, SQUARED: tl.constexpr, BLOCK: tl.constexpr):
    """Maximum of a row without target and known tokens, and its masses: shared ones at the temperature, all at 1."""
    top, mass, mass_one = float("-inf"), 0.0, 0.0
    for start in range(0, vocabulary, BLOCK):
        columns, rest, x = rest_block(student_ptr, start, target, vocabulary, BLOCK)
        top, base, _, fade, fade_one = move(top, tl.max(x, 0), tau)
        u = tl.exp((x - base) / tau)
        mass_one = mass_one * fade_one + tl.sum(u * u if SQUARED else tl.exp(x - base), 0)
        mass = mass * fade + tl.sum(tl.where(rest & (columns < shared), u, 0.0), 0)
    return top, mass, mass_one


@triton.jit
def _distance(
    odds, teacher_odds, scaled, log_share, share, log_residual, teacher_log_residual, share_left, log_mass,
    tau, tckd_weight, nckd_weight, PLAIN_KL: tl.constexpr,
):  # fmt: skip
    """`decoupled` from the known tokens and the residual."""
    divergence = tl.sum(tl.where(share > 0, share * (log_share - (scaled - log_mass)), 0.0), 0)
    left = share_left * (teacher_log_residual - (log_residual - log_mass))
    divergence += tl.where(share_left > 0, left, 0.0)
    return decoupled(odds, teacher_odds, divergence, tau, tckd_weight, nckd_weight, PLAIN_KL)


@triton.jit
def _write_gradient(
    student_ptr, target, vocabulary, shared, base, tau, ce_factor, left_factor, at_target,
    SQUARED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The second pass: masses again, times their factors, over the student's logits; 0 at the known tokens."""
    kind = student_ptr.dtype.element_ty
    for start in range(0, vocabulary, BLOCK):
        columns, rest, x = rest_block(student_ptr, start, target, vocabulary, BLOCK)
        u = tl.exp((x - base) / tau)
        gradient = (u * u if SQUARED else tl.exp(x - base)) * ce_factor
        gradient += tl.where(columns < shared, u * left_factor, 0.0)
        tl.store(student_ptr + columns, gradient.to(kind), mask=rest)
    tl.store(student_ptr + target, at_target.to(kind))


@triton.jit
def _top_k_kernel(
    student_ptr, known_ptr, log_share_ptr, odds_ptr, log_residual_ptr, target_ptr, gate_ptr,
    ce_ptr, kd_ptr, known_grad_ptr, student_stride, vocabulary, shared, k,
    ce_scale, kd_scale, tau, tckd_weight, nckd_weight,
    PLAIN_KL: tl.constexpr, WITH_GRADIENT: tl.constexpr, SQUARED: tl.constexpr, BLOCK: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    student_ptr += row * student_stride
    target = tl.load(target_ptr + row)
    ranks = tl.arange(0, K)
    is_known = ranks < k
    known = tl.load(known_ptr + row * k + ranks, mask=is_known, other=float("-inf"))
    log_share = tl.load(log_share_ptr + row * k + ranks, mask=is_known, other=float("-inf"))
    log_residual = tl.load(log_residual_ptr + row)
    teacher_odds = tl.load(odds_ptr + row)

    top, residual, mass_one = _residual(student_ptr, target, vocabulary, shared, tau, SQUARED, BLOCK)
    top, base, _, fade, fade_one = move(top, tl.max(known, 0), tau)
    u_known = tl.exp((known - base) / tau)
    one_known = u_known * u_known if SQUARED else tl.exp(known - base)
    residual = residual * fade
    mass = residual + tl.sum(u_known, 0)
    mass_one = mass_one * fade_one + tl.sum(one_known, 0)

    own = tl.load(student_ptr + target).to(tl.float32)
    odds_one = (own - base) - tl.log(mass_one)
    odds = (own - base) / tau - tl.log(mass)
    wrong = ce_scale * sigmoid(-odds_one)
    ce_factor = tl.where(mass_one == 0, 0.0, wrong / mass_one)  # an empty rest; NaN stays NaN
    share = tl.exp(log_share)
    share_left = tl.exp(log_residual)
    # Clamped where the student leaves the residual nothing that float32 can hold.
    residual = tl.where(residual < 1.1754943508222875e-38, 1.1754943508222875e-38, residual)
    kd, weight, delta = _distance(
        odds, teacher_odds, (known - base) / tau, log_share, share, tl.log(residual), log_residual, share_left,
        tl.log(tl.where(mass == 0, 1.0, mass)), tau, tckd_weight, nckd_weight, PLAIN_KL,
    )  # fmt: skip
    tl.store(ce_ptr + row, softplus(-odds_one))
    tl.store(kd_ptr + row, kd)
    if WITH_GRADIENT:
        factor = kd_scale * tau * tl.load(gate_ptr + row).to(tl.float32)
        student_factor = tl.where(mass == 0, 0.0, factor * (weight - tckd_weight * delta) / mass)
        left_factor = student_factor - factor * weight * share_left / residual
        known_grad = one_known * ce_factor + u_known * student_factor - factor * weight * share
        tl.store(known_grad_ptr + row * k + ranks, known_grad, mask=is_known)
        at_target = factor * tckd_weight * delta - wrong
        _write_gradient(
            student_ptr, target, vocabulary, shared, base, tau, ce_factor, left_factor, at_target, SQUARED, BLOCK,
        )  # fmt: skip


def loss_rows(
    student_CV: Tensor,
    odds_C1: Tensor,
    ids_CK: Tensor,
    log_share_CK: Tensor,
    log_residual_C1: Tensor,
    targets_C: Tensor,
    gate_C: Tensor,
    *,
    ce_scale: float,
    kd_scale: float,
    temperature: float,
    tckd_weight: float,
    nckd_weight: float | None,
    shared: int,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy and KD of every row, float32 [C] each; the gradient overwrites `student_CV`.

    Args:
        student_CV: float32, bfloat16 or float16, rows contiguous.
        odds_C1, ids_CK, log_share_CK, log_residual_C1: the teacher's rows, as `grace.distill.rows_top_k.TopKRows`.
        The others are those of `grace.distill.rows.loss_rows`, its settings spelt out.

    Raises:
        ValueError: rows that are not contiguous, or float64, which would be computed in float32.
    """
    (tokens, vocabulary), k = student_CV.shape, ids_CK.shape[1]
    if student_CV.dtype == torch.float64 or (tokens and student_CV.stride(1) != 1):
        raise ValueError("logits must have contiguous rows of float32, bfloat16 or float16")
    ce_C, kd_C = (student_CV.new_empty(tokens, dtype=torch.float32) for _ in range(2))
    if not tokens:
        return ce_C, kd_C
    own_CK = student_CV.gather(-1, ids_CK)
    student_CV.scatter_(-1, ids_CK, -torch.inf)
    known_CK, known_grad_CK = own_CK.float(), torch.empty_like(own_CK, dtype=torch.float32)
    teacher = [part.float().contiguous() for part in (log_share_CK, odds_C1, log_residual_C1)]
    kernel: Any = _top_k_kernel  # a launcher's keywords are unknown to a type checker
    kernel[(tokens,)](
        student_CV, known_CK, *teacher, targets_C, gate_C, ce_C, kd_C, known_grad_CK,
        student_CV.stride(0), vocabulary, shared, k,
        ce_scale, kd_scale, temperature, tckd_weight, 0.0 if nckd_weight is None else nckd_weight,
        PLAIN_KL=nckd_weight is None, WITH_GRADIENT=with_gradient, SQUARED=temperature == 2.0,
        BLOCK=block_size(vocabulary), K=1 << max(0, k - 1).bit_length(), num_warps=WARPS,
    )  # fmt: skip
    student_CV.scatter_(-1, ids_CK, known_grad_CK.to(own_CK.dtype) if with_gradient else own_CK)
    return ce_C, kd_C
