"""What a GGUF file of Qwen3-VL says about itself: architecture, tokenizer, vision tower.

The keys are those that llama.cpp's converter writes (conversion/base.py, qwen.py, qwen3vl.py), set through
the gguf package's writer.
"""

import json
import math
from pathlib import Path
from typing import Any

import gguf
from transformers import PreTrainedConfig

from grace.errors import UserError

ARCHITECTURE = gguf.MODEL_ARCH.QWEN3VL
VISION_NORM_EPS = 1e-6  # fixed in the model's code
# The split that llama.cpp calls "qwen2", as tokenizer.json writes it.
_QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def require_supported(config: PreTrainedConfig) -> None:
    """Raises `UserError` naming what llama.cpp's Qwen3-VL does not compute, or computes otherwise."""
    text: Any = config.text_config
    vision: Any = config.vision_config
    rope, side = text.rope_parameters, math.isqrt(vision.num_position_embeddings)
    faults = {
        "a rope type other than default": rope.get("rope_type", "default") != "default",
        "rotary sections that are not interleaved": not rope.get("mrope_interleaved", True),
        "attention biases": bool(text.attention_bias),
        f"the activation {text.hidden_act}": text.hidden_act != "silu",
        f"the vision activation {vision.hidden_act}": vision.hidden_act != "gelu_pytorch_tanh",
        "a temporal patch other than 2": vision.temporal_patch_size != 2,
        "a spatial merge other than 2": vision.spatial_merge_size != 2,
        "a table of positions that is not square": side**2 != vision.num_position_embeddings,
        "vision heads whose width 4 does not divide": vision.hidden_size // vision.num_heads % 4 != 0,
    }
    for fault, present in faults.items():
        if present:
            raise UserError(f"GGUF cannot be written: llama.cpp's Qwen3-VL has no {fault}; use --format qat")


def add_text(writer: gguf.GGUFWriter, config: PreTrainedConfig, name: str, file_type: int) -> None:
    """Architecture of the language model."""
    text: Any = config.text_config
    vision: Any = config.vision_config
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(file_type)
    writer.add_block_count(text.num_hidden_layers)
    writer.add_context_length(text.max_position_embeddings)
    writer.add_embedding_length(text.hidden_size)
    writer.add_feed_forward_length(text.intermediate_size)
    writer.add_head_count(text.num_attention_heads)
    writer.add_head_count_kv(text.num_key_value_heads)
    writer.add_key_length(text.head_dim)
    writer.add_value_length(text.head_dim)
    writer.add_layer_norm_rms_eps(text.rms_norm_eps)
    writer.add_rope_freq_base(float(text.rope_parameters["rope_theta"]))
    sections = list(text.rope_parameters["mrope_section"])
    writer.add_rope_dimension_sections([*sections, *[0] * (4 - len(sections))])
    writer.add_num_deepstack_layers(len(vision.deepstack_visual_indexes))


def add_vision(
    writer: gguf.GGUFWriter, config: PreTrainedConfig, name: str, file_type: int, directory: Path
) -> None:
    """The vision tower with its deepstack layers.

    Args:
        directory: where the processor's files are.

    Raises:
        UserError: they do not say how pixels are normalised.
    """
    text: Any = config.text_config
    vision: Any = config.vision_config
    mean, deviation = _normalisation(directory)
    writer.add_type(gguf.GGUFType.MMPROJ)
    writer.add_name(name)
    writer.add_file_type(file_type)
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type(gguf.VisionProjectorType.QWEN3VL)
    writer.add_vision_projection_dim(text.hidden_size)
    writer.add_vision_image_size(math.isqrt(vision.num_position_embeddings) * vision.patch_size)
    writer.add_vision_patch_size(vision.patch_size)
    writer.add_vision_embedding_length(vision.hidden_size)
    writer.add_vision_feed_forward_length(vision.intermediate_size)
    writer.add_vision_block_count(vision.depth)
    writer.add_vision_head_count(vision.num_heads)
    writer.add_vision_attention_layernorm_eps(VISION_NORM_EPS)
    writer.add_vision_image_mean(mean)
    writer.add_vision_image_std(deviation)
    writer.add_vision_use_gelu(True)
    writer.add_vision_spatial_merge_size(vision.spatial_merge_size)
    layers = vision.deepstack_visual_indexes
    writer.add_vision_is_deepstack_layers([index in layers for index in range(vision.depth)])


def _normalisation(directory: Path) -> tuple[list[float], list[float]]:
    for name in ("processor_config.json", "preprocessor_config.json"):
        if (directory / name).is_file():
            stored = json.loads((directory / name).read_text(encoding="utf-8"))
            stored = {**stored, **(stored.get("image_processor") or {})}
            if "image_mean" in stored and "image_std" in stored:
                return list(map(float, stored["image_mean"])), list(map(float, stored["image_std"]))
    raise UserError(f"{directory} does not say how pixels are normalised (image_mean): restore its processor")


def add_tokenizer(writer: gguf.GGUFWriter, config: PreTrainedConfig, directory: Path) -> None:
    """Vocabulary, merges, special tokens and chat template.

    Raises:
        UserError: no tokenizer.json, or one that llama.cpp would split or merge otherwise.
    """
    text: Any = config.text_config
    path = directory / "tokenizer.json"
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        tokens, types = vocabulary(stored, text.vocab_size)
        merges = [_merge(merge) for merge in stored["model"]["merges"]]
        splits = [step["pattern"]["Regex"] for step in _steps(stored) if step["type"] == "Split"]
        level = [step for step in _steps(stored) if step["type"] == "ByteLevel"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be read ({error}): GGUF needs a byte-level BPE tokenizer") from error
    if stored["model"].get("type") != "BPE" or splits != [_QWEN_SPLIT] or not level:
        raise UserError(f"{path} is not Qwen's byte-level BPE: llama.cpp would split text otherwise")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    ids = {token: id for id, token in enumerate(tokens)}
    special = _special_tokens(directory, config)
    for role, add in (("eos", writer.add_eos_token_id), ("pad", writer.add_pad_token_id)):
        if special.get(role) in ids:
            add(ids[special[role]])
    writer.add_add_bos_token(False)
    template = _chat_template(directory)
    if template:
        writer.add_chat_template(template)


def vocabulary(stored: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Tokens in the order of their ids, and llama.cpp's type of each; rows without a token are unused.

    Raises:
        ValueError: an id beyond the embedding.
    """
    named = {id: (token, gguf.TokenType.NORMAL) for token, id in stored["model"]["vocab"].items()}
    for added in stored.get("added_tokens", []):
        text = added["content"]
        # The converter takes whatever is written like a control token for one.
        control = added["special"] or (text.startswith("<|") and text.endswith("|>"))
        named[added["id"]] = (text, gguf.TokenType.CONTROL if control else gguf.TokenType.USER_DEFINED)
    if max(named) >= size:
        raise ValueError(f"token {max(named)} lies beyond the {size} rows of the embedding")
    rows = [named.get(id, (f"[PAD{id}]", gguf.TokenType.UNUSED)) for id in range(size)]
    return [token for token, _ in rows], [int(kind) for _, kind in rows]


def _steps(stored: dict[str, Any]) -> list[dict[str, Any]]:
    step = stored["pre_tokenizer"]
    return step["pretokenizers"] if step["type"] == "Sequence" else [step]


def _merge(merge: str | list[str]) -> str:
    """Two pieces with a space between: byte-level pieces never hold one."""
    return merge if isinstance(merge, str) else " ".join(merge)


def _special_tokens(directory: Path, config: PreTrainedConfig) -> dict[str, str]:
    """The texts of the end and padding tokens, as tokenizer_config.json names them."""
    path = directory / "tokenizer_config.json"
    stored = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    texts = {role: stored.get(f"{role}_token") for role in ("eos", "pad")}
    return {
        role: text.get("content", "") if isinstance(text, dict) else text
        for role, text in texts.items()
        if text
    }


def _chat_template(directory: Path) -> str | None:
    path = directory / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        path = directory / name
        if path.is_file():
            template = json.loads(path.read_text(encoding="utf-8")).get("chat_template")
            if isinstance(template, str):
                return template
    return None
