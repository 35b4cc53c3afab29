"""Linears over one input made one layer, so that a decode step launches one kernel for them.

The weights are laid side by side once, and the layers keep views of them: nothing is stored twice.
"""

from collections.abc import Sequence

import torch
from torch import nn

from grace.runtime.int4_linear import Int4Linear


def joined(modules: Sequence[nn.Module]) -> nn.Module | None:
    """One layer whose outputs are those of `modules` side by side, or None where they are not of one kind."""
    if len(modules) == 1:
        return modules[0]
    if all(isinstance(module, Int4Linear) for module in modules):
        return _joined_packed([module for module in modules if isinstance(module, Int4Linear)])
    if all(type(module) is nn.Linear for module in modules):
        return _joined_dense([module for module in modules if isinstance(module, nn.Linear)])
    return None


def _joined_packed(layers: Sequence[Int4Linear]) -> Int4Linear | None:
    first = layers[0]
    kinds = {(layer.in_features, layer.group_size, layer.kernel, layer.bias is None) for layer in layers}
    if len(kinds) > 1 or first.bias is not None:
        return None
    sizes = [layer.out_features for layer in layers]
    whole = Int4Linear(first.in_features, sum(sizes), group_size=first.group_size, device="meta")
    with torch.no_grad():
        for name, per_column in {"qweight": 8, "qzeros": 8, "scales": 1}.items():
            together = torch.cat([getattr(layer, name) for layer in layers], 1)
            setattr(whole, name, together)
            widths = [size // per_column for size in sizes]
            for layer, view in zip(layers, together.split(widths, 1), strict=True):
                setattr(layer, name, view)
    whole.set_kernel(first.kernel)
    return whole


def _joined_dense(layers: Sequence[nn.Linear]) -> nn.Linear | None:
    if any(layer.bias is not None for layer in layers):
        return None
    sizes = [layer.out_features for layer in layers]
    whole = nn.Linear(layers[0].in_features, sum(sizes), bias=False, device="meta")
    together = torch.cat([layer.weight.data for layer in layers])
    whole.weight = nn.Parameter(together, requires_grad=False)
    for layer, view in zip(layers, together.split(sizes), strict=True):
        layer.weight = nn.Parameter(view, requires_grad=False)
    return whole
