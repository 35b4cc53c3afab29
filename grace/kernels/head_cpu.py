"""An output layer rounded to 4 bits in AWQ's layout, on the CPU: the one pass of `head_cpu.c`.

Shape suffixes: V vocabulary, D hidden width, W words (= V / 8), G groups along D.
"""

import ctypes

import torch
from torch import Tensor

from grace.kernels import compiled

GROUP_SIZE, OUTPUT_MULTIPLE = 128, 8


def obstacle(weight_VD: Tensor) -> str | None:
    """Why the pass cannot take a weight, or None if it can."""
    if weight_VD.dtype != torch.bfloat16 or weight_VD.device.type != "cpu" or not weight_VD.is_contiguous():
        return f"expected contiguous bfloat16 on the CPU, not {weight_VD.dtype}"
    if weight_VD.shape[0] % OUTPUT_MULTIPLE or weight_VD.shape[1] % GROUP_SIZE:
        return f"a weight of shape {tuple(weight_VD.shape)} cannot be packed"
    return compiled.obstacle()


def rounded(weight_VD: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales by rounding to nearest with the largest weight of a group at the end of the range.

    Args:
        weight_VD: bfloat16, contiguous, on the CPU; V a multiple of 8, D of 128.

    Returns:
        qweight int32 [D, W] and scales float16 [G, V].

    Raises:
        ValueError: `obstacle` has a reason, or there is a NaN or infinity in it.
    """
    if (reason := obstacle(weight_VD)) is not None:
        raise ValueError(reason)
    vocabulary, width = weight_VD.shape
    words_DW = torch.empty(width, vocabulary // OUTPUT_MULTIPLE, dtype=torch.int32)
    scales_GV = torch.empty(width // GROUP_SIZE, vocabulary, dtype=torch.float16)
    function = compiled.library().grace_round_head
    function.restype = ctypes.c_int64
    bad = function(
        ctypes.c_void_p(weight_VD.data_ptr()),
        ctypes.c_int64(vocabulary),
        ctypes.c_int64(width),
        ctypes.c_void_p(words_DW.data_ptr()),
        ctypes.c_void_p(scales_GV.data_ptr()),
        ctypes.c_int64(torch.get_num_threads()),
    )
    if bad:
        raise ValueError(f"weight of shape {tuple(weight_VD.shape)} holds NaN or infinite values")
    return words_DW, scales_GV
