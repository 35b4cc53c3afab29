"""A model directory of any kind, loaded and checked."""

import json
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoModelForImageTextToText

from grace.checkpoint import is_qat
from grace.errors import UserError
from grace.runtime.direct_loading import load_packed
from grace.runtime.hf_quantizer import register

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
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        method = (config.get("quantization_config") or {}).get("quant_method")
        method = method or ("MLX" if config.get("quantization") else None)
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{directory}/config.json cannot be read ({error}): export again") from error
    if method not in (None, "awq"):
        raise UserError(
            f"{directory} is quantized with {method}: grace.runtime runs AWQ, QAT and plain directories"
        )
    return "awq" if method else "qat" if is_qat(directory) else "plain"


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
    if checkpoint_kind(directory) == "awq" and (direct := load_packed(directory, dtype)) is not None:
        return direct
    try:
        loaded = AutoModelForImageTextToText.from_pretrained(
            directory,
            dtype=dtype or "auto",
            attn_implementation="sdpa",
            local_files_only=True,
            output_loading_info=True,
        )
        model, info = cast(tuple[Any, dict[str, Any]], loaded)
    except UserError:
        raise
    except Exception as error:  # the library raises a dozen types for damaged input
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"cannot load the model in {directory} ({reason}): export it again") from error
    for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(fault):
            example = sorted(str(key) for key in info[fault])[0]
            raise UserError(
                f"{directory} is damaged ({fault.replace('_', ' ')}, e.g. {example}): export it again"
            )
    return model.eval()
