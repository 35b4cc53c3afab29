"""The output layer, as it is stored or rounded to fewer bits while loading.

A decode step reads all of it: 0.62 GB at the 2B shape in bfloat16, 0.31 GB with 8 bits, 0.16 GB with 4. The input
embedding, which may be the same tensor, stays as it is.

Shape suffixes: M tokens, D hidden width, V vocabulary, G groups along D.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from grace.errors import UserError
from grace.kernels import head_cpu
from grace.kernels.awq_layout import ZERO_WORD, pack_transposed
from grace.quant import grid
from grace.runtime.int4_linear import Int4Linear

HEADS = ("bf16", "int8", "int4")
GROUP_SIZE = head_cpu.GROUP_SIZE
_ROWS = 8192  # rounded at a time: few calls, since each waits for all threads


class Head:
    """Logits of hidden states.

    Args:
        kind: `bf16` multiplies with the weight as it is stored; `int8` has one scale per token of the vocabulary,
            `int4` one per 128 inputs, both by rounding to nearest with the largest weight at the end of the range.

    Raises:
        UserError: an unknown kind, or a width that groups do not divide.
    """

    def __init__(self, weight_VD: Tensor, kind: str = "bf16"):
        if kind not in HEADS:
            raise UserError(f"unknown head {kind!r}: choose one of {', '.join(HEADS)}")
        self.kind, self.weight_VD = kind, weight_VD
        self._int4 = _int4_head(weight_VD) if kind == "int4" else None
        self._int8 = _rounded(weight_VD, 8, weight_VD.shape[1]) if kind == "int8" else None

    def __call__(self, x_MD: Tensor) -> Tensor:
        if self._int4 is not None:
            return self._int4(x_MD)[..., : len(self.weight_VD)]
        if self._int8 is not None:
            codes_VD, scales_V1 = self._int8
            return torch.ops.aten._weight_int8pack_mm(x_MD, codes_VD, scales_V1.flatten().to(x_MD.dtype))
        return F.linear(x_MD, self.weight_VD)

    def weight_bytes(self) -> int:
        """Bytes that one step reads."""
        if self._int4 is not None:
            return sum(buffer.nbytes for buffer in self._int4.buffers())
        if self._int8 is not None:
            return sum(tensor.nbytes for tensor in self._int8)
        return self.weight_VD.nbytes


def _int4_head(weight_VD: Tensor) -> Int4Linear:
    vocabulary, width = weight_VD.shape
    if width % GROUP_SIZE:
        raise UserError(
            f"--head int4 has groups of {GROUP_SIZE}, the model is {width} wide: choose bf16 or int8"
        )
    padding = -vocabulary % head_cpu.OUTPUT_MULTIPLE
    padded_VD = F.pad(weight_VD, (0, 0, 0, padding)) if padding else weight_VD
    layer = Int4Linear(width, vocabulary + padding, group_size=GROUP_SIZE, device="meta")
    layer.qweight, layer.scales = _packed(padded_VD.detach())
    layer.qzeros = torch.full(layer.qzeros.shape, ZERO_WORD, dtype=torch.int32, device=weight_VD.device)
    return layer


def _packed(weight_VD: Tensor) -> tuple[Tensor, Tensor]:
    """qweight int32 [D, V / 8] and scales float16 [G, V], in one compiled pass where that can run."""
    if head_cpu.obstacle(weight_VD) is None:
        return head_cpu.rounded(weight_VD)
    codes_VD, scales_VG = _rounded(weight_VD, 4, GROUP_SIZE)
    return pack_transposed((codes_VD + 8).view(torch.uint8)), scales_VG.t().half().contiguous()


def _rounded(weight_VD: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor]:
    """Codes int8 [V, D] and scales bfloat16 [V, G]."""
    codes, scales = [], []
    for rows_RD in weight_VD.detach().split(_ROWS):
        largest_RG = rows_RD.float().unflatten(1, (-1, group_size)).abs().amax(-1)
        theta_RG = (largest_RG / grid.code_range(bits)[1]).clamp_min(1e-9).log()
        codes_RD, scales_RG = grid.quantize(rows_RD, theta_RG, group_size, bits)
        codes.append(codes_RD)
        scales.append(scales_RG)
    return torch.cat(codes), torch.cat(scales)
