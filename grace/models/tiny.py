"""Tiny Qwen3-VL models: the real classes at a size that trains on a laptop.

`write_tiny_model` writes a complete model directory with random weights: config, safetensors,
a tokenizer trained here, image processor, chat template and generation config. Everything
downstream (loading, quantizing, exporting, serving) treats it like the real model.
"""

import json
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    Qwen2Tokenizer,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from grace.errors import UserError
from grace.files import new_directory, write_text
from grace.models.processor import Qwen3VLProcessor

# The student's decoder widths are multiples of 128, so that W4G128 applies exactly as in the
# real model. Both models together stay under 5M parameters (10 MB in bfloat16).
SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "teacher": {
        "text": {"hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 4},
        "vision": {
            "hidden_size": 96,
            "intermediate_size": 192,
            "depth": 4,
            "deepstack_visual_indexes": [1, 2],
        },
    },
    "student": {
        "text": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4},
        "vision": {"hidden_size": 96, "intermediate_size": 192, "depth": 3, "deepstack_visual_indexes": [1]},
    },
}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
VISION_HEADS = 4
VOCABULARY = 512  # rows of the embedding; the tokenizer's ids come first, a few rows stay unused
SCENE_PIXELS = 96 * 96
CLOSE_UP_PIXELS = 32 * 32  # one visual token
INITIALIZER_RANGE = (
    0.08  # about 1 / sqrt(width): at the published 0.02 such narrow models hardly start to learn
)

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

# What the tokenizer is trained on: the small world's words, each of which becomes one token.
# Inside a sentence a word takes the space before it along; the second list starts sentences.
_WORDS = """
is the digit digits number at in of are there top middle bottom left right centre cell cells
red green blue yellow purple orange none only which colour does have many greater larger than do and
add up to sum plus or picture all row by above below
"""
_STARTS = """
What Which How Is Where In List Describe red green blue yellow purple orange none yes no
top middle bottom centre user assistant system
"""
# Qwen's own split: every digit stands alone, a word takes the space before it along.
_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CHAT_TEMPLATE = Path(__file__).parents[1] / "data" / "chat_template.jinja"


def write_tiny_model(out_dir: str | Path, role: Literal["teacher", "student"], seed: int = 0) -> Path:
    """Writes a model directory with random weights drawn from `seed` and returns its path.

    Raises:
        UserError: unknown role, or `out_dir` already holds files.
    """
    if role not in SIZES:
        raise UserError(f"unknown tiny model {role!r}: choose one of {', '.join(SIZES)}")
    out_dir = Path(out_dir)
    tokenizer = build_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3VLForConditionalGeneration(tiny_config(role, tokenizer))
    end, pad = (tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>"))
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=[end, pad], pad_token_id=pad)
    with new_directory(out_dir) as folder:
        model.save_pretrained(folder)
        build_processor(tokenizer).save_pretrained(folder)
        _widen(folder)
    return out_dir


def tiny_config(role: str, tokenizer: Qwen2Tokenizer) -> Qwen3VLConfig:
    """Configuration of the tiny teacher or student for this tokenizer's special tokens."""
    size = SIZES[role]
    tokens = {token: int(id) for token, id in tokenizer.get_added_vocab().items()}
    text = {
        **size["text"],
        **HEADS,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 4096,
        "initializer_range": INITIALIZER_RANGE,
        "pad_token_id": tokens["<|endoftext|>"],
        "eos_token_id": tokens["<|im_end|>"],
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10_000.0,
            "mrope_section": [12, 10, 10],  # must sum to head_dim / 2
            "mrope_interleaved": True,
        },
    }
    vision = {
        **size["vision"],
        "num_heads": VISION_HEADS,
        "out_hidden_size": size["text"]["hidden_size"],
        "num_position_embeddings": 36,  # a 96 x 96 scene is 6 x 6 patches
        "initializer_range": INITIALIZER_RANGE,
    }
    whole: dict[str, Any] = {
        "text_config": text,
        "vision_config": vision,
        "image_token_id": tokens["<|image_pad|>"],
        "video_token_id": tokens["<|video_pad|>"],
        "vision_start_token_id": tokens["<|vision_start|>"],
        "vision_end_token_id": tokens["<|vision_end|>"],
        "tie_word_embeddings": True,
        "pad_token_id": tokens["<|endoftext|>"],
        "eos_token_id": tokens["<|im_end|>"],
    }
    return Qwen3VLConfig(**whole)


def build_tokenizer() -> Qwen2Tokenizer:
    """Byte-level BPE in Qwen's format, trained on the small world's words; the same on every run."""
    corpus = [" " + word for word in _WORDS.split()] + _STARTS.split()
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(corpus, trainer)
    learnt = json.loads(backend.to_str())["model"]
    merges: Any = [tuple(merge) for merge in learnt["merges"]]
    return Qwen2Tokenizer(
        vocab=learnt["vocab"],
        merges=merges,
        eos_token="<|im_end|>",
        model_max_length=4096,
        extra_special_tokens=list(SPECIAL_TOKENS),
    )


def build_processor(tokenizer: Qwen2Tokenizer) -> Qwen3VLProcessor:
    """Image processor of the small world: a picture larger than a scene is brought down to its area."""
    image_processor = Qwen2VLImageProcessorPil(
        size={"shortest_edge": CLOSE_UP_PIXELS, "longest_edge": SCENE_PIXELS},
        patch_size=16,
        temporal_patch_size=2,
        merge_size=2,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return Qwen3VLProcessor(
        image_processor, tokenizer, chat_template=_CHAT_TEMPLATE.read_text(encoding="utf-8")
    )


def _widen(folder: Path) -> None:
    """Makes the saved files readable by more loaders than the library version that wrote them.

    A stock processor with torchvision expects a video section, and tokenizers of transformers 4
    know the special tokens under their older key.
    """
    path = folder / "processor_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    shared = ("size", "patch_size", "temporal_patch_size", "merge_size", "image_mean", "image_std")
    config["video_processor"] = {key: config["image_processor"][key] for key in shared}
    config["video_processor"]["video_processor_type"] = "Qwen3VLVideoProcessor"
    write_text(path, json.dumps(config, indent=2, sort_keys=True) + "\n")
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["additional_special_tokens"] = config.pop("extra_special_tokens")
    write_text(path, json.dumps(config, indent=2, sort_keys=True) + "\n")
