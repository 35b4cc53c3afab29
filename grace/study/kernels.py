"""Quantizers that the study compares with the one that trains: what its rules cost, or save.

Shape suffixes: O output features, I input features, G groups along the input.
"""

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from grace.quant.fake_quant import TorchKernels


class Unsnapped(TorchKernels):
    """Scales in full precision: what training would be if no format had to hold them."""

    scale: ClassVar[Callable[[Tensor], Tensor]] = staticmethod(lambda theta_OG: theta_OG.detach().exp())


class Once(TorchKernels):
    """Quantizes a weight once, until it is told that weights have changed."""

    def __init__(self) -> None:
        self.kept: dict[int, Tensor] = {}

    def forget(self) -> None:
        """To be called after every optimizer step: fused optimizers leave no trace on a tensor's version."""
        self.kept.clear()

    def forward(  # type: ignore[override]
        self, weight_OI: Tensor, theta_OG: Tensor, group_size: int, bits: int, dtype: torch.dtype
    ) -> Tensor:
        """See `grace.quant.fake_quant.Kernels`."""
        place = weight_OI.data_ptr()
        if place not in self.kept:
            self.kept[place] = super().forward(weight_OI, theta_OG, group_size, bits, dtype)
        return self.kept[place]


KERNELS: dict[str, Callable[[], TorchKernels]] = {"torch": TorchKernels, "unsnapped": Unsnapped, "once": Once}
