"""Loading an AWQ directory without the library's loader: tensors stay in the memory-mapped files, most of a second saved.

Only what is plainly complete and plainly ours is loaded here; for everything else the library's loader decides, and
says what is wrong.
"""

import contextlib
import json
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.quantizers.auto import AutoHfQuantizer

from grace.errors import UserError
from grace.models.qwen3vl import is_vision
from grace.models.rotary import make_rotary
from grace.models.stored import config_for, skeleton
from grace.runtime.int4_linear import Int4Linear

_BLOCK = 1 << 23


def load_packed(directory: Path, dtype: torch.dtype | None) -> Any:
    """The model of an AWQ directory, or None where its files are not exactly those of the model.

    Args:
        dtype: of the unpacked tensors; None takes the stored one.
    """
    files = sorted(directory.glob("*.safetensors"))
    try:
        config: Any = config_for(str(directory))
        dtype = dtype or config.dtype
        for one in (config, config.text_config, config.vision_config):
            one.dtype = dtype
        threading.Thread(target=_read_ahead, args=(files,), daemon=True).start()
        model = _empty(config, files)
        if not isinstance(dtype, torch.dtype) or not _filled(model, _tensors(files), dtype):
            return None
        if (directory / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(directory)
    except (UserError, OSError, SafetensorError, ValueError, KeyError, AttributeError, TypeError):
        return None
    model.tie_weights()
    model.config.name_or_path = str(directory)
    return model.requires_grad_(False).eval()


def _empty(config: Any, files: Sequence[Path]) -> Any:
    """The model with packed layers, on the meta device but for what no file holds."""
    quantizer: Any = AutoHfQuantizer.from_config(config.quantization_config, pre_quantized=True)
    quantizer.validate_environment()
    config._attn_implementation = "sdpa"
    model = skeleton(config)
    quantizer.preprocess_model(model, checkpoint_files=[str(file) for file in files])
    model.hf_quantizer = quantizer
    quantizer.postprocess_model(model)
    make_rotary(model)
    return model


def _tensors(files: Sequence[Path]) -> dict[str, Tensor]:
    """Views into the files."""
    found = {}
    for file in files:
        with safe_open(file, "pt") as stored:
            found |= {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - no mapping
    return found


def _filled(model: Any, tensors: dict[str, Tensor], dtype: torch.dtype) -> bool:
    """Puts the tensors into the model; False where names or shapes do not match, tied weights aside."""
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        wanted = {name: shape for name, shape in wanted.items() if name != "lm_head.weight"}
    if wanted != {name: tensor.shape for name, tensor in tensors.items()}:
        return False
    modules = dict(model.named_modules())
    for name, tensor in tensors.items():
        parent, _, last = name.rpartition(".")
        module: nn.Module = modules[parent]
        packed = isinstance(module, Int4Linear) and last != "bias"
        value = tensor if packed or not tensor.is_floating_point() else tensor.to(dtype)
        if packed and value.dtype != getattr(module, last).dtype:
            return False
        is_parameter = last in module._parameters
        setattr(module, last, nn.Parameter(value, requires_grad=False) if is_parameter else value)
    return True


def _read_ahead(files: Sequence[Path]) -> None:
    """Asks for the decoder's part of the files while the model is built: page by page it would come in small pieces.

    The vision tower waits until a picture comes.
    """
    if not hasattr(os, "posix_fadvise"):  # not on macOS
        return
    with contextlib.suppress(
        OSError, ValueError, KeyError, AttributeError
    ):  # the loader itself says what is wrong
        for file in files:
            with file.open("rb") as stream:
                for start, end in _ranges(stream):
                    for at in range(start, end, _BLOCK):
                        os.posix_fadvise(stream.fileno(), at, min(_BLOCK, end - at), os.POSIX_FADV_WILLNEED)


def _ranges(stream: BinaryIO) -> list[tuple[int, int]]:
    """Where a file holds tensors of the decoder, neighbours joined."""
    length = int.from_bytes(stream.read(8), "little")
    if length > os.fstat(stream.fileno()).st_size:
        raise ValueError("no safetensors file")
    header = json.loads(stream.read(length))
    base = 8 + length
    spans = sorted(
        tuple(about["data_offsets"])
        for name, about in header.items()
        if name != "__metadata__" and not is_vision(name)
    )
    joined: list[tuple[int, int]] = []
    for start, end in spans:
        if joined and joined[-1][1] == base + start:
            joined[-1] = (joined[-1][0], base + end)
        else:
            joined.append((base + start, base + end))
    return joined
