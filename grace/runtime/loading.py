"""Model directories: what kind each is, and the model in it with every tensor accounted for."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoModelForImageTextToText

from grace.checked_files import MEND, DamagedFile, damage_of, read_json, reason_of, shown
from grace.checkpoint import is_qat
from grace.errors import UserError
from grace.models.config_check import require_possible
from grace.models.stored import config_for, require_loadable
from grace.runtime.direct_loading import load_packed
from grace.runtime.hf_quantizer import MODULES_FILE, register

register()


def checkpoint_kind(directory: Path) -> str:
    """`awq`, `qat` or `plain`.

    Raises:
        UserError: no model there, or one quantized by another method.
    """
    if not directory.is_dir():
        raise UserError(f"{directory} is not a directory: give an exported model or a run's model/")
    if any(directory.glob("*.gguf")):
        raise UserError(f"{directory} holds GGUF files: run them with llama.cpp, or export to AWQ for GRACE")
    if not (directory / "config.json").is_file():
        hint = "give its model/" if (directory / "model").is_dir() else "give an exported model"
        raise UserError(f"{directory} holds no model (no config.json): {hint}")
    try:
        config = read_json(directory / "config.json")
    except (OSError, DamagedFile) as error:
        raise UserError(f"{directory}/config.json cannot be read ({error}): export again") from error
    require_possible(config, directory)
    block, method = config.get("quantization_config"), None
    if config.get("quantization"):
        method = "MLX"
    elif block:
        method = block.get("quant_method") if isinstance(block, dict) else None
        method = method or "an unknown method"
    elif is_packed(config, directory):
        method = "awq"
    if method not in (None, "awq"):
        raise UserError(
            f"{directory} is quantized with {shown(method).strip(chr(39))}: grace.runtime runs AWQ, QAT and plain directories"
        )
    return "awq" if method else "qat" if is_qat(directory) else "plain"


def is_packed(config: Mapping[str, Any], directory: Path) -> bool:
    """Whether this is a packed checkpoint of the public GRACE code: AWQ that stock loaders take for none."""
    return not config.get("quantization_config") and (
        "awq_packing" in config or (directory / MODULES_FILE).exists()
    )


def require_tokenizer(directory: Path) -> None:
    """Raises `UserError` where a directory lacks its vocabulary: the library would make up an empty one."""
    if not (directory / "tokenizer.json").is_file() and not (directory / "vocab.json").is_file():
        raise UserError(
            f"{directory} has no tokenizer.json, its processor cannot work: restore it or export again"
        )


def load_model(directory: Path, dtype: torch.dtype | None = None) -> Any:
    """The model of a directory in evaluation mode, every tensor of it accounted for.

    Raises:
        UserError: it cannot be read, or tensors are missing, superfluous or of the wrong shape.
    """
    require_loadable(directory)
    config = config_for(str(directory))
    if is_packed(config.to_dict(), directory):
        config.quantization_config = packed_block(config.to_dict(), directory)
    elif checkpoint_kind(directory) == "awq" and (direct := load_packed(directory, dtype)) is not None:
        _require_ends(direct, directory)
        return direct
    try:
        loaded = AutoModelForImageTextToText.from_pretrained(
            directory,
            config=config,
            dtype=dtype or "auto",
            attn_implementation="sdpa",
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
        model, info = cast(tuple[Any, dict[str, Any]], loaded)
    except UserError:
        raise
    except Exception as error:  # the library raises a dozen types for damaged input
        raise UserError(
            f"cannot load the model in {directory} ({reason_of(error)}): export it again"
        ) from error
    for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(fault):
            example = sorted(str(key) for key in info[fault])[0]
            raise UserError(
                f"{directory} is damaged ({fault.replace('_', ' ')}, e.g. {example}): export it again"
            )
    _require_ends(model, directory)
    return model.eval()


def _require_ends(model: Any, directory: Path) -> None:
    """Raises `UserError` if generation could not stop at the tokens that are said to end it."""
    stored = model.generation_config.eos_token_id
    ends = stored if isinstance(stored, list) else [] if stored is None else [stored]
    if not all(type(end) is int and 0 <= end < model.config.text_config.vocab_size for end in ends):
        raise UserError(
            f"{directory}/generation_config.json is damaged (eos_token_id is {shown(stored)}): restore it"
        )


def packed_block(config: Mapping[str, Any], directory: Path) -> dict[str, Any]:
    """The standard AWQ block of a directory that says the same in its own way.

    Raises:
        UserError: it says nothing that can be read.
    """
    packing = config.get("awq_packing")
    if packing is None:
        with damage_of(directory, MEND):
            packing = read_json(directory / MODULES_FILE)
    if not isinstance(packing, Mapping):
        raise UserError(f"{directory}/config.json is damaged (awq_packing is no table): restore it")
    return {
        "quant_method": "awq",
        "bits": packing.get("bits"),
        "group_size": packing.get("group_size"),
        "version": str(packing.get("version", "gemm")),
        "zero_point": True,
    }
