"""MLX affine quantization, for mlx-vlm and mlx-lm on Apple silicon.

Per quantized linear: `weight` uint32 [O, W] (words of `grace.export.words`), `scales` and `biases` [O, G]:

    W = scales * c + biases,   c = q + 2^(bits-1),   biases = -2^(bits-1) * scales

Trained scales are bfloat16, and a power of two times a bfloat16 is a bfloat16, so nothing is rounded. Zero
points z of other people's checkpoints make biases = -(2^(bits-1) + z) * scales, both as float32. Names are those that mlx-vlm gives its
own conversions, the patch convolution has its channels last, and `quantization` in config.json says how.

Shape suffixes: O output features, I input features, G groups (= I / g), W words (= I * bits / 32).
"""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grace.checked_files import MEND, damage_of, shown
from grace.checkpoint import QatState, QuantizedWeight
from grace.errors import UserError
from grace.export.contents import Modules, Source, View, modules_of, require_group_size, without_packing
from grace.export.directory import (
    Part,
    dense_entries,
    deployed_config,
    deployed_dtype,
    packed_entries,
    write_directory,
)
from grace.export.shards import Weights
from grace.export.stream import Entry
from grace.export.words import BITS, pack_words, unpack_words
from grace.models import qwen3vl
from grace.models.foreign_names import is_patch_convolution, mlx_name
from grace.quant.grid import whole

PARTS = ("weight", "scales", "biases")
LABEL = "MLX"
GROUP_SIZES = (32, 64, 128)


def write(source: Source, directory: Path, max_shard_bytes: int | None = None) -> None:
    """Writes the directory, all but its README, one tensor at a time.

    Raises:
        UserError: a group size that MLX has no kernels for, or a linear that the layout cannot hold.
    """
    group_size = source.qat.group_size
    if group_size not in GROUP_SIZES:
        raise UserError(
            f"MLX holds groups of {', '.join(map(str, GROUP_SIZES))} and this run has {group_size}: "
            "export it with --format qat"
        )
    entries = [_renamed(entry) for entry in dense_entries(source)]
    for name, shape in modules_of(source).shapes.items():
        entries += packed_entries(source, name, _parts(shape, source), LABEL, mlx_name(name))
    write_directory(
        source, directory, entries, quantized_config(source), "mlx", max_shard_bytes, {"format": "mlx"}
    )


def read(directory: Path, config: Mapping[str, Any]) -> Source:
    """An MLX directory in the terms of the base model.

    Raises:
        UserError: damaged, another mode than affine, or biases that are not whole multiples of the scales.
    """
    stored = without_packing(config)
    if isinstance(stored.get("vision_config"), dict):
        stored["vision_config"] = {**stored["vision_config"], "model_type": qwen3vl.VISION_TYPE}
    bits, group_size = _scheme(directory, config)
    base = {mlx_name(name): name for name in qwen3vl.parameter_shapes(qwen3vl.config_of(stored, directory))}
    base.setdefault(mlx_name("lm_head.weight"), "lm_head.weight")
    with damage_of(directory, MEND):
        weights = Weights(directory)
        packed = sorted(name.removesuffix(".scales") for name in weights.shapes if name.endswith(".scales"))
        if not packed:
            raise ValueError("no tensor is called scales")
        require_group_size(group_size, {})
        names = {base[f"{name}.weight"].removesuffix(".weight"): name for name in packed}
        shapes = {name: _shape(weights, there, bits, group_size) for name, there in names.items()}
        parts = {f"{there}.{part}" for there in packed for part in PARTS}
        dense = _dense_view(weights, {base[name]: name for name in weights.shapes if name not in parts})

    def codes(name: str) -> Tensor:
        return unpack_words(weights.read(f"{names[name]}.weight").view(torch.int32), bits)

    def grid(name: str) -> tuple[Tensor, Tensor | None]:
        scales_OG = weights.read(f"{names[name]}.scales")
        return scales_OG, _zero_points(name, scales_OG, weights.read(f"{names[name]}.biases"), bits)

    modules = Modules(directory, shapes, bits, group_size, codes, grid)
    return Source(directory, QatState(bits, group_size, modules, {}), stored, dense, "mlx")


def _scheme(directory: Path, config: Mapping[str, Any]) -> tuple[int, int]:
    """Bits and group size; one for all modules.

    Raises:
        UserError: another mode, or modules with settings of their own.
    """
    block = config.get("quantization") or config.get("quantization_config")
    with damage_of(directory, MEND):
        known = {"bits", "group_size", "mode", "quant_method"}
        own = [key for key in block if key not in known]  # type: ignore[union-attr]
        bits, mode = block["bits"], block.get("mode", "affine")  # type: ignore[index,union-attr]
        group_size = block["group_size"]  # type: ignore[index]
    if own or mode != "affine" or type(bits) is not int or bits not in BITS:
        what = (
            f"settings of their own for {shown(own[0])}"
            if own
            else f"mode {shown(mode)} of {shown(bits)} bits"
        )
        raise UserError(
            f"{directory} is MLX with {what}: GRACE reads affine, 4 or 8 bits, alike for all modules"
        )
    return bits, group_size


def _shape(weights: Weights, name: str, bits: int, group_size: int) -> tuple[int, int]:
    """[out, in] of one linear, its three tensors compared.

    Raises:
        ValueError: they do not fit each other.
    """
    packed, scales, biases = (weights.shapes[f"{name}.{part}"] for part in PARTS)
    if len(packed) != 2 or weights.dtypes[f"{name}.weight"] != torch.uint32:
        raise ValueError(f"{name}: weight is {weights.dtypes[f'{name}.weight']} {packed}")
    shape = (packed[0], packed[1] * 32 // bits)
    require_group_size(group_size, {name: shape})
    if scales != (shape[0], shape[1] // group_size) or biases != scales:
        raise ValueError(f"{name}: weight, scales and biases do not fit")
    return shape


def _zero_points(name: str, scales_OG: Tensor, biases_OG: Tensor, bits: int) -> Tensor | None:
    """Zero points z, as codes, with biases = -(z + 2^(bits-1)) * scales; None where all are 0.

    Raises:
        ValueError: there are none.
    """
    if not bool(((scales_OG > 0) & scales_OG.isfinite()).all()):
        return None  # refused as scales, whatever the biases
    scales_OG, biases_OG = scales_OG.double(), biases_OG.double()
    half = 2 ** (bits - 1)
    zeros_OG = whole(-biases_OG / scales_OG)  # the exact quotient where there is one
    if not torch.equal(zeros_OG * scales_OG, -biases_OG) or not bool(
        ((zeros_OG >= 0) & (zeros_OG < 2 * half)).all()
    ):
        raise ValueError(f"{name}: biases are not zero points times scales, as integers need them")
    return (zeros_OG - half).to(torch.int8) if bool((zeros_OG != half).any()) else None


def _parts(shape: tuple[int, int], source: Source) -> list[Part]:
    outputs, inputs = shape
    bits, grouped = source.qat.bits, (outputs, inputs // source.qat.group_size)
    # With zero points a bias needs more digits than a scale; MLX wants both of one type.
    dtype = source.scale_dtype if source.symmetric else torch.float32
    return [
        Part(
            "weight",
            torch.uint32,
            (outputs, inputs * bits // 32),
            lambda weight: pack_words(weight.codes_OI, bits).view(torch.uint32),
        ),
        Part("scales", dtype, grouped, lambda weight: weight.scales_OG.to(dtype), True),
        Part("biases", dtype, grouped, lambda weight: _biases(weight, bits, dtype), True),
    ]


def _biases(weight: QuantizedWeight, bits: int, dtype: torch.dtype) -> Tensor:
    """-(2^(bits-1) + zero) * scale.

    Raises:
        ValueError: one of them is too large for `dtype`, or has more digits.
    """
    zeros_OG = 0 if weight.zeros_OG is None else weight.zeros_OG.double()
    exact_OG = -(2 ** (bits - 1) + zeros_OG) * weight.scales_OG.double()
    biases_OG = exact_OG.to(dtype)
    if not torch.equal(biases_OG.double(), exact_OG):
        raise ValueError(f"its biases are not exact in {str(dtype).removeprefix('torch.')}")
    return biases_OG


def _renamed(entry: Entry) -> Entry:
    """A dense tensor under its MLX name; the patch convolution [O, C, T, H, W] as [O, T, H, W, C]."""
    if not is_patch_convolution(entry.name):
        return Entry(mlx_name(entry.name), entry.dtype, entry.shape, entry.make)
    outputs, channels, *kernel = entry.shape
    return Entry(
        mlx_name(entry.name), entry.dtype, (outputs, *kernel, channels), partial(_channels_last, entry)
    )


def _channels_last(entry: Entry) -> Iterator[Tensor]:
    return (piece.movedim(1, -1) for piece in entry.pieces())


def _dense_view(weights: Weights, names: Mapping[str, str]) -> View:
    """The dense tensors under the base model's names, the patch convolution's channels before its kernel."""
    moved = {name: weights.shapes[there] for name, there in names.items() if is_patch_convolution(name)}

    def channels_first(name: str, tensor: Tensor) -> Tensor:
        return tensor.movedim(-1, 1).contiguous() if name in moved else tensor

    shapes = {name: (outputs, channels, *kernel) for name, (outputs, *kernel, channels) in moved.items()}
    return View(weights, names, channels_first, shapes)


def quantized_config(source: Source) -> dict[str, Any]:
    """The model's config with its deployed type, and MLX's block under both of its names.

    mlx-vlm knows the vision tower's type by the name that published checkpoints give it, which is the
    whole model's; transformers 5 writes another.
    """
    block = {"group_size": source.qat.group_size, "bits": source.qat.bits, "mode": "affine"}
    whole = deployed_config(source.config, deployed_dtype(source))
    whole["vision_config"] = {**whole["vision_config"], "model_type": whole["model_type"]}
    return {**whole, "quantization": block, "quantization_config": block}
