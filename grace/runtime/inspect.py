"""`grace inspect DIR`: what is inside a quantized directory, layer by layer.

Reads QAT checkpoints and AWQ directories; no model is built. Shape suffixes: O output features,
I input features, G groups along the input.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError, safe_open
from torch import Tensor

from grace.checked_files import INDEX, WEIGHTS, read_json, reading, shown
from grace.checkpoint import read_qat
from grace.errors import UserError
from grace.kernels import registry
from grace.kernels.awq_layout import unpack_transposed
from grace.models.stored import require_loadable
from grace.quant.grid import dequantize
from grace.runtime.loading import checkpoint_kind, packed_block

NO_LATENTS = "no fp32 latents in this directory"
# How the block of an AWQ config names bits and group size, and how AutoAWQ named them before.
_BLOCK_NAMES = (("bits", "w_bit"), ("group_size", "q_group_size"))
_BARS = " ▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class _Layer:
    """One quantized linear as read: codes relative to a zero point of 8, fp32 scales."""

    name: str
    bits: int
    group_size: int
    codes_OI: Tensor
    scales_OG: Tensor
    stored_bytes: int
    latent_OI: Tensor | None


def inspect_checkpoint(directory: str | Path) -> dict[str, Any]:
    """Figures of every quantized layer, and totals.

    Returns:
        `{"kind", "bits", "group_size", "layers": [{"name", "bits", "group_size", "shape", "scale_min",
        "scale_max", "histogram", "snr_db", "snr_reason", "bytes"}], "totals": {...}, "kernels": [{"layers", "count", "device", "kernel"}]}`. `histogram`
        counts codes from the lowest to the highest in 2^bits bins, at most 16 (8 bits: 16 codes to a
        bin). `snr_db` is 10 log10(sum W^2 / sum (W - W_hat)^2) against the fp32 latents, null with a
        reason where they are not stored. `bytes` are as stored: a QAT checkpoint's are one byte per code.
        `kernels` says what `--kernel auto` runs on this machine, by class of layers; nothing for a QAT
        checkpoint, which runs dense.

    Raises:
        UserError: nothing quantized there, or damaged files.
    """
    directory = Path(directory)
    with reading(directory):
        kind = checkpoint_kind(directory)
    if kind == "plain":
        raise UserError(f"{directory} holds no quantized weights: give an AWQ or QAT directory")
    if kind == "qat" or (directory / WEIGHTS).exists() or (directory / INDEX).exists():
        require_loadable(directory)
    try:
        layers = [_figures(layer) for layer in (_qat_layers if kind == "qat" else _awq_layers)(directory)]
        file_bytes = sum(path.stat().st_size for path in directory.rglob("*.safetensors"))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{directory} is damaged ({error}): export it again") from error
    if not layers:
        raise UserError(f"{directory} holds no quantized layers: export it again")
    weights = sum(math.prod(layer["shape"]) for layer in layers)
    quantized_bytes = sum(layer["bytes"] for layer in layers)
    known = [layer["snr_db"] for layer in layers if layer["snr_db"] is not None]
    totals = {
        "layers": len(layers),
        "weights": weights,
        "quantized_bytes": quantized_bytes,
        "bits_per_weight": 8 * quantized_bytes / weights,
        "safetensors_bytes": file_bytes,
        "snr_db_min": min(known) if known else None,
        "snr_db_mean": sum(known) / len(known) if known else None,
    }
    return {
        "directory": str(directory), "kind": kind, "bits": layers[0]["bits"],
        "group_size": layers[0]["group_size"], "layers": layers, "totals": totals,
        "kernels": _kernels(layers) if kind == "awq" else [],
    }  # fmt: skip


def _kernels(layers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What `--kernel auto` runs on this machine, by class of layers."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    described = []
    for layer in layers:
        out_features, in_features = layer["shape"]
        shape = registry.Shape(in_features, out_features, layer["group_size"])
        described.append((layer["name"], registry.describe(shape, "auto", device)))
    return [
        {"layers": names, "count": count, "device": device.type, "kernel": text}
        for names, count, text in registry.classes(described)
    ]


def _qat_layers(directory: Path) -> Iterator[_Layer]:
    state = _read_with_latents(directory)
    for name, weight in sorted(state.modules.items()):
        stored = weight.codes_OI.nbytes + weight.scales_OG.nbytes
        yield _Layer(
            name,
            state.bits,
            state.group_size,
            weight.codes_OI,
            weight.scales_OG.float(),
            stored,
            weight.latent_OI,
        )


def _read_with_latents(directory: Path) -> Any:
    """The QAT state, with latents where they are stored (they may be left out of a published copy)."""
    with safe_open(directory / "grace_qat" / "state.safetensors", framework="pt") as file:
        suffixes = {name.rpartition(".")[2] for name in file.keys()}  # noqa: SIM118
        has_latents = {"latent", "theta"} <= suffixes  # a part of them is of no use
    return read_qat(directory, latents=has_latents)


def _awq_layers(directory: Path) -> Iterator[_Layer]:
    whole = read_json(directory / "config.json")
    config = whole.get("quantization_config") or packed_block(whole, directory)
    bits, group_size = (config.get(name, config.get(old)) for name, old in _BLOCK_NAMES)
    if type(bits) is not int or bits != 4 or type(group_size) is not int or group_size < 1:
        raise ValueError(f"{shown(bits)} bits in groups of {shown(group_size)}")
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            for key in sorted(name for name in names if name.endswith(".qweight")):
                name = key.removesuffix(".qweight")
                stored = [file.get_tensor(f"{name}.{part}") for part in ("qweight", "qzeros", "scales")]
                yield _awq_layer(name, bits, group_size, *stored)


def _awq_layer(
    name: str, bits: int, group_size: int, qweight: Tensor, qzeros: Tensor, scales: Tensor
) -> _Layer:
    codes_OI = unpack_transposed(qweight).view(torch.int8) - 8
    if scales.shape != (qweight.shape[0] // group_size, qweight.shape[1] * 8):
        raise ValueError(
            f"{name}: qweight {tuple(qweight.shape)} and scales {tuple(scales.shape)} do not fit"
        )
    if not bool(scales.isfinite().all()):  # NaN is no JSON either
        raise ValueError(f"{name}: scales hold NaN or infinite values")
    stored = qweight.nbytes + qzeros.nbytes + scales.nbytes
    return _Layer(name, bits, group_size, codes_OI, scales.t().float(), stored, None)


def _figures(layer: _Layer) -> dict[str, Any]:
    low, bins = -(2 ** (layer.bits - 1)), min(16, 2**layer.bits)
    counts = torch.bincount((layer.codes_OI.flatten().int() - low), minlength=2**layer.bits)
    snr_db, reason = _snr_db(layer)
    return {
        "name": layer.name,
        "bits": layer.bits,
        "group_size": layer.group_size,
        "shape": list(layer.codes_OI.shape),
        "scale_min": layer.scales_OG.min().item(),
        "scale_max": layer.scales_OG.max().item(),
        "histogram": counts.view(bins, -1).sum(-1).tolist(),
        "snr_db": snr_db,
        "snr_reason": reason,
        "bytes": layer.stored_bytes,
    }


def _snr_db(layer: _Layer) -> tuple[float | None, str | None]:
    """Signal to quantization noise against the latents, or why it is not known."""
    if layer.latent_OI is None:
        return None, NO_LATENTS
    rounded_OI = dequantize(layer.codes_OI, layer.scales_OG.bfloat16(), layer.group_size)
    signal = layer.latent_OI.double().square().sum().item()
    if not math.isfinite(signal):
        return None, "latents hold NaN or infinite values"
    noise = (layer.latent_OI.double() - rounded_OI.double()).square().sum().item()
    if noise == 0 or signal == 0:
        return None, "weights lie on the grid" if noise == 0 else "weights are all zero"
    return 10 * math.log10(signal / noise), None


def inspect_table(report: Mapping[str, Any]) -> Table:
    """The figures for a terminal."""
    totals = report["totals"]
    table = Table(
        title=f"{report['directory']}: {report['kind']}, "
        f"{totals['layers']} layers, {totals['weights']:,} weights",
        caption=f"{totals['bits_per_weight']:.2f} bits per quantized weight, "
        f"{totals['safetensors_bytes'] / 1e6:.2f} MB in all",
    )
    columns = (
        "layer",
        "shape",
        "bits",
        "group",
        "scale min",
        "scale max",
        "codes, low to high",
        "SNR, dB",
        "bytes",
    )
    for column in columns:
        table.add_column(
            column, justify="left" if column in ("layer", "codes, low to high") else "right", no_wrap=True
        )
    for layer in report["layers"]:
        table.add_row(
            layer["name"].removeprefix("model.language_model."),
            "x".join(map(str, layer["shape"])),
            str(layer["bits"]),
            str(layer["group_size"]),
            f"{layer['scale_min']:.2e}",
            f"{layer['scale_max']:.2e}",
            _bars(layer["histogram"]),
            "unknown" if layer["snr_db"] is None else f"{layer['snr_db']:.1f}",
            f"{layer['bytes']:,}",
        )
    return table


def _bars(histogram: list[int]) -> str:
    top = max(max(histogram), 1)
    return "".join(_BARS[-(-count * (len(_BARS) - 1) // top)] for count in histogram)


def run_inspect(args: argparse.Namespace) -> int:
    """Entry point of `grace inspect`."""
    report = inspect_checkpoint(args.directory)
    if args.json:
        print(json.dumps(report))
        return 0
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(inspect_table(report))
    for kernel in report["kernels"]:
        console.print(
            f"{kernel['layers']} ({kernel['count']}) here, on {kernel['device']}: {kernel['kernel']}"
        )
    reasons = sorted({layer["snr_reason"] for layer in report["layers"] if layer["snr_reason"]})
    if reasons:
        console.print(f"SNR unknown: {'; '.join(reasons)}")
    return 0
