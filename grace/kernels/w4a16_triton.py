"""x W + b for AWQ tensors as they lie in the checkpoint, on CUDA: 4-bit weights, 16-bit activations, fp32 sums.

    W[i, o] = scales[i // g, o] * (q[i, o] - zeros[i // g, o])

Three ways, one `Config` each time:

- `vector`, for one token: multiply-adds on the weights as they come out of their words.
- `matrix`, for 1 token to many: weights unpacked in registers for the tensor cores.
- `expand`, for very many: the weights are written out dense once, and the vendor's matmul does the rest.

Where the output has too few columns to fill the device, `splits` programs share a column, each with its part of the
input; their fp32 sums are added by a second, small kernel in the order of the parts. No atomics: the same input gives
the same bits.

Floor: a token reads `in * out / 2` bytes of codes and `in / g * (2 * out + out / 2)` of scales and zeros, 0.52 bytes
per weight at g = 128 against 2 in bfloat16; the sums of `splits` parts cost `8 * splits * out` bytes more. Arithmetic
per weight: 1 1/8 logical operations, one subtraction, and one multiply-add (`vector`) or half a conversion (`matrix`).

Unpacking without shifts or integer conversions: a nibble at bits 4p..4p+3 of a word is, with the bits of 1.0 set
above it, the float 1 + q 2^(4p-23); minus the same float of the zero point that is exactly (q - zero) 2^(4p-23). The
power of two joins the scale. Positions 0 to 4 fit the mantissa; the word shifted by 12 brings the other three there.
So weights enter the product unrounded, and each group's sum is scaled in fp32: nearer to the oracle than any kernel
that rounds W_hat to 16 bits first (`expand` does, as the dense layer would).

No second layout: AWQ's order of nibbles only decides which mask makes which column, and a block of 8 words or more
reads whole 32-byte sectors of every row, so that repacking would save neither bytes nor instructions.

Runs on a CPU under TRITON_INTERPRET=1. Not measured on a GPU yet: benchmarks/w4a16.py does.

Shape suffixes: T tokens, I input features, O output features, G groups along the input, W words (= O / 8),
P parts of the input. In the kernels: k rows of the weights, n output columns.
"""

# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false, reportOperatorIssue=false
# (what `triton.jit` makes of a function is no Python function to a type checker)

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from grace.kernels.awq_layout import PER_WORD
from grace.kernels.w4a16_tuning import Config

ONE = 0x3F800000  # the bits of 1.0
SUM_BLOCK = 256
# The interpreter has no bfloat16: it truncates where a device rounds, and its matmul of 16-bit operands is garbage.
# So it multiplies and writes float32; what is rounded then is rounded by torch.
INTERPRETED = bool(knobs.runtime.interpret)


@triton.jit
def _nibble(words, position: tl.constexpr, one):
    """1 + q 2^(4 position - 23). `one` is an argument so that the compiler joins both operations into one."""
    return ((words & (15 << (4 * position))) | one).to(tl.float32, bitcast=True)


@triton.jit
def _unpack(words, one):
    """[..., W] words to [..., 8 W] floats, column by column; nibbles lie in the order 0 2 4 6 1 3 5 7."""
    high = words >> 12
    columns_04 = tl.interleave(_nibble(words, 0, one), _nibble(words, 2, one))
    columns_26 = tl.interleave(_nibble(words, 1, one), _nibble(words, 3, one))
    columns_15 = tl.interleave(_nibble(words, 4, one), _nibble(high, 3, one))
    columns_37 = tl.interleave(_nibble(high, 2, one), _nibble(high, 4, one))
    return tl.interleave(tl.interleave(columns_04, columns_26), tl.interleave(columns_15, columns_37))


@triton.jit
def _unit(n):
    """What the floats of `_unpack` are to be multiplied with in column n: 2^(23 - 4 position)."""
    nibble = ((n & 7) >> 1) + 4 * (n & 1)
    position = tl.where(nibble < 5, nibble, nibble - 3)
    return ((150 - 4 * position) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _vector_kernel(
    x_ptr, qweight_ptr, qzeros_ptr, scales_ptr, bias_ptr, out_ptr,
    outputs, q_stride, z_stride, s_stride, groups, groups_per_split, one,
    GROUP: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    block, split = tl.program_id(0), tl.program_id(1)
    w = block * WORDS + tl.arange(0, WORDS)
    n = block * WORDS * 8 + tl.arange(0, WORDS * 8)
    has_word, has_column = w < outputs // 8, n < outputs
    first = split * groups_per_split
    # Rows of a step stay apart until the end: within the loop no thread waits for another.
    total = tl.zeros((ROWS, WORDS * 8), tl.float32)
    for group in range(first, tl.minimum(first + groups_per_split, groups)):
        zero = _unpack(tl.load(qzeros_ptr + group * z_stride + w, mask=has_word, other=0), one)
        scale = tl.load(scales_ptr + group * s_stride + n, mask=has_column, other=0.0).to(tl.float32)
        part = tl.zeros((ROWS, WORDS * 8), tl.float32)
        for step in tl.static_range(GROUP // ROWS):
            k = group * GROUP + step * ROWS + tl.arange(0, ROWS)
            words = tl.load(qweight_ptr + k[:, None] * q_stride + w[None, :], mask=has_word[None, :], other=0)
            x = tl.load(x_ptr + k).to(tl.float32)
            part += x[:, None] * (_unpack(words, one) - zero[None, :])
        total += part * scale[None, :]
    y = tl.sum(total, 0) * _unit(n)
    if HAS_BIAS:
        y += tl.load(bias_ptr + n, mask=has_column, other=0.0).to(tl.float32)
    tl.store(out_ptr + split * outputs + n, y.to(out_ptr.dtype.element_ty), mask=has_column)


@triton.jit
def _matrix_kernel(
    x_ptr, qweight_ptr, qzeros_ptr, scales_ptr, bias_ptr, out_ptr,
    tokens, outputs, x_stride, q_stride, z_stride, s_stride, groups, groups_per_split, one,
    GROUP: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr,
    HAS_BIAS: tl.constexpr, FP32: tl.constexpr,
):  # fmt: skip
    block, split = tl.program_id(1), tl.program_id(2)  # neighbours in axis 0 read the same weights
    t = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    w = block * WORDS + tl.arange(0, WORDS)
    n = block * WORDS * 8 + tl.arange(0, WORDS * 8)
    has_word, has_column, has_token = w < outputs // 8, n < outputs, t < tokens
    steps: tl.constexpr = GROUP // ROWS
    kind: tl.constexpr = tl.float32 if FP32 else x_ptr.dtype.element_ty
    first = split * groups_per_split
    unit = _unit(n)
    total = tl.zeros((TOKENS, WORDS * 8), tl.float32)
    for step in range(first * steps, tl.minimum(first + groups_per_split, groups) * steps):
        group = step // steps
        k = step * ROWS + tl.arange(0, ROWS)
        words = tl.load(qweight_ptr + k[:, None] * q_stride + w[None, :], mask=has_word[None, :], other=0)
        x = tl.load(x_ptr + t[:, None] * x_stride + k[None, :], mask=has_token[:, None], other=0.0)
        zero = _unpack(tl.load(qzeros_ptr + group * z_stride + w, mask=has_word, other=0), one)
        scale = tl.load(scales_ptr + group * s_stride + n, mask=has_column, other=0.0).to(tl.float32) * unit
        part = tl.dot(x.to(kind), (_unpack(words, one) - zero[None, :]).to(kind), input_precision="ieee")
        total += part * scale[None, :]
    if HAS_BIAS:
        total += tl.load(bias_ptr + n, mask=has_column, other=0.0).to(tl.float32)[None, :]
    place = (split * tokens + t[:, None]) * outputs + n[None, :]
    tl.store(
        out_ptr + place, total.to(out_ptr.dtype.element_ty), mask=has_token[:, None] & has_column[None, :]
    )


@triton.jit
def _sum_kernel(
    parts_ptr, bias_ptr, out_ptr, count, outputs,
    SPLITS: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    y = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLITS):
        y += tl.load(parts_ptr + split * count + place, mask=inside, other=0.0)
    if HAS_BIAS:
        y += tl.load(bias_ptr + place % outputs, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + place, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _expand_kernel(
    qweight_ptr, qzeros_ptr, scales_ptr, out_ptr, outputs, q_stride, z_stride, s_stride, one,
    GROUP: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    k = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    group = tl.program_id(0) * ROWS // GROUP
    w = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    n = tl.program_id(1) * WORDS * 8 + tl.arange(0, WORDS * 8)
    has_word, has_column = w < outputs // 8, n < outputs
    words = tl.load(qweight_ptr + k[:, None] * q_stride + w[None, :], mask=has_word[None, :], other=0)
    zero = _unpack(tl.load(qzeros_ptr + group * z_stride + w, mask=has_word, other=0), one)
    scale = tl.load(scales_ptr + group * s_stride + n, mask=has_column, other=0.0).to(tl.float32) * _unit(n)
    weight = (_unpack(words, one) - zero[None, :]) * scale[None, :]
    place = k.to(tl.int64)[:, None] * outputs + n[None, :]
    tl.store(out_ptr + place, weight.to(out_ptr.dtype.element_ty), mask=has_column[None, :])


def matmul(
    x_TI: Tensor,
    qweight_IW: Tensor,
    qzeros_GW: Tensor,
    scales_GO: Tensor,
    group_size: int,
    bias_O: Tensor | None,
    config: Config,
) -> Tensor:
    """x W + b [T, O] in the type of x, launched as `config` says; shapes and types are the caller's to check."""
    parts_PTO = parts(x_TI, qweight_IW, qzeros_GW, scales_GO, group_size, bias_O, config)
    splits, tokens, outputs = parts_PTO.shape
    if splits == 1:
        return parts_PTO[0].to(x_TI.dtype)
    out = torch.empty(tokens, outputs, dtype=written(x_TI.dtype), device=x_TI.device)
    bias = out if bias_O is None else bias_O.contiguous()
    add: Any = _sum_kernel  # a launcher's keywords are unknown to a type checker
    add[(triton.cdiv(tokens * outputs, SUM_BLOCK),)](
        parts_PTO, bias, out, tokens * outputs, outputs,
        SPLITS=splits, HAS_BIAS=bias_O is not None, BLOCK=SUM_BLOCK,
    )  # fmt: skip
    return out.to(x_TI.dtype)


def parts(
    x_TI: Tensor,
    qweight_IW: Tensor,
    qzeros_GW: Tensor,
    scales_GO: Tensor,
    group_size: int,
    bias_O: Tensor | None,
    config: Config,
) -> Tensor:
    """The product in parts of the input [P, T, O]: one, finished and in the type of x, or several in fp32.

    Several lack the bias yet; whoever reads them next may add them up on the way, in order.
    """
    x_TI = x_TI.contiguous()
    stored = (_rows(qweight_IW), _rows(qzeros_GW), _rows(scales_GO))
    tokens, outputs, groups = x_TI.shape[0], scales_GO.shape[1], scales_GO.shape[0]
    if not tokens:
        return x_TI.new_empty(1, 0, outputs)
    if config.way == "expand":
        weight_IO = expand(*stored, group_size, x_TI.dtype, config)
        bias = None if bias_O is None else bias_O.to(x_TI.dtype)
        return (x_TI @ weight_IO if bias is None else torch.addmm(bias, x_TI, weight_IO))[None]
    dtype = torch.float32 if config.splits > 1 else written(x_TI.dtype)
    out_PTO = torch.empty(config.splits, tokens, outputs, dtype=dtype, device=x_TI.device)
    has_bias = bias_O is not None and config.splits == 1
    bias = out_PTO if bias_O is None else bias_O.contiguous()
    blocks = triton.cdiv(outputs, PER_WORD * config.words)
    strides = [part.stride(0) for part in stored]
    share = triton.cdiv(groups, config.splits)
    options: dict[str, Any] = {
        "GROUP": group_size, "ROWS": config.rows, "WORDS": config.words, "HAS_BIAS": has_bias,
        "num_warps": config.warps, "num_stages": config.stages,
    }  # fmt: skip
    if config.way == "vector":
        vector: Any = _vector_kernel
        vector[(blocks, config.splits)](
            x_TI, *stored, bias, out_PTO, outputs, *strides, groups, share, ONE, **options
        )
    else:
        matrix: Any = _matrix_kernel
        matrix[(triton.cdiv(tokens, config.tokens), blocks, config.splits)](
            x_TI, *stored, bias, out_PTO, tokens, outputs, x_TI.stride(0), *strides, groups, share, ONE,
            TOKENS=config.tokens, FP32=INTERPRETED, **options,
        )  # fmt: skip
    return out_PTO


def _rows(part: Tensor) -> Tensor:
    """The same with contiguous rows, which may be columns of a wider tensor."""
    return part if part.stride(-1) == 1 else part.contiguous()


def expand(
    qweight_IW: Tensor,
    qzeros_GW: Tensor,
    scales_GO: Tensor,
    group_size: int,
    dtype: torch.dtype,
    config: Config,
) -> Tensor:
    """The dense weights [I, O], each rounded once to `dtype`."""
    inputs, outputs = qweight_IW.shape[0], scales_GO.shape[1]
    weight_IO = torch.empty(inputs, outputs, dtype=written(dtype), device=qweight_IW.device)
    strides = [part.stride(0) for part in (qweight_IW, qzeros_GW, scales_GO)]
    kernel: Any = _expand_kernel
    kernel[(inputs // config.rows, triton.cdiv(outputs, PER_WORD * config.words))](
        qweight_IW, qzeros_GW, scales_GO, weight_IO, outputs, *strides, ONE,
        GROUP=group_size, ROWS=config.rows, WORDS=config.words, num_warps=config.warps,
    )  # fmt: skip
    return weight_IO.to(dtype)


def written(dtype: torch.dtype) -> torch.dtype:
    """What kernels write for a result in `dtype`."""
    return torch.float32 if INTERPRETED else dtype
