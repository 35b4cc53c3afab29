"""MLX affine quantization, for mlx-vlm and mlx-lm on Apple silicon.

Per quantized linear: `weight` uint32 [O, W] (words of `grace.export.words`), `scales` and `biases` bfloat16
[O, G]:

    W = scales * c + biases,   c = q + 2^(bits-1),   biases = -2^(bits-1) * scales

A power of two times a bfloat16 is a bfloat16, so nothing is rounded. Names are those that mlx-vlm gives its
own conversions, the patch convolution has its channels last, and `quantization` in config.json says how.

Shape suffixes: O output features, I input features, G groups (= I / g), W words (= I * bits / 32).
"""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grace.errors import UserError
from grace.export.directory import (
    Part,
    Stored,
    dense_entries,
    deployed_config,
    module_shapes,
    packed_entries,
    write_directory,
)
from grace.export.shards import Weights
from grace.export.source import Source
from grace.export.stream import Entry
from grace.export.words import pack_words, unpack_words
from grace.models.foreign_names import is_patch_convolution, mlx_name

LABEL = "MLX"
GROUP_SIZES = (32, 64, 128)


def write(source: Source, directory: Path, max_shard_bytes: int | None = None) -> None:
    """Writes the directory, all but its README, one tensor at a time.

    Raises:
        UserError: a group size that MLX has no kernels for, or a linear that the layout cannot hold.
    """
    bits, group_size = source.qat.bits, source.qat.group_size
    if group_size not in GROUP_SIZES:
        raise UserError(
            f"MLX holds groups of {', '.join(map(str, GROUP_SIZES))} and this run has {group_size}: "
            "export it with --format qat"
        )
    entries = [_renamed(entry) for entry in dense_entries(source)]
    for name, shape in module_shapes(source).items():
        entries += packed_entries(source, name, _parts(shape, bits, group_size), LABEL, mlx_name(name))
    config = quantized_config(source.config, bits, group_size)
    write_directory(source, directory, entries, config, "mlx", max_shard_bytes, {"format": "mlx"})


def read(source: Source, directory: Path) -> Stored:
    """The written directory in the terms of the base model."""
    weights, bits = Weights(directory), source.qat.bits

    def codes(name: str) -> tuple[Tensor, Tensor]:
        stored = {part: weights.read(f"{mlx_name(name)}.{part}") for part in ("weight", "scales", "biases")}
        if not torch.equal(stored["biases"].float(), -(2 ** (bits - 1)) * stored["scales"].float()):
            raise ValueError(f"{name}: biases are not -{2 ** (bits - 1)} * scales")
        return unpack_words(stored["weight"].view(torch.int32), bits), stored["scales"]

    def dense(name: str) -> Tensor:
        tensor = weights.read(mlx_name(name))
        return _channels_first(tensor) if is_patch_convolution(name) else tensor

    return Stored(codes, dense)


def _parts(shape: tuple[int, int], bits: int, group_size: int) -> list[Part]:
    outputs, inputs = shape
    grouped = (outputs, inputs // group_size)
    zero_point = 2 ** (bits - 1)
    return [
        Part(
            "weight",
            torch.uint32,
            (outputs, inputs * bits // 32),
            lambda weight: pack_words(weight.codes_OI, bits).view(torch.uint32),
        ),
        Part("scales", torch.bfloat16, grouped, lambda weight: weight.scales_OG),
        Part("biases", torch.bfloat16, grouped, lambda weight: weight.scales_OG * -zero_point),
    ]


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


def _channels_first(tensor: Tensor) -> Tensor:
    return tensor.movedim(-1, 1).contiguous()


def quantized_config(config: Mapping[str, Any], bits: int, group_size: int) -> dict[str, Any]:
    """The model's config with bfloat16 as its type, and MLX's block under both of its names.

    mlx-vlm knows the vision tower's type by the name that published checkpoints give it, which is the
    whole model's; transformers 5 writes another.
    """
    block = {"group_size": group_size, "bits": bits, "mode": "affine"}
    whole = deployed_config(config)
    whole["vision_config"] = {**whole["vision_config"], "model_type": whole["model_type"]}
    return {**whole, "quantization": block, "quantization_config": block}
