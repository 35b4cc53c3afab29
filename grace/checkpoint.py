"""The model that a run ends with.

A plain Hugging Face directory; a quantized run adds the folder `grace_qat/` with integer codes, scales and fp32
latents (DESIGN section 6). It is written under a temporary name and renamed: a kill leaves what was there before.
What a killed run goes on from is `grace.resume_checkpoint`'s.

Shape suffixes: O output features, I input features, G groups along the input.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from grace.checked_files import TOKENIZER_LIMIT, read_json, safetensors_header
from grace.errors import UserError
from grace.files import new_directory, sha256_of

QAT_FOLDER = "grace_qat"
QAT_TENSORS = "state.safetensors"  # inside QAT_FOLDER
FORMAT_VERSION = 1
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, SafetensorError)

# Files of a Hugging Face directory that travel unchanged from the base model to every output.
VERBATIM_FILES = (
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


@dataclass(frozen=True)
class QuantizedWeight:
    """One quantized linear: what is deployed (codes, scales) and what is trained (latent, theta).

    W = scales * codes; with zero points, which only other people's checkpoints have, scales * (codes - zeros).
    """

    codes_OI: Tensor  # int8
    scales_OG: Tensor  # bfloat16; from other people's files float16 or float32 too
    latent_OI: Tensor | None = None  # float32
    theta_OG: Tensor | None = None  # float32, log of the unsnapped scale
    zeros_OG: Tensor | None = None  # int8, in the range of the codes


@dataclass(frozen=True)
class QatState:
    """The contents of `grace_qat/`."""

    bits: int
    group_size: int
    modules: Mapping[str, QuantizedWeight]
    info: dict[str, Any]


def save_model(
    out: Path,
    state: Mapping[str, Tensor],
    config: Any,
    base_dir: Path,
    qat: QatState | None = None,
) -> None:
    """Writes a Hugging Face model directory, with `grace_qat/` when `qat` is given.

    Args:
        state: the tensors under their Hugging Face names; quantized weights as W_hat.
        config: the model's `PretrainedConfig`, its dtype already set to that of `state`.
        base_dir: where tokenizer, processor and generation files are copied from, byte for byte.
    """
    with new_directory(out, flag="run.output_dir") as scratch:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
        save_file(tensors, scratch / "model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(scratch)
        copy_verbatim_files(base_dir, scratch)
        if qat is not None:
            _write_qat(scratch / QAT_FOLDER, qat)


def copy_verbatim_files(source: Path, target: Path) -> None:
    """Copies the tokenizer, processor, template and generation files that `source` has."""
    for name in VERBATIM_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _write_qat(folder: Path, qat: QatState) -> None:
    folder.mkdir()
    tensors: dict[str, Tensor] = {}
    for name, weight in qat.modules.items():
        tensors[f"{name}.codes"] = weight.codes_OI.contiguous()
        tensors[f"{name}.scales"] = weight.scales_OG.contiguous()
        if weight.latent_OI is not None and weight.theta_OG is not None:
            tensors[f"{name}.latent"] = weight.latent_OI.detach().cpu().contiguous()
            tensors[f"{name}.theta"] = weight.theta_OG.detach().cpu().contiguous()
    save_file(tensors, folder / QAT_TENSORS)
    write_qat_info(folder, qat)


def write_qat_info(folder: Path, qat: QatState) -> None:
    """Writes `info.json` beside the tensors of `grace_qat/`, which are there already."""
    info = {
        **qat.info,
        "format_version": FORMAT_VERSION,
        "bits": qat.bits,
        "group_size": qat.group_size,
        "modules": sorted(qat.modules),
        "state_sha256": sha256_of(folder / QAT_TENSORS),
    }
    (folder / "info.json").write_text(json.dumps(info, indent=1))


def is_qat(directory: Path) -> bool:
    """Whether a model directory carries quantized training state."""
    return (directory / QAT_FOLDER).is_dir()


def read_qat(directory: Path, latents: bool = False) -> QatState:
    """Reads `grace_qat/` back, checked against its checksum and its own shapes.

    Args:
        latents: also read the fp32 latents and theta, for further training.

    Raises:
        UserError: missing, damaged or inconsistent state.
    """
    folder = directory / QAT_FOLDER
    info = read_qat_info(directory)
    bits, group_size = info["bits"], info["group_size"]
    try:
        safetensors_header(folder / QAT_TENSORS)
        with safe_open(folder / QAT_TENSORS, framework="pt") as file:
            modules = {
                name: read_weight(file.get_tensor, name, bits, group_size, latents)
                for name in info["modules"]
            }
    except _UNREADABLE as error:
        raise _damaged(folder, error) from error
    return QatState(bits, group_size, modules, info)


def read_qat_info(directory: Path) -> dict[str, Any]:
    """The contents of `grace_qat/info.json`, after the tensor file has been checked against its checksum.

    Raises:
        UserError: missing or damaged state.
    """
    folder = directory / QAT_FOLDER
    try:
        info = read_json(folder / "info.json", TOKENIZER_LIMIT, finite=False)
        info["bits"], info["group_size"] = int(info["bits"]), int(info["group_size"])
        if not isinstance(info["modules"], list) or info["group_size"] < 1 or not 2 <= info["bits"] <= 8:
            raise ValueError("info.json holds impossible values")
        if not all(isinstance(name, str) for name in info["modules"]):
            raise ValueError("info.json lists modules that are no names")
        if sha256_of(folder / QAT_TENSORS) != info["state_sha256"]:
            raise ValueError(f"{QAT_TENSORS} does not match its checksum")
    except _UNREADABLE as error:
        raise _damaged(folder, error) from error
    return info


def _damaged(folder: Path, error: Exception) -> UserError:
    return UserError(f"{folder} is missing or damaged ({error}): export again or retrain")


def read_weight(
    tensor: Callable[[str], Tensor], name: str, bits: int, group_size: int, latents: bool = False
) -> QuantizedWeight:
    """One quantized linear out of `grace_qat/`, checked.

    Args:
        tensor: gives the tensor of a name.

    Raises:
        ValueError: types, shapes or values that training cannot have written.
    """
    codes, scales = tensor(f"{name}.codes"), tensor(f"{name}.scales")
    if codes.dtype != torch.int8 or scales.dtype != torch.bfloat16:
        raise ValueError(f"{name}: codes must be int8 and scales bfloat16")
    if codes.ndim != 2 or scales.ndim != 2 or codes.shape != (scales.shape[0], scales.shape[1] * group_size):
        raise ValueError(f"{name}: codes {tuple(codes.shape)} and scales {tuple(scales.shape)} do not fit")
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    if codes.numel() and (codes.min() < low or codes.max() > high):
        raise ValueError(f"{name}: codes outside [{low}, {high}]")
    if not bool(torch.isfinite(scales).all()) or bool((scales <= 0).any()):
        raise ValueError(f"{name}: scales must be finite and positive")
    if not latents:
        return QuantizedWeight(codes, scales)
    latent, theta = tensor(f"{name}.latent"), tensor(f"{name}.theta")
    if (latent.shape, theta.shape) != (codes.shape, scales.shape):
        raise ValueError(f"{name}: latent {tuple(latent.shape)} and theta {tuple(theta.shape)} do not fit")
    return QuantizedWeight(codes, scales, latent, theta)
