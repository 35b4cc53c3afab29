"""Rotary frequencies of a model made on the meta device: no checkpoint holds them, they follow from the configuration."""

from typing import Any

import torch

from grace.models.qwen3vl import VISION


def make_rotary(model: Any) -> None:
    """Replaces the rotary modules by real ones, in place."""
    decoder, vision = model.model.language_model, model.get_submodule(VISION)
    with torch.device("cpu"):
        decoder.rotary_emb = type(decoder.rotary_emb)(config=decoder.config)
        vision.rotary_pos_emb = type(vision.rotary_pos_emb)(vision.config)
