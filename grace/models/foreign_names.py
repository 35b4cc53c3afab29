"""What other runtimes call the modules and tensors of Qwen3-VL: tables of prefixes, for exports.

Sources: vLLM 0.33 models/qwen3_vl.py (hf_to_vllm_mapper), SGLang 0.5.23 models/qwen3_vl.py, mlx-vlm 0.7.10
models/qwen3_vl (sanitize), llama.cpp as of llama-cpp-python 0.3.36 conversion/qwen3vl.py with the tensor
names of the gguf package.
"""

import re
from collections.abc import Sequence

Prefixes = tuple[tuple[str, str], ...]

VLLM: Prefixes = (
    ("model.visual.", "visual."),
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
)
MLX: Prefixes = (
    ("model.language_model.", "language_model.model."),
    ("model.visual.", "vision_tower."),
    ("lm_head.", "language_model.lm_head."),
)
SGLANG: Prefixes = (("model.visual.", "visual."), ("model.language_model.", "model."))
# modules_to_not_convert. Both names of the tower: transformers matches anchored paths, vLLM and SGLang substrings
# (DESIGN section 6).
AWQ_NOT_CONVERTED = ["visual", "model.visual", "lm_head"]
# The text model as the gguf package's name map knows it, and the tower.
GGUF_TEXT: Prefixes = (("model.language_model.", "model."), ("lm_head.", "lm_head."))
GGUF_VISION: Prefixes = (("model.visual.", "visual."),)
_GGUF_MERGER = {"norm": "v.post_ln", "linear_fc1": "mm.0", "linear_fc2": "mm.2"}
_GGUF_DEEPSTACK = {"norm": "norm", "linear_fc1": "fc1", "linear_fc2": "fc2"}


def renamed(name: str, prefixes: Prefixes) -> str | None:
    """`name` with the first prefix that it starts with replaced; None if it starts with none of them."""
    for old, new in prefixes:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return None


def vllm_module(name: str) -> str:
    """vLLM's name of a module."""
    return (renamed(f"{name}.", VLLM) or name).removesuffix(".")


def vllm_entry(entry: str) -> str:
    """An entry of a list of modules after vLLM's mapper: only whole prefixes, dot included, are replaced."""
    return renamed(entry, VLLM) or entry


def sglang_module(name: str) -> str:
    """SGLang's name of a module; its vision attention calls the fused projection otherwise."""
    name = renamed(name, SGLANG) or name
    return re.sub(r"^(visual\..*attn)\.qkv$", r"\1.qkv_proj", name)


def mlx_name(name: str) -> str:
    """mlx-vlm's name of a module or tensor."""
    return (renamed(f"{name}.", MLX) or name).removesuffix(".")


def layer_name(name: str) -> str | None:
    """A module of the decoder from its layer's number on (`layers.3.mlp.up_proj`): the end of its name in every engine."""
    found = re.fullmatch(r"model\.language_model\.(layers\.\d+\..+)", name)
    return found.group(1) if found else None


def is_patch_convolution(name: str) -> bool:
    """Whether a tensor is the convolution that cuts pictures into patches: [out, channels, time, height, width]."""
    return name.endswith("visual.patch_embed.proj.weight")


def is_position_table(name: str) -> bool:
    """Whether a tensor is the vision tower's table of positions."""
    return name.endswith("visual.pos_embed.weight")


def gguf_merger_tensor(name: str, deepstack_layers: Sequence[int]) -> str | None:
    """llama.cpp's name of a tensor of a merger, None for any other.

    Args:
        deepstack_layers: the vision layer that each deepstack merger listens to; llama.cpp counts by layer.
    """
    found = re.fullmatch(
        r"model\.visual\.(?:merger|deepstack_merger_list\.(\d+))\.(norm|linear_fc[12])\.(weight|bias)", name
    )
    if not found:
        return None
    number, part, kind = found.groups()
    if number is None:
        return f"{_GGUF_MERGER[part]}.{kind}"
    return f"v.deepstack.{deepstack_layers[int(number)]}.{_GGUF_DEEPSTACK[part]}.{kind}"
