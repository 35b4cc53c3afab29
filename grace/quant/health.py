"""How quantized weights fare during training: clipping, codes that flip, scales that drift, quantization noise.

Measured when a run logs, never in between, and on a sample: layers of more than `SAMPLED` weights are looked at
in evenly spaced rows, always the same ones, which gives shares to within .001 and decibels to within .02 and
keeps a measurement of a 2B model to 50 MB and a few milliseconds on a GPU. Nothing waits for the device before
the one copy at the end.

Shape suffixes: O rows looked at, I input features, G groups along the input, S one group's elements.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from grace.quant import grid
from grace.quant.fake_quant import QuantLinear

SAMPLED = 2**18


@dataclass(frozen=True)
class LayerHealth:
    """One layer, or several together.

    Attributes:
        snr_db: 10 log10(sum W^2 / sum (W - W_hat)^2).
        clipped: share of weights whose rounded value lies outside the codes; they get no gradient.
        flipped: share of codes that are not those of the last measurement.
        scale_drift: mean |theta - theta_0|, theta_0 as training started; 0.1 is a scale 10 % off.
    """

    snr_db: float
    clipped: float
    flipped: float
    scale_drift: float


@dataclass(frozen=True)
class Health:
    """A measurement: all layers together (None where no process holds rows of any), and one by one."""

    together: LayerHealth | None
    layers: dict[str, LayerHealth]


class QuantHealth:
    """Remembers, of the rows looked at, the codes of the last measurement and the scales of the start.

    Of layers sharded by rows each process measures its own: add `sums` up over the processes before `health`.

    Args:
        layers: by name; their scales are taken to be those of the start of training.
        sampled: weights of a layer that are looked at, about.
    """

    def __init__(self, layers: Mapping[str, QuantLinear], sampled: int = SAMPLED):
        self.layers, self.sampled = dict(layers), sampled
        self.theta_0: dict[str, Tensor] = {}
        self.codes: dict[str, Tensor] = {}
        for name, layer in self.layers.items():
            weight_OGS, theta_OG = _looked_at(layer, self.sampled)
            self.theta_0[name] = theta_OG.clone()
            self.codes[name] = _codes(weight_OGS, theta_OG, layer.bits)[0]

    @torch.no_grad()
    def sums(self) -> Tensor:
        """Unnormalised sums of every layer [layers, 6] float64, on the device; the codes become the last ones.

        Columns: W^2, (W - W_hat)^2, clipped, flipped, |theta - theta_0|, weights.
        """
        rows = []
        for name, layer in self.layers.items():
            weight_OGS, theta_OG = _looked_at(layer, self.sampled)
            codes_OGS, noise, clipped = _codes(weight_OGS, theta_OG, layer.bits, measured=True)
            flipped = (codes_OGS != self.codes[name]).sum()
            drift = (theta_OG - self.theta_0[name]).abs().sum(dtype=torch.float64) * layer.group_size
            self.codes[name] = codes_OGS
            signal = weight_OGS.float().square().sum(dtype=torch.float64)
            parts = (signal, noise, clipped, flipped, drift, torch.full_like(signal, codes_OGS.numel()))
            rows.append(torch.stack([part.double() for part in parts]))
        return torch.stack(rows) if rows else torch.zeros(0, 6, dtype=torch.float64)

    def health(self, sums: Tensor) -> Health:
        """What `sums` amount to; copies them to the host."""
        table = sums.tolist()
        layers = {name: _layer_health(row) for name, row in zip(self.layers, table, strict=True) if row[-1]}
        together = [math.fsum(column) for column in zip(*table, strict=True)]
        return Health(_layer_health(together) if layers else None, layers)

    def state(self) -> dict[str, Tensor]:
        """The codes of the last measurement by layer, int8: an interrupted run counts flips from the same ones.

        Of layers that lie here whole: of others every process has its own, and a resumed run begins anew.
        """
        return {name: codes for name, codes in self.codes.items() if self._is_whole(name)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Takes over a `state`; layers that it lacks, or has in another shape, count from their codes of now."""
        for name, codes_OGS in self.codes.items():
            known = state.get(name)
            if known is not None and known.shape == codes_OGS.shape and self._is_whole(name):
                self.codes[name] = known.to(codes_OGS.device)

    def _is_whole(self, name: str) -> bool:
        weight = self.layers[name].weight
        return weight.numel() > 0 and not hasattr(weight, "to_local")


def _layer_health(sums: list[float]) -> LayerHealth:
    signal, noise, clipped, flipped, drift, count = sums
    snr_db = 10 * math.log10(signal / noise) if signal > 0 and noise > 0 else math.inf if signal > 0 else 0.0
    return LayerHealth(snr_db, clipped / count, flipped / count, drift / count)


def _rows_here(tensor: Tensor) -> Tensor:
    """The rows that this process holds: all, or its part of a tensor sharded by rows."""
    local = getattr(tensor, "to_local", None)
    return tensor.detach() if local is None else local().detach()


def _looked_at(layer: QuantLinear, sampled: int) -> tuple[Tensor, Tensor]:
    """Weight [O, G, S] and theta [O, G] of the rows of the sample: views."""
    weight_OI, theta_OG = _rows_here(layer.weight), _rows_here(layer.theta)
    if not weight_OI.numel():  # the whole layer is elsewhere
        return weight_OI.new_zeros(0, 1, layer.group_size), theta_OG.new_zeros(0, 1)
    step = max(1, math.ceil(weight_OI.numel() / sampled))
    return grid.grouped(weight_OI[::step], layer.group_size), theta_OG[::step]


def _codes(
    weight_OGS: Tensor, theta_OG: Tensor, bits: int, measured: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [O, G, S] int8, sum (W - W_hat)^2, and how many are clipped (both 0 unless `measured`)."""
    low, high = grid.code_range(bits)
    weight_OGS, scale_OG = weight_OGS.float(), grid.snapped_scale(theta_OG)
    ratio_OGS = grid.rounded_ratio(weight_OGS, scale_OG)
    codes_OGS = ratio_OGS.clamp(low, high)
    zero = torch.zeros((), dtype=torch.float64, device=weight_OGS.device)
    if not measured:
        return codes_OGS.to(torch.int8), zero, zero
    clipped = (ratio_OGS != codes_OGS).sum()
    error_OGS = torch.mul(codes_OGS, scale_OG.unsqueeze(-1), out=ratio_OGS).sub_(weight_OGS)
    return codes_OGS.to(torch.int8), error_OGS.square_().sum(dtype=torch.float64), clipped
