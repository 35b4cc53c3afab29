"""compressed-tensors `pack-quantized`: symmetric integers in groups, for vLLM, SGLang and transformers.

Per quantized linear: `weight_packed` int32 [O, W] (words of `grace.export.words`), `weight_scale` [O, G] in the
narrowest type that holds every scale (bfloat16 for trained ones), `weight_shape` int64 [2]. There are no zero
points, W = scale * q, except in what comes from other people's asymmetric checkpoints: `weight_zero_point`
int32 [O * bits / 32, G], words along the outputs, W = scale * (q - zero). Nothing is rounded.

Shape suffixes: O output features, I input features, G groups (= I / g), W words (= I * bits / 32).
"""

import re
from collections.abc import Mapping, Sequence
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
    dense_linears,
    deployed_config,
    deployed_dtype,
    packed_entries,
    write_directory,
)
from grace.export.name_rules import require_compressed_tensors_names
from grace.export.shards import Weights
from grace.export.words import BITS, pack_words, unpack_words

LABEL = "compressed-tensors"
# A name for those who compare names, and expressions for the engines that rename modules (name_rules.py).
IGNORED = ["lm_head", "re:.*lm_head$", "re:.*visual.*"]


def write(source: Source, directory: Path, max_shard_bytes: int | None = None) -> None:
    """Writes the directory, all but its README, one tensor at a time.

    Raises:
        UserError: a linear that the layout cannot hold, or names that an engine would take for quantized.
    """
    ignored = [*IGNORED, *(f"re:.*{re.escape(name)}$" for name in dense_linears(source))]
    require_compressed_tensors_names(source, ignored)
    entries = dense_entries(source)
    for name, shape in modules_of(source).shapes.items():
        entries += packed_entries(source, name, _parts(shape, source), LABEL)
    config = quantized_config(source, ignored)
    write_directory(source, directory, entries, config, LABEL, max_shard_bytes)


def read(directory: Path, config: Mapping[str, Any]) -> Source:
    """A compressed-tensors directory, whoever wrote it, in the terms of the base model.

    Raises:
        UserError: damaged, or another scheme than integers of 4 or 8 bits in groups.
    """
    bits, group_size, symmetric = _scheme(directory, config)
    with damage_of(directory, MEND):
        weights = Weights(directory)
        names = sorted(
            name.removesuffix(".weight_packed") for name in weights.shapes if name.endswith(".weight_packed")
        )
        if not names:
            raise ValueError("no tensor is called weight_packed")
        parts = (
            "weight_packed",
            "weight_scale",
            "weight_shape",
            *(() if symmetric else ("weight_zero_point",)),
        )
        require_group_size(group_size, {})
        shapes = {name: _shape(weights, name, bits, group_size) for name in names}
        packed = {f"{name}.{part}" for name in names for part in parts}
        dense = View(weights, {name: name for name in weights.shapes if name not in packed})

    def codes(name: str) -> Tensor:
        if weights.read(f"{name}.weight_shape").tolist() != list(shapes[name]):
            raise ValueError(f"{name}: weight_shape and weight_packed disagree")
        return unpack_words(weights.read(f"{name}.weight_packed"), bits)

    def grid(name: str) -> tuple[Tensor, Tensor | None]:
        scales_OG = weights.read(f"{name}.weight_scale")
        if symmetric:
            return scales_OG, None
        return scales_OG, unpack_words(
            weights.read(f"{name}.weight_zero_point").t().contiguous(), bits
        ).t().contiguous()

    modules = Modules(directory, shapes, bits, group_size, codes, grid)
    state = QatState(bits, group_size, modules, {})
    return Source(directory, state, without_packing(config), dense, LABEL)


def _scheme(directory: Path, config: Mapping[str, Any]) -> tuple[int, int, bool]:
    """Bits, group size and symmetry of the one scheme that a config's block must have.

    Raises:
        UserError: another scheme.
    """
    block = config.get("quantization_config")
    with damage_of(directory, MEND):
        (group,) = block["config_groups"].values()  # type: ignore[index]
        weights, form = group["weights"], group.get("format") or block["format"]  # type: ignore[index]
        active = group.get("input_activations")
        wanted = {"type": "int", "strategy": "group", "actorder": None}
        other = {
            key: weights.get(key, value) for key, value in wanted.items() if weights.get(key, value) != value
        }
        bits, group_size, symmetric = weights["num_bits"], weights["group_size"], bool(weights["symmetric"])
    if form != "pack-quantized" or active is not None or other or type(bits) is not int or bits not in BITS:
        named = other or {"format": form, "num_bits": bits, "input_activations": active and "quantized"}
        raise UserError(
            f"{directory} holds another compressed-tensors scheme ({shown(named)}): GRACE reads pack-quantized "
            "integers of 4 or 8 bits in groups, in the order of the inputs"
        )
    return bits, group_size, symmetric


def _shape(weights: Weights, name: str, bits: int, group_size: int) -> tuple[int, int]:
    """[out, in] of one linear, its tensors compared.

    Raises:
        ValueError: they do not fit each other.
    """
    packed, dtype = weights.shapes[f"{name}.weight_packed"], weights.dtypes[f"{name}.weight_packed"]
    if len(packed) != 2 or dtype != torch.int32:
        raise ValueError(f"{name}: weight_packed is {dtype} {packed}")
    shape = (packed[0], packed[1] * 32 // bits)
    require_group_size(group_size, {name: shape})
    if weights.shapes[f"{name}.weight_scale"] != (shape[0], shape[1] // group_size):
        raise ValueError(f"{name}: weight_packed and weight_scale do not fit")
    if weights.shapes[f"{name}.weight_shape"] != (2,):
        raise ValueError(f"{name}: weight_shape is no shape")
    return shape


def _parts(shape: tuple[int, int], source: Source) -> list[Part]:
    outputs, inputs = shape
    bits, groups = source.qat.bits, inputs // source.qat.group_size
    parts = [
        Part(
            "weight_packed",
            torch.int32,
            (outputs, inputs * bits // 32),
            lambda weight: pack_words(weight.codes_OI, bits),
        ),
        Part("weight_scale", source.scale_dtype, (outputs, groups), lambda weight: weight.scales_OG, True),
        Part("weight_shape", torch.int64, (2,), lambda weight: torch.tensor(shape), True),
    ]
    if not source.symmetric:
        zeros = (outputs * bits // 32, groups)
        parts.append(
            Part("weight_zero_point", torch.int32, zeros, lambda weight: _packed_zeros(weight, bits), True)
        )
    return parts


def _packed_zeros(weight: QuantizedWeight, bits: int) -> Tensor:
    """int32 [O * bits / 32, G]: words along the outputs."""
    assert weight.zeros_OG is not None
    return pack_words(weight.zeros_OG.t().contiguous(), bits).t()


def quantized_config(source: Source, ignored: Sequence[str]) -> dict[str, Any]:
    """The model's config with its deployed type and the compressed-tensors block."""
    weights = {
        "num_bits": source.qat.bits, "type": "int", "symmetric": source.symmetric, "strategy": "group",
        "group_size": source.qat.group_size, "dynamic": False, "actorder": None, "block_structure": None,
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
        "ignore": list(ignored),
        "kv_cache_scheme": None,
    }
    return {**deployed_config(source.config, deployed_dtype(source)), "quantization_config": block}
