"""Checkpoints as other people's tools leave them, written by nothing of grace's: shared by the export and runtime tests.

Shape suffixes: O output features, I input features, G groups along the input, W words (= O / 8).
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # of the columns in a word
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
Linear = dict[str, Tensor]


def decoder_linears(tensors: dict[str, Tensor]) -> list[str]:
    """The names of a checkpoint's decoder linears."""
    names = [name.removesuffix(".weight") for name in tensors]
    return sorted(name for name in names if ".layers." in name and name.rsplit(".", 1)[1] in PROJECTIONS)


def pack(values_XO: Tensor) -> Tensor:
    """Numbers of 4 bits in AWQ's words, one nibble at a time."""
    words_XW = torch.zeros(values_XO.shape[0], values_XO.shape[1] // 8, dtype=torch.int64)
    for nibble, column in enumerate(ORDER):
        words_XW |= values_XO[:, column::8].long() << (4 * nibble)
    return torch.where(words_XW >= 2**31, words_XW - 2**32, words_XW).int()


def quantized(weight_OI: Tensor, group_size: int, symmetric: bool) -> Linear:
    """Codes 0..15, zero points and fp16 scales of a weight, by its smallest and largest value per group."""
    outputs = weight_OI.shape[0]
    groups_OGS = weight_OI.float().reshape(outputs, -1, group_size)
    if symmetric:
        scales_OG = (groups_OGS.abs().amax(-1) / 7).half()
        zeros_OG = torch.full(scales_OG.shape, 8)
    else:
        low, high = groups_OGS.amin(-1).clamp(max=0), groups_OGS.amax(-1).clamp(min=0)
        scales_OG = ((high - low) / 15).half()
        zeros_OG = (-low / scales_OG.float()).round().clamp(0, 15).long()
    codes_OGS = (groups_OGS / scales_OG.float()[..., None]).round() + zeros_OG[..., None]
    codes_OI = codes_OGS.clamp(0, 15).long().reshape(outputs, -1)
    return {"codes": codes_OI, "zeros": zeros_OG, "scales": scales_OG}


def dequantized(linear: Linear) -> Tensor:
    """W [O, I] in float64."""
    size = linear["codes"].shape[1] // linear["scales"].shape[1]
    zeros, scales = (linear[name].double().repeat_interleave(size, 1) for name in ("zeros", "scales"))
    return (linear["codes"].double() - zeros) * scales


def copy_small_files(model: Path, out: Path) -> dict[str, Any]:
    """Everything but the weights; gives the config."""
    shutil.copytree(model, out, ignore=shutil.ignore_patterns("*.safetensors*", "grace_qat", "README.md"))
    return json.loads((out / "config.json").read_text())


def typed(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """A config with another type in all its places."""
    return {
        key: typed(value, dtype)
        if isinstance(value, dict)
        else dtype
        if key in ("dtype", "torch_dtype")
        else value
        for key, value in config.items()
    }


def write_awq(
    model: Path, out: Path, group_size: int = 128, symmetric: bool = False, dense: tuple[str, ...] = ()
) -> dict[str, Linear]:
    """An AWQ checkpoint of a plain model, everything else in fp16, as AutoAWQ writes it; gives its linears.

    Args:
        dense: ends of names of linears that are left as they are.
    """
    config = typed(copy_small_files(model, out), "float16")
    tensors = {name: tensor.half() for name, tensor in load_file(model / "model.safetensors").items()}
    linears = {}
    for name in decoder_linears(tensors):
        if name.endswith(dense or ("\0",)):
            continue
        linear = linears[name] = quantized(tensors.pop(f"{name}.weight"), group_size, symmetric)
        tensors[f"{name}.qweight"] = pack(linear["codes"].t())
        tensors[f"{name}.qzeros"] = pack(linear["zeros"].t())
        tensors[f"{name}.scales"] = linear["scales"].t().contiguous()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config["quantization_config"] = {
        "quant_method": "awq", "bits": 4, "group_size": group_size, "version": "gemm", "zero_point": True,
        "modules_to_not_convert": ["visual"],
    }  # fmt: skip
    (out / "config.json").write_text(json.dumps(config))
    return linears


def write_reference_awq(model: Path, out: Path, group_size: int = 128) -> dict[str, Linear]:
    """A packed checkpoint of the public GRACE code: bfloat16, no `quantization_config`."""
    linears = write_awq(model, out, group_size, symmetric=True)
    tensors = load_file(out / "model.safetensors")
    stored = {
        name: t if t.dtype == torch.int32 or name.endswith("scales") else t.bfloat16()
        for name, t in tensors.items()
    }
    save_file(stored, out / "model.safetensors", metadata={"format": "pt"})
    config = typed(json.loads((out / "config.json").read_text()), "bfloat16")
    del config["quantization_config"]
    config["awq_packing"] = {"bits": 4, "group_size": group_size, "zero_point": 8, "version": "gemm"}
    (out / "config.json").write_text(json.dumps(config))
    listed = {"bits": 4, "group_size": group_size, "modules": sorted(linears)}
    (out / "awq_quantized_modules.json").write_text(json.dumps(listed))
    return linears


def write_reference_qat(
    model: Path, out: Path, bits: int = 4, group_size: int = 128, seed: int = 0, on_grid: bool = True
) -> dict[str, Linear]:
    """A trained checkpoint of the public GRACE code; gives codes around 0 and float32 scales of its linears.

    Args:
        on_grid: whether the stored weights are scale * code in bfloat16, as that code writes them.
    """
    config = typed(copy_small_files(model, out), "bfloat16")
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(model / "model.safetensors").items()}
    generator = torch.Generator().manual_seed(seed)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    sidecar, linears = {}, {}
    for name in decoder_linears(tensors):
        weight_OI = tensors[f"{name}.weight"].float()
        groups_OGS = weight_OI.reshape(weight_OI.shape[0], -1, group_size)
        spread_OG = 0.7 + 0.5 * torch.rand(groups_OGS.shape[:2], generator=generator)
        log_scale_OG = (groups_OGS.abs().amax(-1) / high * spread_OG).log()
        scale_OG1 = log_scale_OG.exp()[..., None]
        codes_OGS = (groups_OGS / scale_OG1).round().clamp(low, high)
        if on_grid:
            weight_OI = (codes_OGS * scale_OG1).reshape(weight_OI.shape).bfloat16().float()
        sidecar[f"{name}.weight"] = tensors[f"{name}.weight"] = weight_OI.bfloat16()
        sidecar[f"{name}.log_scale"] = log_scale_OG.flatten()
        codes_OI = codes_OGS.reshape(weight_OI.shape).to(torch.int8)
        linears[name] = {
            "codes": codes_OI,
            "zeros": torch.zeros(scale_OG1.shape[:2]),
            "scales": scale_OG1[..., 0],
        }
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    torch.save(sidecar, out / "qat_quantized_weights.bin")
    (out / "config.json").write_text(json.dumps(config))
    return linears
