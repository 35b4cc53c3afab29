"""Linears that read the same input, run as one.

Shape suffixes: M tokens, D input features, O output features, V vocabulary.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FusedLinear:
    """Several linears over one input; their outputs side by side."""

    def __init__(self, modules: Sequence[nn.Module]):
        self.modules = tuple(modules)

    def __call__(self, x_MD: Tensor) -> Tensor:
        if len(self.modules) == 1:
            return self.modules[0](x_MD)
        return torch.cat([module(x_MD) for module in self.modules], -1)


class Head:
    """The output layer."""

    def __init__(self, weight_VD: Tensor):
        self.weight_VD = weight_VD

    def __call__(self, x_MD: Tensor) -> Tensor:
        return F.linear(x_MD, self.weight_VD)
