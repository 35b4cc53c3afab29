"""Checkpoints that the public GRACE code trained: bfloat16 weights and, beside them, `qat_quantized_weights.bin`.

That file (github.com/ForeverBlue816/GRACE, qwenvl/train/qat_modules.py) is a dictionary saved by torch:

    <module>.weight     [O, I], on the grid as far as its type can
    <module>.log_scale  [O * G], natural logarithms of the scales, row by row
    <module>.bias       [O], where the layer has one

    s = exp(log_scale) in float32,   q = clip(round(W / s))

The scales are any float32 numbers: formats with float32 scales hold them, others get the nearest they have
(`grace.export.fit`). How many bits the codes have is not recorded: 4, unless a weight that lies on its grid
has codes that 4 bits cannot hold. Shape suffixes: O output features, I input features, G groups.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grace.checked_files import MEND, damage_of
from grace.checkpoint import QatState
from grace.export.contents import Modules, Source, Tensors, require_group_size, without_packing
from grace.export.shards import Weights
from grace.export.torch_archive import TorchFile
from grace.quant.grid import divided_codes

SIDECAR = "qat_quantized_weights.bin"
KIND = "reference-qat"
_LOOKED_AT = 8  # modules that decide how many bits there are


def read(directory: Path, config: Mapping[str, Any]) -> Source:
    """Such a directory in the terms of the base model.

    Raises:
        UserError: damaged, inconsistent, or a pickle that holds more than tensors.
    """
    with damage_of(directory, MEND):
        file = TorchFile(directory / SIDECAR)
        names = sorted(
            name.removesuffix(".log_scale") for name in file.entries if name.endswith(".log_scale")
        )
        if not names:
            raise ValueError(f"{SIDECAR} holds no log_scale")
        shapes = {name: _shape(file, name) for name in names}
        counts = {name: torch.Size(file.entries[f"{name}.log_scale"].shape).numel() for name in names}
        sizes = {outputs * inputs // counts[name] for name, (outputs, inputs) in shapes.items()}
        if len(sizes) != 1:
            raise ValueError(f"{SIDECAR} has groups of different sizes: {sorted(sizes)}")
        group_size = require_group_size(sizes.pop(), shapes)
        weights = _WithBiases(Weights(directory), file)

    def scales(name: str) -> Tensor:
        outputs, inputs = shapes[name]
        return file.read(f"{name}.log_scale").float().reshape(outputs, inputs // group_size).exp()

    with damage_of(directory, MEND):
        bits = _bits(file, names, scales)

    def codes(name: str) -> Tensor:
        return divided_codes(file.read(f"{name}.weight"), scales(name), bits)[0]

    modules = Modules(directory, shapes, bits, group_size, codes, lambda name: (scales(name), None))
    return Source(directory, QatState(bits, group_size, modules, {}), without_packing(config), weights, KIND)


def _shape(file: TorchFile, name: str) -> tuple[int, int]:
    weight, logs = file.entries[f"{name}.weight"], file.entries[f"{name}.log_scale"]
    if len(weight.shape) != 2 or 0 in weight.shape or not weight.dtype.is_floating_point:
        raise ValueError(f"{name}.weight is {weight.dtype} {weight.shape}")
    count = torch.Size(logs.shape).numel()
    if not logs.dtype.is_floating_point or not count or weight.shape[0] * weight.shape[1] % count:
        raise ValueError(f"{name}.log_scale is {logs.dtype} {logs.shape} beside a weight {weight.shape}")
    return weight.shape[0], weight.shape[1]


def _bits(file: TorchFile, names: list[str], scales: Any) -> int:
    """4, or 8 if a weight on its grid needs them."""
    for name in names[:_LOOKED_AT]:
        _, clipped, _ = divided_codes(file.read(f"{name}.weight"), scales(name), 4)
        if clipped:
            _, too_large, on_grid = divided_codes(file.read(f"{name}.weight"), scales(name), 8)
            if on_grid and not too_large:
                return 8
    return 4


class _WithBiases:
    """The weight files, with the biases of quantized linears from beside them."""

    def __init__(self, weights: Tensors, file: TorchFile):
        self._weights, self._file = weights, file
        self._own = {name: entry for name, entry in file.entries.items() if name.endswith(".bias")}
        self.shapes = {**weights.shapes, **{name: entry.shape for name, entry in self._own.items()}}
        self.dtypes = {**weights.dtypes, **{name: entry.dtype for name, entry in self._own.items()}}

    def read(self, name: str) -> Tensor:
        """One whole tensor."""
        return self._file.read(name) if name in self._own else self._weights.read(name)

    def pieces(self, name: str) -> Iterator[Tensor]:
        """One tensor in slices of its first dimension."""
        return iter([self._file.read(name)]) if name in self._own else self._weights.pieces(name)
