"""The int4 matmul of `int4_cpu.c`, compiled on this machine (`grace.kernels.compiled`).

It reads AWQ tensors as they lie, memory-mapped files included: nothing is unpacked, copied or kept twice, and it
serves any number of tokens.

Shape suffixes: M tokens, I input features, O output features, G groups along the input, W words (= O / 8).
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grace.kernels.awq_layout import ZERO_WORD
from grace.kernels.compiled import library

GROUP_SIZES = (32, 64, 128)


class _Part(ctypes.Structure):
    _fields_ = [
        ("qweight", ctypes.c_void_p),
        ("qzeros", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("outputs", ctypes.c_int64),
        ("at", ctypes.c_int64),
    ]


class _Call(ctypes.Structure):
    _fields_ = [
        ("x", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("tokens", ctypes.c_int64),
        ("inputs", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("sums", ctypes.c_void_p),
    ]


@dataclass(frozen=True)
class Awq:
    """The stored tensors of one linear: int32 [I, W], int32 [G, W], fp16 [G, O], and a bias [O] or None."""

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True)
class NativeWeight:
    """Linears over one input as the kernel is told of them: where their tensors lie.

    Attributes:
        held: the tensors, so that they stay where they are.
        has_zeros: whether any zero point is not 8.
    """

    held: tuple[Any, ...]
    parts: Any
    count: int
    inputs: int
    outputs: int
    group_size: int
    has_zeros: bool

    def __deepcopy__(self, memo: Any) -> "NativeWeight":
        return self  # its tensors are what the pointers point to


def shape_obstacle(in_features: int, out_features: int, group_size: int) -> str | None:
    """Why the kernel cannot hold a layer of this shape, or None if it can."""
    if group_size not in GROUP_SIZES or in_features % group_size or out_features % 8:
        return (
            f"the compiled kernel takes groups of {GROUP_SIZES} and outputs divisible by 8, "
            f"this layer is {in_features} -> {out_features} with groups of {group_size}"
        )
    return None


def input_obstacle(x: Tensor) -> str | None:
    """Why the kernel cannot multiply these activations, or None if it can."""
    if x.device.type != "cpu" or x.dtype != torch.bfloat16:
        return (
            f"the compiled kernel takes bfloat16 on the CPU, the activations are {x.dtype} on {x.device.type}"
        )
    return None


def prepare(linears: Sequence[Awq], group_size: int) -> NativeWeight:
    """Takes down where the tensors lie; they must stay unchanged for as long as the result is used.

    Raises:
        ValueError: shapes or types that the kernel does not take.
    """
    inputs = linears[0].qweight.shape[0]
    parts, held, at = (_Part * len(linears))(), [], 0
    for part, one in zip(parts, linears, strict=True):
        outputs = one.scales.shape[1]
        if fault := shape_obstacle(inputs, outputs, group_size):
            raise ValueError(fault)
        shapes = (inputs, outputs // 8), (inputs // group_size, outputs // 8), (inputs // group_size, outputs)
        types = torch.int32, torch.int32, torch.float16
        tensors = [tensor.contiguous() for tensor in (one.qweight, one.qzeros, one.scales)]
        for tensor, shape, dtype in zip(tensors, shapes, types, strict=True):
            if tensor.shape != shape or tensor.dtype != dtype or tensor.device.type != "cpu":
                raise ValueError(
                    f"expected {dtype} {shape} on the CPU, not {tensor.dtype} {tuple(tensor.shape)}"
                )
        bias = None if one.bias is None else one.bias.detach().float().contiguous()
        symmetric = bool((tensors[1] == ZERO_WORD).all())
        part.qweight, part.scales = tensors[0].data_ptr(), tensors[2].data_ptr()
        part.qzeros = None if symmetric else tensors[1].data_ptr()
        part.bias = None if bias is None else bias.data_ptr()
        part.outputs, part.at = outputs, at
        at += outputs
        held += [*tensors, bias]
    has_zeros = any(part.qzeros for part in parts)
    return NativeWeight(tuple(held), parts, len(linears), inputs, at, group_size, has_zeros)


def matmul(x_MI: Tensor, weight: NativeWeight) -> Tensor:
    """x W + b of all linears side by side; fp32 accumulation, bfloat16 in and out.

    Raises:
        ValueError: activations of another type, device or width.
        MemoryError: no room for the sums.
    """
    if fault := input_obstacle(x_MI):
        raise ValueError(fault)
    tokens, inputs = x_MI.shape
    if inputs != weight.inputs:
        raise ValueError(f"activations [{tokens}, {inputs}] for a layer of {weight.inputs} inputs")
    y_MO = torch.empty(tokens, weight.outputs, dtype=torch.bfloat16)
    if not tokens:
        return y_MO
    x_MGg = x_MI.reshape(tokens, -1, weight.group_size)
    sums_MG = x_MGg.float().sum(-1) if weight.has_zeros else None
    x_GMg = x_MGg.transpose(0, 1).contiguous()
    call = _Call(
        x_GMg.data_ptr(),
        y_MO.data_ptr(),
        tokens,
        inputs,
        weight.group_size,
        weight.outputs,
        None if sums_MG is None else sums_MG.data_ptr(),
    )
    run = library().grace_int4_matmul
    if run(
        ctypes.byref(call),
        weight.parts,
        ctypes.c_int64(weight.count),
        ctypes.c_int64(torch.get_num_threads()),
    ):
        raise MemoryError(f"no memory for the sums of {tokens} tokens")
    return y_MO
