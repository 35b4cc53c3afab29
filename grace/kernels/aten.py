"""ATen's fused int4 matmul on the CPU: the weights stay packed, bfloat16 activations.

ATen computes `(q - 8) * scale + zero` per group; an AWQ zero point z gives `zero = (8 - z) * scale`.
Scale and zero are bfloat16 there. GRACE's own scales are exact in bfloat16 and its zero is 0, so
nothing is lost; a foreign checkpoint's fp16 scales and offsets are rounded to 8 significant bits, an
error of at most 1/64 of a step, the same as that of the weights in any bfloat16 model.

fp16 and fp32 activations are refused: ATen takes them, about 20 times slower than a dense matmul.

Shape suffixes: M tokens, I input features, O output features, G groups along the input, W words (= O / 8).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from grace.kernels.awq_layout import unpack_transposed

OUTPUT_MULTIPLE = 16  # "expect N to be dividable by 16"
GROUP_SIZES = (32, 64, 128, 256)
_INNER_TILES = 1  # ignored by the CPU packing, but part of its signature


@dataclass(frozen=True)
class AtenWeight:
    """One linear in the private layout of this processor's int4 kernel. Never stored."""

    packed: Tensor
    scale_and_zero_GO2: Tensor  # bfloat16
    group_size: int
    out_features: int


def shape_obstacle(out_features: int, group_size: int) -> str | None:
    """Why ATen cannot hold a layer of this shape, or None if it can."""
    if out_features % OUTPUT_MULTIPLE:
        return (
            f"ATen's int4 matmul needs out_features divisible by {OUTPUT_MULTIPLE}, "
            f"this layer has {out_features}"
        )
    if group_size not in GROUP_SIZES:
        return f"ATen's int4 matmul takes groups of {GROUP_SIZES}, this layer has {group_size}"
    return None


def input_obstacle(x: Tensor) -> str | None:
    """Why ATen cannot multiply these activations, or None if it can."""
    if x.device.type != "cpu":
        return f"ATen's int4 matmul here runs on the CPU, the activations are on {x.device.type}"
    if x.dtype != torch.bfloat16:
        return f"ATen's int4 matmul is fast in bfloat16 only, the activations are {x.dtype}"
    return None


def prepare(qweight_IW: Tensor, qzeros_GW: Tensor, scales_GO: Tensor, group_size: int) -> AtenWeight:
    """Repacks AWQ tensors into ATen's layout; done once per layer.

    Raises:
        ValueError: a shape that ATen does not take.
    """
    out_features = scales_GO.shape[1]
    obstacle = shape_obstacle(out_features, group_size)
    if obstacle:
        raise ValueError(obstacle)
    codes_OI = unpack_transposed(qweight_IW).int()
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes_OI, _INNER_TILES)
    scales32_GO = scales_GO.float()
    offsets_GO = (8 - unpack_transposed(qzeros_GW).t().float()) * scales32_GO
    scale_and_zero_GO2 = torch.stack([scales32_GO, offsets_GO], -1).bfloat16().contiguous()
    return AtenWeight(packed, scale_and_zero_GO2, group_size, out_features)


def matmul(x_MI: Tensor, weight: AtenWeight) -> Tensor:
    """x W with fp32 accumulation, bfloat16 in and out.

    Raises:
        ValueError: activations that are not bfloat16 on the CPU.
    """
    obstacle = input_obstacle(x_MI)
    if obstacle:
        raise ValueError(obstacle)
    return torch.ops.aten._weight_int4pack_mm_for_cpu(
        x_MI.contiguous(), weight.packed, weight.group_size, weight.scale_and_zero_GO2
    )
