"""The fake quantizer on CUDA: one Triton kernel forward, one backward, bit for bit what `grace.quant.grid` defines.

    s     = snap(exp(theta))                               float64 exponential, bfloat16 inside [2^-14, 2^15]
    q     = clip(round(W / s), qmin, qmax)                 round half to even
    W_hat = s * q
    dL/dW = dL/dW_hat inside, else 0;   dL/dtheta = sum of dL/dW_hat * (s q - W inside, s q outside)

DESIGN section 4 (arXiv:2601.22709), after LSQ (Esser et al. 2020). Each direction reads and writes every
element once: forward 4 bytes in and 2 out per weight for a float32 latent and a bfloat16 W_hat, backward
6 in and 4 out. The scales are recomputed from theta inside, because a handful of tiny launches per layer
would cost as much as the quantizing.

This is the second place that rounds; the first, `quant/grid.py`, is the definition and the tests hold this
one equal to it, ties and their neighbours included. Three things must not be changed for speed:
`div_rn`, since Triton's `/` is an approximation; the order (x + c) - c below; the float64 exponential.

Shape suffixes: O output features, I input features, G groups along the input; in a kernel N groups of a tile
(over the whole weight, row by row), S the elements of a group, padded to a power of two.
"""

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

# 1.5 * 2^23: float32 numbers of this size are whole, so adding it rounds to the nearest integer, ties to
# even (the constant itself is even), for |x| < 2^22. What is larger stays far outside any code range.
_TO_WHOLE = tl.constexpr(12582912.0)
_SCALE_MIN = tl.constexpr(2.0**-14)
_SCALE_MAX = tl.constexpr(2.0**15)
_NAN = tl.constexpr(tl.PropagateNan.ALL)

_TILE = 2048  # weights per program: 94 registers a thread in the backward kernel; 4096 would need 149


@triton.jit
def _clip(x, low, high):
    """Like torch.clamp: a NaN stays one."""
    return tl.minimum(tl.maximum(x, low, propagate_nan=_NAN), high, propagate_nan=_NAN)


@triton.jit
def _to_bfloat16_grid(x):
    """The nearest bfloat16, half to even, still as float32. In integers, to be the same on every backend:
    Triton's interpreter truncates where hardware rounds."""
    bits = x.to(tl.int32, bitcast=True)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
    return tl.where(x == x, nearest.to(tl.float32, bitcast=True), x)


@triton.jit
def _snapped_scale(theta_ptr, groups_N, valid_N):
    """grid.snapped_scale of N groups."""
    theta_N = tl.load(theta_ptr + groups_N, mask=valid_N, other=0.0)
    wide_N = tl.exp(theta_N.to(tl.float64)).to(tl.float32)
    return _to_bfloat16_grid(_clip(wide_N, _SCALE_MIN, _SCALE_MAX))


@triton.jit
def _store(pointers, values, valid):
    """Rounds to the dtype of the pointers, once."""
    if pointers.dtype.element_ty == tl.bfloat16:
        values = _to_bfloat16_grid(values)
    tl.store(pointers, values.to(pointers.dtype.element_ty), mask=valid)


@triton.jit
def _forward_kernel(
    weight_ptr, theta_ptr, output_ptr, groups, low, high,
    GROUP: tl.constexpr, N: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    groups_N = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    within_S = tl.arange(0, S)
    valid_N = groups_N < groups
    valid_NS = valid_N[:, None] & (within_S < GROUP)[None, :]
    offsets_NS = groups_N[:, None] * GROUP + within_S[None, :]

    scale_N1 = _snapped_scale(theta_ptr, groups_N, valid_N)[:, None]
    weight_NS = tl.load(weight_ptr + offsets_NS, mask=valid_NS, other=0.0).to(tl.float32)
    rounded_NS = (tl.div_rn(weight_NS, scale_N1) + _TO_WHOLE) - _TO_WHOLE
    _store(output_ptr + offsets_NS, _clip(rounded_NS, low, high) * scale_N1, valid_NS)


@triton.jit
def _backward_kernel(
    weight_ptr, theta_ptr, grad_ptr, grad_weight_ptr, grad_theta_ptr, groups, low, high,
    GROUP: tl.constexpr, N: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    groups_N = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    within_S = tl.arange(0, S)
    valid_N = groups_N < groups
    valid_NS = valid_N[:, None] & (within_S < GROUP)[None, :]
    offsets_NS = groups_N[:, None] * GROUP + within_S[None, :]

    scale_N1 = _snapped_scale(theta_ptr, groups_N, valid_N)[:, None]
    weight_NS = tl.load(weight_ptr + offsets_NS, mask=valid_NS, other=0.0).to(tl.float32)
    upstream_NS = tl.load(grad_ptr + offsets_NS, mask=valid_NS, other=0.0).to(tl.float32)
    rounded_NS = (tl.div_rn(weight_NS, scale_N1) + _TO_WHOLE) - _TO_WHOLE
    inside_NS = (rounded_NS >= low) & (rounded_NS <= high)
    _store(grad_weight_ptr + offsets_NS, tl.where(inside_NS, upstream_NS, 0.0), valid_NS)
    # Differences of the exact product s q: q - W / s would carry the rounding of the division.
    step_NS = _clip(rounded_NS, low, high) * scale_N1 - tl.where(inside_NS, weight_NS, 0.0)
    _store(grad_theta_ptr + groups_N, tl.sum(step_NS * upstream_NS, axis=1), valid_N)


def forward(weight_OI: Tensor, theta_OG: Tensor, group_size: int, bits: int, dtype: torch.dtype) -> Tensor:
    """W_hat = s * q [O, I] in `dtype`: exact in float32, rounded once in a narrower one.

    Args:
        weight_OI: float32, bfloat16 or float16; shapes were checked by `fake_quantize`.
        theta_OG: natural log of the scales.
    """
    weight_OI, theta_OG = weight_OI.contiguous(), theta_OG.contiguous()
    output_OI = torch.empty(weight_OI.shape, dtype=dtype, device=weight_OI.device)
    _launch(_forward_kernel, group_size, bits, weight_OI, theta_OG, output_OI)
    return output_OI


def backward(
    weight_OI: Tensor, theta_OG: Tensor, grad_OI: Tensor, group_size: int, bits: int
) -> tuple[Tensor, Tensor]:
    """dL/dW [O, I] and dL/dtheta [O, G] in one pass over weight and upstream gradient, float32 inside."""
    weight_OI, theta_OG, grad_OI = (t.contiguous() for t in (weight_OI, theta_OG, grad_OI))
    grad_weight_OI, grad_theta_OG = torch.empty_like(weight_OI), torch.empty_like(theta_OG)
    _launch(_backward_kernel, group_size, bits, weight_OI, theta_OG, grad_OI, grad_weight_OI, grad_theta_OG)
    return grad_weight_OI, grad_theta_OG


def _launch(
    kernel: triton.JITFunction,
    group_size: int,
    bits: int,
    weight_OI: Tensor,
    theta_OG: Tensor,
    *others: Tensor,
) -> None:
    """One program per `_TILE` weights, at least one group each."""
    groups = theta_OG.numel()
    if groups == 0:
        return
    padded = triton.next_power_of_2(group_size)
    per_program = max(1, _TILE // padded)
    half = 2 ** (bits - 1)
    device = torch.cuda.device(weight_OI.device) if weight_OI.is_cuda else contextlib.nullcontext()
    with device:
        kernel[(triton.cdiv(groups, per_program),)](
            weight_OI, theta_OG, *others, groups, float(-half), float(half - 1),
            GROUP=group_size, N=per_program, S=padded,
        )  # fmt: skip
