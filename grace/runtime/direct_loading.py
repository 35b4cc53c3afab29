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
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.quantizers.auto import AutoHfQuantizer

from grace.errors import UserError
from grace.models.qwen3vl import is_vision
from grace.models.rotary import make_rotary
from grace.models.stored import config_for, skeleton
from grace.runtime.int4_linear import Int4Linear

_BLOCK = 1 << 25  # bytes read at a time: many small reads would wait for the thread that builds the model
_DTYPES = {
    "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64, "I32": torch.int32,
    "I64": torch.int64, "I8": torch.int8, "U8": torch.uint8,
}  # fmt: skip


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
        reader = threading.Thread(target=_read_ahead, args=(files,), daemon=True)
        reader.start()
        model = _empty(config, files)
        if not isinstance(dtype, torch.dtype) or not _filled(model, _tensors(files), dtype):
            return None
        reader.join()  # page by page the rest would come in small pieces
        if (directory / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(directory)
    except (UserError, OSError, RuntimeError, ValueError, KeyError, AttributeError, TypeError):
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
    """Views into the mapped files. Not safetensors' own, which read every tensor that is asked for, the vision tower's too."""
    found = {}
    for file in files:
        header, base = _header(file)
        mapped = torch.from_file(str(file), shared=False, size=file.stat().st_size, dtype=torch.uint8)
        for name, about in header.items():
            start, end = about["data_offsets"]
            found[name] = mapped[base + start : base + end].view(_DTYPES[about["dtype"]]).view(about["shape"])
    return found


def _header(file: Path) -> tuple[dict[str, Any], int]:
    """What a safetensors file says of each tensor, and where their bytes begin."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > os.fstat(stream.fileno()).st_size:
            raise ValueError("no safetensors file")
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    return header, 8 + length


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
    """Brings the decoder's part of the files into the page cache while the model is built, in one go from front to back.

    What is there already is not read again. The vision tower waits until a picture comes.
    """
    scratch = memoryview(bytearray(_BLOCK))
    with contextlib.suppress(
        OSError, ValueError, KeyError, AttributeError, TypeError
    ):  # the loader itself says what is wrong
        for file in files:
            with file.open("rb") as stream:
                for start, end in _ranges(file):
                    for at in range(start, end, _BLOCK):
                        if not _is_cached(stream.fileno(), (at + min(at + _BLOCK, end)) // 2):
                            os.preadv(stream.fileno(), [scratch[: min(_BLOCK, end - at)]], at)


def _is_cached(descriptor: int, at: int) -> bool:
    """Whether a byte of a file is in memory; False where the system does not say."""
    if not hasattr(os, "RWF_NOWAIT"):  # Linux has it
        return False
    try:
        return os.preadv(descriptor, [bytearray(1)], at, os.RWF_NOWAIT) == 1
    except OSError:  # it would have to wait, or the file system cannot tell
        return False


def _ranges(file: Path) -> list[tuple[int, int]]:
    """Where a file holds tensors of the decoder, neighbours joined."""
    header, base = _header(file)
    spans = sorted(tuple(about["data_offsets"]) for name, about in header.items() if not is_vision(name))
    joined: list[tuple[int, int]] = []
    for start, end in spans:
        if joined and joined[-1][1] == base + start:
            joined[-1] = (joined[-1][0], base + end)
        else:
            joined.append((base + start, base + end))
    return joined
