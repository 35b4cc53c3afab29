"""Linears that read the same input, run as one.

Shape suffixes: M tokens, D input features, O output features.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from grace.kernels import native
from grace.kernels.registry import KERNELS
from grace.runtime.int4_linear import Int4Linear


class FusedLinear:
    """Several linears over one input; their outputs side by side.

    Packed layers that the compiled kernel serves are one call; it reads them where they lie, so that nothing is
    laid out anew. Others run one after another.
    """

    def __init__(self, modules: Sequence[nn.Module]):
        self.modules = tuple(modules)
        self._weight = _native_weight(self.modules)

    def __call__(self, x_MD: Tensor) -> Tensor:
        if self._weight is not None and x_MD.dtype == torch.bfloat16:
            return native.matmul(x_MD, self._weight)
        if len(self.modules) == 1:
            return self.modules[0](x_MD)
        return torch.cat([module(x_MD) for module in self.modules], -1)


def _native_weight(modules: Sequence[nn.Module]) -> native.NativeWeight | None:
    """The layers as the compiled kernel takes them; None where it was not chosen or cannot run one of them."""
    layers = [module for module in modules if isinstance(module, Int4Linear)]
    if len(layers) < len(modules) or any(layer.kernel not in ("auto", "native") for layer in layers):
        return None
    kernel = KERNELS["native"]
    if any(kernel.layer_obstacle(layer.shape, layer.qweight.device) for layer in layers):
        return None
    stored = [native.Awq(layer.qweight, layer.qzeros, layer.scales, layer.bias) for layer in layers]
    return native.prepare(stored, layers[0].group_size)
