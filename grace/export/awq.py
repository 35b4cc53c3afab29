"""The AWQ "gemm" format: integer codes and scales in, the three stored tensors out, and back; the directory.

Both directions are exact. A bfloat16 scale in [2^-14, 2^15] has the same value in fp16, so nothing is
rounded (DESIGN section 4, "Why snap"); a scale that would be is refused.

    W[o, i] = scales[i // g, o] * (q[i, o] - 8),   q = code + 8

Directories by others are read too: any zero points instead of 8, a list of their own of what is not
converted, and the packed checkpoints of the public GRACE code, whose config says `awq_packing`.

Shape suffixes: O output features, I input features, G groups (= I / g), W words (= O / 8).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grace.checked_files import MEND, damage_of, read_json, shown
from grace.checkpoint import QatState
from grace.errors import UserError
from grace.export.contents import (
    NARROW,
    Modules,
    Source,
    View,
    modules_of,
    require_group_size,
    without_packing,
)
from grace.export.directory import (
    Part,
    dense_entries,
    dense_linears,
    deployed_config,
    deployed_dtype,
    packed_entries,
    write_directory,
    write_json,
)
from grace.export.name_rules import require_awq_names
from grace.export.shards import Weights
from grace.kernels.awq_layout import PER_WORD, ZERO_WORD, pack_transposed, unpack_transposed
from grace.models.foreign_names import AWQ_NOT_CONVERTED

AWQ_MODULES = "awq_quantized_modules.json"
PARTS = ("qweight", "qzeros", "scales")
LABEL = "AWQ"
BITS = 4
ZERO_POINT = 8


def pack(codes_OI: Tensor, scales_OG: Tensor, group_size: int = 128) -> dict[str, Tensor]:
    """Packs one linear.

    Args:
        codes_OI: int8 in [-8, 7].
        scales_OG: bfloat16, each exact in fp16.
        group_size: inputs per scale.

    Returns:
        `qweight` int32 [I, O / 8], `qzeros` int32 [I / g, O / 8] (all 8), `scales` fp16 [I / g, O].

    Raises:
        ValueError: types, shapes or values that the format cannot hold exactly.
    """
    check_shapes(codes_OI, scales_OG, group_size)
    return {
        "qweight": pack_codes(codes_OI),
        "qzeros": zero_words(scales_OG),
        "scales": pack_scales(scales_OG),
    }


def pack_codes(codes_OI: Tensor) -> Tensor:
    """The `qweight` of `pack` alone.

    Raises:
        ValueError: a code outside [-8, 7].
    """
    if codes_OI.numel():
        low, high = (int(value) for value in codes_OI.aminmax())
        if low < -ZERO_POINT or high >= ZERO_POINT:
            raise ValueError(f"codes span [{low}, {high}]: AWQ holds 4 bits only, [-8, 7]")
    # Offset binary: adding 8 modulo 256 turns -8..7 into 0..15.
    return pack_transposed(codes_OI.view(torch.uint8) + ZERO_POINT)


def pack_scales(scales_OG: Tensor) -> Tensor:
    """The `scales` of `pack` alone.

    Raises:
        ValueError: a scale that is not finite, or that fp16 cannot hold exactly.
    """
    scales_GO = scales_OG.t().to(torch.float16).contiguous()
    if not bool(scales_GO.isfinite().all()) or not torch.equal(scales_GO.float(), scales_OG.t().float()):
        raise ValueError("scales must be finite and exact in fp16: bfloat16 values within [2^-14, 2^15]")
    return scales_GO


def zero_words(scales_OG: Tensor, zeros_OG: Tensor | None = None) -> Tensor:
    """The `qzeros` of `pack` alone: zero point 8 everywhere, or those of an asymmetric weight."""
    if zeros_OG is not None:
        return pack_transposed(zeros_OG.view(torch.uint8) + ZERO_POINT)
    out_features, groups = scales_OG.shape
    shape = (groups, out_features // PER_WORD)
    return torch.full(shape, ZERO_WORD, dtype=torch.int32, device=scales_OG.device)


def unpack(
    qweight: Tensor | Mapping[str, Tensor],
    qzeros: Tensor | None = None,
    scales: Tensor | None = None,
    group_size: int = 128,
) -> tuple[Tensor, Tensor]:
    """Inverse of `pack`.

    Args:
        qweight: int32 [I, O / 8], or the whole dict that `pack` returns.
        qzeros: int32 [I / g, O / 8].
        scales: fp16 [I / g, O].
        group_size: inputs per scale.

    Returns:
        codes int8 [O, I] and scales bfloat16 [O, I / g].

    Raises:
        ValueError: shapes that do not fit, zero points other than 8, or scales that bfloat16 cannot hold:
            such tensors were not written from symmetric codes.
    """
    if isinstance(qweight, Mapping):
        qweight, qzeros, scales = (qweight[name] for name in ("qweight", "qzeros", "scales"))
    if qzeros is None or scales is None:
        raise ValueError("unpack needs qweight, qzeros and scales")
    _check_packed(qweight, qzeros, scales, group_size)
    if not bool((qzeros == ZERO_WORD).all()):
        raise ValueError(
            "zero points are not all 8: these weights are asymmetric and have no symmetric codes"
        )
    scales_OG = scales.t().to(torch.bfloat16).contiguous()
    if not torch.equal(scales_OG.float(), scales.t().float()):
        raise ValueError("scales are not exact in bfloat16: these weights were not exported by GRACE")
    codes_OI = (unpack_transposed(qweight) - ZERO_POINT).view(torch.int8)
    return codes_OI, scales_OG


def check_shapes(codes_OI: Tensor, scales_OG: Tensor, group_size: int) -> None:
    """Raises `ValueError` unless codes [O, I] and scales [O, I / g] fit each other and the format."""
    if codes_OI.dtype != torch.int8 or codes_OI.ndim != 2:
        raise ValueError(f"codes must be int8 [out, in], not {codes_OI.dtype} {tuple(codes_OI.shape)}")
    out_features, in_features = codes_OI.shape
    if group_size < 1 or in_features % group_size:
        raise ValueError(f"in_features {in_features} is not divisible by the group size {group_size}")
    if out_features % PER_WORD:
        raise ValueError(f"out_features {out_features} is not divisible by {PER_WORD}, the codes in one word")
    expected = (out_features, in_features // group_size)
    if scales_OG.dtype not in NARROW or tuple(scales_OG.shape) != expected:
        raise ValueError(
            f"scales must be bfloat16 or fp16 {expected}, not {scales_OG.dtype} {tuple(scales_OG.shape)}"
        )


def _check_packed(qweight_IW: Tensor, qzeros_GW: Tensor, scales_GO: Tensor, group_size: int) -> None:
    if qweight_IW.dtype != torch.int32 or qweight_IW.ndim != 2:
        raise ValueError(
            f"qweight must be int32 [in, out / 8], not {qweight_IW.dtype} {tuple(qweight_IW.shape)}"
        )
    in_features, words = qweight_IW.shape
    if group_size < 1 or in_features % group_size:
        raise ValueError(f"in_features {in_features} is not divisible by the group size {group_size}")
    groups = in_features // group_size
    if qzeros_GW.dtype != torch.int32 or tuple(qzeros_GW.shape) != (groups, words):
        raise ValueError(
            f"qzeros must be int32 {(groups, words)}, not {qzeros_GW.dtype} {tuple(qzeros_GW.shape)}"
        )
    if scales_GO.dtype != torch.float16 or tuple(scales_GO.shape) != (groups, words * PER_WORD):
        raise ValueError(
            f"scales must be fp16 {(groups, words * PER_WORD)}, "
            f"not {scales_GO.dtype} {tuple(scales_GO.shape)}"
        )


# ---------------------------------------------------------------- the directory


def write(source: Source, directory: Path, max_shard_bytes: int | None = None) -> None:
    """Writes the deployment directory of DESIGN section 6, all but its README, one tensor at a time.

    Raises:
        UserError: a linear that the layout cannot hold, or names that an engine would take for quantized.
    """
    listed = [*AWQ_NOT_CONVERTED, *dense_linears(source)]
    config = awq_config(source.config, source.qat.group_size, deployed_dtype(source), listed)
    require_awq_names(source, listed)
    entries = dense_entries(source)
    for name, shape in modules_of(source).shapes.items():
        entries += packed_entries(source, name, _parts(shape, source.qat.group_size), LABEL)
    write_directory(source, directory, entries, config, "awq", max_shard_bytes)
    modules = {"bits": BITS, "group_size": source.qat.group_size, "modules": sorted(source.qat.modules)}
    write_json(directory / AWQ_MODULES, modules)


def read(directory: Path, config: Mapping[str, Any]) -> Source:
    """An AWQ directory, whoever wrote it, in the terms of the base model.

    Raises:
        UserError: damaged, or another variant than 4 bits in "gemm" order.
    """
    with damage_of(directory, MEND):
        weights = Weights(directory)
        names = sorted(name.removesuffix(".qweight") for name in weights.shapes if name.endswith(".qweight"))
        if not names:
            raise ValueError("no tensor is called qweight")
        group_size = _require_variant(directory, config, names)
        shapes = {name: _shape(weights, name, group_size) for name in names}
        packed = {f"{name}.{part}" for name in names for part in PARTS}
        dense = View(weights, {name: name for name in weights.shapes if name not in packed})

    def codes(name: str) -> Tensor:
        return (unpack_transposed(weights.read(f"{name}.qweight")) - ZERO_POINT).view(torch.int8)

    def grid(name: str) -> tuple[Tensor, Tensor | None]:
        qzeros_GW, scales_OG = weights.read(f"{name}.qzeros"), weights.read(f"{name}.scales").t().contiguous()
        if bool((qzeros_GW == ZERO_WORD).all()):
            return scales_OG, None
        return scales_OG, (unpack_transposed(qzeros_GW) - ZERO_POINT).view(torch.int8)

    modules = Modules(directory, shapes, BITS, group_size, codes, grid)
    state = QatState(BITS, group_size, modules, {})
    return Source(directory, state, without_packing(config), dense, "awq")


def _require_variant(directory: Path, config: Mapping[str, Any], names: list[str]) -> int:
    """The group size of a directory that says it is what `read` can read, in either of the two ways.

    Raises:
        UserError: it is another variant.
        ValueError: it contradicts itself.
    """
    block = config.get("quantization_config") or config.get("awq_packing") or {}
    listed = read_json(directory / AWQ_MODULES) if (directory / AWQ_MODULES).exists() else {}
    about = {**listed, **block} if isinstance(block, Mapping) else {}
    bits, order = (
        about.get("bits", about.get("w_bit")),
        str(about.get("version") or about.get("format") or "gemm").lower(),
    )
    if type(bits) is not int or bits != BITS or order != "gemm":
        raise UserError(
            f"{directory} is AWQ with {shown(bits)} bits and version {shown(order)}: GRACE reads 4 bits, version gemm"
        )
    group_size = about.get("group_size", about.get("q_group_size"))
    if listed and (listed.get("bits"), listed.get("group_size")) != (bits, group_size):
        raise ValueError(f"{AWQ_MODULES} and config.json disagree")
    if listed and listed.get("modules") != names and sorted(map(str, listed.get("modules", ()))) != names:
        raise ValueError(f"{AWQ_MODULES} lists other modules than the weights hold")
    return require_group_size(group_size, {})


def _shape(weights: Weights, name: str, group_size: int) -> tuple[int, int]:
    """[out, in] of one linear, its three tensors compared.

    Raises:
        ValueError: they do not fit each other.
    """
    qweight, qzeros, scales = (weights.shapes[f"{name}.{part}"] for part in PARTS)
    types = [weights.dtypes[f"{name}.{part}"] for part in PARTS]
    if len(qweight) != 2 or types[:2] != [torch.int32] * 2 or not types[2].is_floating_point:
        raise ValueError(f"{name}: qweight {qweight} of types {types}")
    inputs, outputs = qweight[0], qweight[1] * PER_WORD
    require_group_size(group_size, {name: (outputs, inputs)})
    groups = inputs // group_size
    if qzeros != (groups, qweight[1]) or scales != (groups, outputs):
        raise ValueError(f"{name}: qweight {qweight}, qzeros {qzeros} and scales {scales} do not fit")
    return outputs, inputs


def _parts(shape: tuple[int, int], group_size: int) -> list[Part]:
    out_features, in_features = shape
    groups, words = in_features // group_size, out_features // PER_WORD

    def checked(weight: Any) -> Any:
        check_shapes(weight.codes_OI, weight.scales_OG, group_size)
        return weight

    return [
        Part("qweight", torch.int32, (in_features, words), lambda w: pack_codes(checked(w).codes_OI)),
        Part("qzeros", torch.int32, (groups, words), lambda w: zero_words(w.scales_OG, w.zeros_OG), True),
        Part("scales", torch.float16, (groups, out_features), lambda w: pack_scales(w.scales_OG), True),
    ]


def awq_config(
    config: Mapping[str, Any], group_size: int, dtype: str, not_converted: list[str]
) -> dict[str, Any]:
    """The model's config with `dtype` as its type and the standard AWQ block."""
    block = {
        "quant_method": "awq",
        "bits": BITS,
        "group_size": group_size,
        "version": "gemm",
        "zero_point": True,
        "modules_to_not_convert": not_converted,
    }
    return {**deployed_config(config, dtype), "quantization_config": block}
