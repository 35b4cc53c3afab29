"""The oracle of the W4 kernels: slow, plain, in any floating type, on any device.

    W[i, o] = scales[i // g, o] * (q[i, o] - zeros[i // g, o]),   y = x W + bias        (AWQ, 2306.00978)

Written from the format alone (DESIGN section 6): it shares no code with the packers or with the
fast kernels, so that it can judge them.

Shape suffixes: M tokens, I input features, O output features, G groups along the input, W words (= O / 8).
"""

import torch
from torch import Tensor

_COLUMN_OF_NIBBLE = [0, 2, 4, 6, 1, 3, 5, 7]


def nibbles(packed_XW: Tensor) -> Tensor:
    """The 4-bit values of int32 words as int64 [X, 8 W], general zero points and codes alike."""
    shifts_8 = torch.arange(0, 32, 4, device=packed_XW.device)
    by_nibble_XW8 = (packed_XW.long()[..., None] >> shifts_8) & 15
    values_XW8 = torch.empty_like(by_nibble_XW8)
    values_XW8[..., _COLUMN_OF_NIBBLE] = by_nibble_XW8
    return values_XW8.flatten(-2)


def dequantize(
    qweight_IW: Tensor,
    qzeros_GW: Tensor,
    scales_GO: Tensor,
    group_size: int,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """The weights [I, O] that the packed tensors stand for, in `dtype`."""
    codes_IO = nibbles(qweight_IW)
    zeros_IO = nibbles(qzeros_GW).repeat_interleave(group_size, 0)
    scales_IO = scales_GO.to(dtype).repeat_interleave(group_size, 0)
    return (codes_IO - zeros_IO).to(dtype) * scales_IO


def matmul(
    x_MI: Tensor,
    qweight_IW: Tensor,
    qzeros_GW: Tensor,
    scales_GO: Tensor,
    group_size: int,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """x W in `dtype`, whatever the type of x."""
    return x_MI.to(dtype) @ dequantize(qweight_IW, qzeros_GW, scales_GO, group_size, dtype)
