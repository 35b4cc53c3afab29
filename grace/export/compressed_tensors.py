"""compressed-tensors `pack-quantized`: symmetric integers in groups, for vLLM, SGLang and transformers.

Per quantized linear: `weight_packed` int32 [O, W] (words of `grace.export.words`), `weight_scale` bfloat16
[O, G] as trained, `weight_shape` int64 [2]. There are no zero points: W = scale * q. Nothing is rounded.

Shape suffixes: O output features, I input features, G groups (= I / g), W words (= I * bits / 32).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grace.export.directory import (
    Part,
    Stored,
    dense_entries,
    deployed_config,
    module_shapes,
    packed_entries,
    write_directory,
)
from grace.export.name_rules import require_compressed_tensors_names
from grace.export.shards import Weights
from grace.export.source import Source
from grace.export.words import pack_words, unpack_words

LABEL = "compressed-tensors"
# A name for those who compare names, and expressions for the engines that rename modules (name_rules.py).
IGNORED = ["lm_head", "re:.*lm_head$", "re:.*visual.*"]


def write(source: Source, directory: Path, max_shard_bytes: int | None = None) -> None:
    """Writes the directory, all but its README, one tensor at a time.

    Raises:
        UserError: a linear that the layout cannot hold, or names that an engine would take for quantized.
    """
    bits, group_size = source.qat.bits, source.qat.group_size
    require_compressed_tensors_names(source, IGNORED)
    entries = dense_entries(source)
    for name, shape in module_shapes(source).items():
        entries += packed_entries(source, name, _parts(shape, bits, group_size), LABEL)
    config = quantized_config(source.config, bits, group_size)
    write_directory(source, directory, entries, config, LABEL, max_shard_bytes)


def read(source: Source, directory: Path) -> Stored:
    """The written directory in the terms of the base model."""
    weights = Weights(directory)

    def codes(name: str) -> tuple[Tensor, Tensor]:
        codes_OI = unpack_words(weights.read(f"{name}.weight_packed"), source.qat.bits)
        if weights.read(f"{name}.weight_shape").tolist() != list(codes_OI.shape):
            raise ValueError(f"{name}: weight_shape and weight_packed disagree")
        return codes_OI, weights.read(f"{name}.weight_scale")

    return Stored(codes, weights.read)


def _parts(shape: tuple[int, int], bits: int, group_size: int) -> list[Part]:
    outputs, inputs = shape
    return [
        Part(
            "weight_packed",
            torch.int32,
            (outputs, inputs * bits // 32),
            lambda weight: pack_words(weight.codes_OI, bits),
        ),
        Part(
            "weight_scale", torch.bfloat16, (outputs, inputs // group_size), lambda weight: weight.scales_OG
        ),
        Part("weight_shape", torch.int64, (2,), lambda weight: torch.tensor(weight.codes_OI.shape)),
    ]


def quantized_config(config: Mapping[str, Any], bits: int, group_size: int) -> dict[str, Any]:
    """The model's config with bfloat16 as its type and the compressed-tensors block."""
    weights = {
        "num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": group_size,
        "dynamic": False, "actorder": None, "block_structure": None,
    }  # fmt: skip
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
        "format": "pack-quantized",
    }
    block = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": IGNORED,
        "kv_cache_scheme": None,
    }
    return {**deployed_config(config), "quantization_config": block}
