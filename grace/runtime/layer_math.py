"""What a decoder layer does between its matrix products, in two ways: by torch on any device, or compiled on the CPU.

Both take and give the same; `layer_math` picks. Shape suffixes: those of `grace.kernels.layer_cpu`.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from grace.kernels import compiled, layer_cpu


class LayerMath(Protocol):
    """The three passes of a layer."""

    def add_norm(self, x_TD: Tensor, delta_TD: Tensor | None, weight_D: Tensor) -> tuple[Tensor, Tensor]:
        """x + delta, and that over its root mean square times a weight. May change x."""
        ...

    def rotate(
        self,
        qkv_TZ: Tensor,
        weight_XS: Tensor,
        cos_TS: Tensor,
        sin_TS: Tensor,
        keys_RKCS: Tensor,
        values_RKCS: Tensor,
        rows_T: Tensor,
        places_T: Tensor,
    ) -> Tensor:
        """Norms and turns queries and keys, puts keys and values into the cache; the queries [T, Q, S]."""
        ...

    def gate(self, both_TJ: Tensor) -> Tensor:
        """silu(gate) * up of gate and up side by side."""
        ...


class TorchMath:
    """By torch."""

    def __init__(self, epsilon: float):
        self.epsilon = epsilon

    def add_norm(self, x_TD: Tensor, delta_TD: Tensor | None, weight_D: Tensor) -> tuple[Tensor, Tensor]:
        if delta_TD is not None:
            x_TD = x_TD + delta_TD
        return x_TD, F.rms_norm(x_TD, x_TD.shape[-1:], weight_D, self.epsilon)

    def rotate(
        self,
        qkv_TZ: Tensor,
        weight_XS: Tensor,
        cos_TS: Tensor,
        sin_TS: Tensor,
        keys_RKCS: Tensor,
        values_RKCS: Tensor,
        rows_T: Tensor,
        places_T: Tensor,
    ) -> Tensor:
        heads, size = weight_XS.shape
        qkv_THS = qkv_TZ.view(len(qkv_TZ), -1, size)
        qk_TXS = F.rms_norm(qkv_THS[:, :heads], (size,), None, self.epsilon) * weight_XS
        qk_TXS = torch.addcmul(qk_TXS * cos_TS[:, None], qk_TXS.roll(size // 2, -1), sin_TS[:, None])
        queries = heads - keys_RKCS.shape[1]
        keys_RKCS[rows_T, :, places_T] = qk_TXS[:, queries:].to(keys_RKCS.dtype)
        values_RKCS[rows_T, :, places_T] = qkv_THS[:, heads:].to(values_RKCS.dtype)  # autocast's are bf16
        return qk_TXS[:, :queries]

    def gate(self, both_TJ: Tensor) -> Tensor:
        gate_TI, up_TI = both_TJ.chunk(2, -1)
        return F.silu(gate_TI) * up_TI


class CompiledMath:
    """By the compiled passes, in bfloat16 on the CPU. Changes x in place."""

    def __init__(self, epsilon: float):
        self.epsilon = epsilon

    def add_norm(self, x_TD: Tensor, delta_TD: Tensor | None, weight_D: Tensor) -> tuple[Tensor, Tensor]:
        return x_TD, layer_cpu.add_norm(x_TD, delta_TD, weight_D, self.epsilon)

    def rotate(
        self,
        qkv_TZ: Tensor,
        weight_XS: Tensor,
        cos_TS: Tensor,
        sin_TS: Tensor,
        keys_RKCS: Tensor,
        values_RKCS: Tensor,
        rows_T: Tensor,
        places_T: Tensor,
    ) -> Tensor:
        caches = keys_RKCS, values_RKCS
        return layer_cpu.rotate(qkv_TZ, weight_XS, cos_TS, sin_TS, *caches, rows_T, places_T, self.epsilon)

    def gate(self, both_TJ: Tensor) -> Tensor:
        return layer_cpu.gate(both_TJ)


def layer_math(
    epsilon: float, widths: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> LayerMath:
    """The compiled passes where they can run, else torch's.

    Args:
        widths: of what is normed, turned and gated.
    """
    fits = all(width % layer_cpu.WIDTH_MULTIPLE == 0 for width in widths)
    if device.type == "cpu" and dtype == torch.bfloat16 and fits and compiled.obstacle() is None:
        return CompiledMath(epsilon)
    return TorchMath(epsilon)
