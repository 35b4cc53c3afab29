"""What other runtimes call the modules and tensors of Qwen3-VL: tables of prefixes, for exports.

Sources: vLLM 0.33 models/qwen3_vl.py (hf_to_vllm_mapper), SGLang 0.5.23 models/qwen3_vl.py, mlx-vlm 0.7.10
models/qwen3_vl (sanitize), llama.cpp as of llama-cpp-python 0.3.36 conversion/qwen3vl.py with the tensor
names of the gguf package.
"""

import re

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
# The text model as the gguf package's name map knows it, and the tower.
GGUF_TEXT: Prefixes = (("model.language_model.", "model."), ("lm_head.", "lm_head."))
GGUF_VISION: Prefixes = (("model.visual.", "visual."),)


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


def is_patch_convolution(name: str) -> bool:
    """Whether a tensor is the convolution that cuts pictures into patches: [out, channels, time, height, width]."""
    return name.endswith("visual.patch_embed.proj.weight")
