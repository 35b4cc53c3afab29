"""llama.cpp's names of Qwen3-VL's tensors, by the gguf package's own tables."""

from functools import cache
from typing import Any

import gguf
from transformers import PreTrainedConfig

from grace.errors import UserError
from grace.export.gguf_metadata import ARCHITECTURE
from grace.models import foreign_names

_SUFFIXES = (".weight", ".bias")


def text_name(name: str, config: PreTrainedConfig) -> str:
    """llama.cpp's name of a tensor of the language model."""
    text: Any = config.text_config
    return _mapped(name, foreign_names.GGUF_TEXT, _name_map(ARCHITECTURE, text.num_hidden_layers))


def vision_name(name: str, config: PreTrainedConfig) -> str:
    """llama.cpp's name of a tensor of the vision tower, the patch convolution's weight excepted."""
    vision: Any = config.vision_config
    merger = foreign_names.gguf_merger_tensor(name, vision.deepstack_visual_indexes)
    names = _name_map(gguf.MODEL_ARCH.MMPROJ, vision.depth)
    return merger or _mapped(name, foreign_names.GGUF_VISION, names)


@cache
def _name_map(architecture: gguf.MODEL_ARCH, layers: int) -> gguf.TensorNameMap:
    """The package builds it anew at every call, with the names of every model there is."""
    return gguf.get_tensor_name_map(architecture, layers)


def _mapped(name: str, prefixes: foreign_names.Prefixes, names: gguf.TensorNameMap) -> str:
    found = names.get_name(foreign_names.renamed(name, prefixes) or name, try_suffixes=_SUFFIXES)
    if found is None:
        raise UserError(f"GGUF cannot be written: llama.cpp has no tensor for {name}; use --format qat")
    return found


def dense_name(name: str, config: PreTrainedConfig) -> str:
    """llama.cpp's name of a tensor of either file, the patch convolution's weight excepted."""
    is_text = foreign_names.renamed(name, foreign_names.GGUF_TEXT) is not None
    return text_name(name, config) if is_text else vision_name(name, config)


def patch_names() -> tuple[str, str]:
    """The patch convolution's weight is two tensors, one per moment."""
    stem = gguf.TENSOR_NAMES[gguf.MODEL_TENSOR.V_ENC_EMBD_PATCH]
    return f"{stem}.weight", f"{stem}.weight.1"
