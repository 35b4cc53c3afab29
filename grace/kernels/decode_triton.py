"""What a decode step does between its linears, one CUDA program per token or head: few launches, nothing read twice.

A linear's output comes as parts [P, T, O] (`w4a16_triton.parts`) that are added up here, in order, on the way in; a
dense one is one part. Everything is fp32 inside. Rows of the cache and places in them are read on the device, so that a
captured graph serves every step. Shapes and types are the caller's to check.

Floor per token and layer: the cache once, `4 * K * S` bytes per position in 16 bits, and the parts.

Runs on a CPU under TRITON_INTERPRET=1. Not measured on a GPU yet: `grace bench --device cuda` does.

Shape suffixes: T tokens (one of each sequence), P parts, D hidden width, I inner width, Q query heads, K key/value
heads, X = Q + 2 K, S head size, R rows of the cache, C places in a row, N parts of the context.
"""

# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false
# (what `triton.jit` makes of a function is no Python function to a type checker)

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from grace.kernels.w4a16_triton import INTERPRETED, written

PLACES = 64  # of the context, per step
INNER_BLOCK = 512
_LEAST_HEADS = 16  # rows of a tensor-core product


@triton.jit
def _summed(parts_ptr, offset, part_stride, inside, PARTS: tl.constexpr):
    y = tl.load(parts_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        y += tl.load(parts_ptr + part * part_stride + offset, mask=inside, other=0.0).to(tl.float32)
    return y


@triton.jit
def _add_norm_kernel(
    x_ptr, parts_ptr, weight_ptr, out_ptr, normed_ptr, width, part_stride, epsilon,
    PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token, d = tl.program_id(0), tl.arange(0, BLOCK)
    inside = d < width
    x = tl.load(x_ptr + token * width + d, mask=inside, other=0.0).to(tl.float32)
    if PARTS > 0:
        x += _summed(parts_ptr, token * width + d, part_stride, inside, PARTS)
    tl.store(out_ptr + token * width + d, x.to(out_ptr.dtype.element_ty), mask=inside)
    scale = tl.rsqrt(tl.sum(x * x, 0) / width + epsilon)
    y = x * scale * tl.load(weight_ptr + d, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed_ptr + token * width + d, y.to(normed_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _rotate_kernel(
    parts_ptr, weight_ptr, cos_ptr, sin_ptr, rows_ptr, places_ptr, query_ptr, keys_ptr, values_ptr,
    part_stride, row_stride, head_stride, queries, keys, epsilon, PARTS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    token, head = tl.program_id(0), tl.program_id(1)
    f = tl.arange(0, HALF)
    size: tl.constexpr = 2 * HALF
    offset = (token * (queries + 2 * keys) + head) * size + f
    low = _summed(parts_ptr, offset, part_stride, f < HALF, PARTS)
    high = _summed(parts_ptr, offset + HALF, part_stride, f < HALF, PARTS)
    row, place = tl.load(rows_ptr + token), tl.load(places_ptr + token)
    if head < queries + keys:
        scale = tl.rsqrt((tl.sum(low * low, 0) + tl.sum(high * high, 0)) / size + epsilon)
        low = low * scale * tl.load(weight_ptr + head * size + f).to(tl.float32)
        high = high * scale * tl.load(weight_ptr + head * size + HALF + f).to(tl.float32)
        # The sine comes with the sign of the half-turn.
        angle = token * size + f
        turned = low * tl.load(cos_ptr + angle).to(tl.float32) + high * tl.load(sin_ptr + angle).to(
            tl.float32
        )
        high *= tl.load(cos_ptr + angle + HALF).to(tl.float32)
        high += low * tl.load(sin_ptr + angle + HALF).to(tl.float32)
        low = turned
    kind = query_ptr.dtype.element_ty
    if head < queries:
        target = query_ptr + (token * queries + head) * size
    else:
        of_key = head < queries + keys
        cache = (
            row * row_stride
            + tl.where(of_key, head - queries, head - queries - keys) * head_stride
            + place * size
        )
        target = (keys_ptr if of_key else values_ptr) + cache
    tl.store(target + f, low.to(kind))
    tl.store(target + HALF + f, high.to(kind))


@triton.jit
def _attend_kernel(
    query_ptr, keys_ptr, values_ptr, rows_ptr, counts_ptr, sum_ptr, top_ptr, mass_ptr,
    row_stride, head_stride, keys, scale,
    HEADS: tl.constexpr, PADDED: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr,
    SPLITS: tl.constexpr, FP32: tl.constexpr,
):  # fmt: skip
    token, key, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    kind: tl.constexpr = tl.float32 if FP32 else keys_ptr.dtype.element_ty
    head, s = tl.arange(0, PADDED), tl.arange(0, SIZE)
    first = (token * keys + key) * HEADS
    query = tl.load(
        query_ptr + (first + head[:, None]) * SIZE + s[None, :], mask=head[:, None] < HEADS, other=0.0
    )
    query = (query.to(tl.float32) * scale).to(kind)
    count = tl.load(counts_ptr + token).to(tl.int32)
    share = tl.cdiv(tl.cdiv(count, SPLITS), BLOCK) * BLOCK
    end = tl.minimum((split + 1) * share, count)
    base = tl.load(rows_ptr + token) * row_stride + key * head_stride
    top = tl.full((PADDED,), float("-inf"), tl.float32)
    mass = tl.zeros((PADDED,), tl.float32)
    total = tl.zeros((PADDED, SIZE), tl.float32)
    for start in range(split * share, end, BLOCK):
        c = start + tl.arange(0, BLOCK)
        place = base + c[:, None] * SIZE + s[None, :]
        seen = c < end
        k = tl.load(keys_ptr + place, mask=seen[:, None], other=0.0).to(kind)
        score = tl.dot(query, tl.trans(k), input_precision="ieee")
        score = tl.where(seen[None, :], score, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, 1))
        fade, p = tl.exp(top - new_top), tl.exp(score - new_top[:, None])
        v = tl.load(values_ptr + place, mask=seen[:, None], other=0.0).to(kind)
        total = total * fade[:, None] + tl.dot(p.to(kind), v, input_precision="ieee")
        mass = mass * fade + tl.sum(p, 1)
        top = new_top
    part = (token * SPLITS + split) * keys * HEADS + key * HEADS + head
    if SPLITS == 1:
        total /= tl.where(mass == 0, 1.0, mass)[:, None]  # nothing attended to gives 0
    else:
        tl.store(top_ptr + part, top, mask=head < HEADS)
        tl.store(mass_ptr + part, mass, mask=head < HEADS)
    where = part[:, None] * SIZE + s[None, :]
    tl.store(sum_ptr + where, total.to(sum_ptr.dtype.element_ty), mask=head[:, None] < HEADS)


@triton.jit
def _combine_kernel(sum_ptr, top_ptr, mass_ptr, out_ptr, heads, SPLITS: tl.constexpr, SIZE: tl.constexpr):
    token, head = tl.program_id(0), tl.program_id(1)
    part = (token * SPLITS + tl.arange(0, SPLITS)) * heads + head
    s = tl.arange(0, SIZE)
    top = tl.load(top_ptr + part)
    highest = tl.max(top, 0)
    weight = tl.exp(top - tl.where(highest == float("-inf"), 0.0, highest))  # 0 for a part with nothing in it
    mass = tl.sum(tl.load(mass_ptr + part) * weight, 0)
    total = tl.sum(tl.load(sum_ptr + part[:, None] * SIZE + s[None, :]) * weight[:, None], 0)
    y = total / tl.where(mass == 0, 1.0, mass)
    tl.store(out_ptr + (token * heads + head) * SIZE + s, y.to(out_ptr.dtype.element_ty))


@triton.jit
def _gate_kernel(parts_ptr, out_ptr, width, part_stride, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    token, i = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < width
    gate = _summed(parts_ptr, 2 * token * width + i, part_stride, inside, PARTS)
    up = _summed(parts_ptr, (2 * token + 1) * width + i, part_stride, inside, PARTS)
    y = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + token * width + i, y.to(out_ptr.dtype.element_ty), mask=inside)


def add_norm(
    x_TD: Tensor, parts_PTD: Tensor | None, weight_D: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    """x plus a linear's output, and its RMS norm, both in the type of x."""
    tokens, width = x_TD.shape
    out, normed = (torch.empty(x_TD.shape, dtype=written(x_TD.dtype), device=x_TD.device) for _ in range(2))
    parts = x_TD if parts_PTD is None else parts_PTD
    kernel: Any = _add_norm_kernel  # a launcher's keywords are unknown to a type checker
    kernel[(tokens,)](
        x_TD, parts, weight_D, out, normed, width, parts.stride(0), epsilon,
        PARTS=0 if parts_PTD is None else len(parts_PTD), BLOCK=triton.next_power_of_2(width), num_warps=8,
    )  # fmt: skip
    return out.to(x_TD.dtype), normed.to(x_TD.dtype)


def rotate(
    parts_PTX: Tensor,
    weight_XS: Tensor,
    cos_TS: Tensor,
    sin_TS: Tensor,
    rows_T: Tensor,
    places_T: Tensor,
    keys_RKCS: Tensor,
    values_RKCS: Tensor,
    queries: int,
    epsilon: float,
) -> Tensor:
    """Norms and turns queries and keys, writes keys and values where they belong; returns the queries [T, Q, S].

    Args:
        parts_PTX: [P, T, (Q + 2 K) S]: queries, keys, values.
        weight_XS: of the norms, [Q + K, S].
        cos_TS, sin_TS: the sine with the sign of the half-turn.
        rows_T, places_T: int64, where in the cache.
    """
    tokens, (_, keys, _, size) = parts_PTX.shape[1], keys_RKCS.shape
    query = torch.empty(tokens, queries, size, dtype=keys_RKCS.dtype, device=keys_RKCS.device)
    kernel: Any = _rotate_kernel
    kernel[(tokens, queries + 2 * keys)](
        parts_PTX, weight_XS, cos_TS, sin_TS, rows_T, places_T, query, keys_RKCS, values_RKCS,
        parts_PTX.stride(0), keys_RKCS.stride(0), keys_RKCS.stride(1), queries, keys, epsilon,
        PARTS=len(parts_PTX), HALF=size // 2, num_warps=1,
    )  # fmt: skip
    return query


def attend(
    query_TQS: Tensor,
    keys_RKCS: Tensor,
    values_RKCS: Tensor,
    rows_T: Tensor,
    counts_T: Tensor,
    splits: int,
) -> Tensor:
    """Attention of one query per sequence to the first `counts_T` places of its row; 0 places give 0.

    Args:
        rows_T, counts_T: int64.
        splits: programs that share a row and head, a power of two.

    Returns:
        [T, Q S] in the type of the query.
    """
    (tokens, queries, size), keys = query_TQS.shape, keys_RKCS.shape[1]
    heads, device = queries // keys, query_TQS.device
    out = torch.empty(tokens, queries * size, dtype=written(query_TQS.dtype), device=device)
    several = splits > 1
    total = torch.empty(tokens, splits, queries, size, dtype=torch.float32, device=device) if several else out
    top, mass = (torch.empty(tokens, splits, queries, dtype=torch.float32, device=device) for _ in range(2))
    kernel: Any = _attend_kernel
    kernel[(tokens, keys, splits)](
        query_TQS, keys_RKCS, values_RKCS, rows_T, counts_T, total, top, mass,
        keys_RKCS.stride(0), keys_RKCS.stride(1), keys, size**-0.5,
        HEADS=heads, PADDED=max(_LEAST_HEADS, triton.next_power_of_2(heads)), SIZE=size, BLOCK=PLACES,
        SPLITS=splits, FP32=INTERPRETED, num_warps=4,
    )  # fmt: skip
    if several:
        combine: Any = _combine_kernel
        combine[(tokens, queries)](total, top, mass, out, queries, SPLITS=splits, SIZE=size, num_warps=1)
    return out.to(query_TQS.dtype)


def gate(parts_PTI: Tensor, dtype: torch.dtype) -> Tensor:
    """silu(gate) * up of [P, T, 2 I], gates first, as [T, I] in `dtype`."""
    _, tokens, both = parts_PTI.shape
    out = torch.empty(tokens, both // 2, dtype=written(dtype), device=parts_PTI.device)
    kernel: Any = _gate_kernel
    kernel[(tokens, triton.cdiv(both // 2, INNER_BLOCK))](
        parts_PTI, out, both // 2, parts_PTI.stride(0), PARTS=len(parts_PTI), BLOCK=INNER_BLOCK, num_warps=4
    )
    return out.to(dtype)
