"""The decoder of a loaded Qwen3-VL model as plain weights: what an engine with a forward pass of its own computes with.

Shape suffixes: D hidden width, H head size, F rotary frequencies (= H / 2), V vocabulary, N visual tokens, T tokens.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from grace.errors import UserError
from grace.models.qwen3vl import VISION

_FIXED_ROPE = ("default", "linear", "yarn", "llama3")  # frequencies that do not depend on the length


@dataclass(frozen=True)
class LayerParts:
    """One decoder layer: its norms' weights, and its linears (modules, since they may be packed)."""

    input_norm_D: Tensor
    query: nn.Module
    key: nn.Module
    value: nn.Module
    query_norm_H: Tensor
    key_norm_H: Tensor
    output: nn.Module
    post_norm_D: Tensor
    gate: nn.Module
    up: nn.Module
    down: nn.Module


@dataclass(frozen=True)
class DecoderParts:
    """A decoder: embedding, layers, final norm and head.

    Attributes:
        embed_VD, head_VD: one tensor where they are tied.
        norm_D: weight of the final norm.
        epsilon: of every norm.
        frequency_F: rotary frequencies, fp32.
        axis_F: which of (time, height, width) turns each frequency (interleaved mRoPE).
        rope_scale: factor on cosine and sine; 1 for the published models.
        query_heads, kv_heads, head_size: of the attention.
        max_context: the longest sequence that the model is made for, in tokens.
        merge_size: patches along an edge of what one visual token stands for.
    """

    embed_VD: Tensor
    layers: tuple[LayerParts, ...]
    norm_D: Tensor
    head_VD: Tensor
    epsilon: float
    frequency_F: Tensor
    axis_F: Tensor
    rope_scale: float
    query_heads: int
    kv_heads: int
    head_size: int
    max_context: int
    merge_size: int


def decoder_parts(model: Any) -> DecoderParts:
    """The parts of a Qwen3-VL model; nothing is copied.

    Raises:
        UserError: an activation or a rotary embedding that the published models do not have.
    """
    decoder = model.model.language_model
    config = decoder.config
    if config.hidden_act != "silu":
        raise UserError(f"the decoder's activation is {config.hidden_act}: the engine runs silu only")
    rope = decoder.rotary_emb
    if rope.rope_type not in _FIXED_ROPE:
        raise UserError(f"the rotary embedding is {rope.rope_type}: the engine runs {', '.join(_FIXED_ROPE)}")
    return DecoderParts(
        embed_VD=decoder.embed_tokens.weight,
        layers=tuple(_layer_parts(layer) for layer in decoder.layers),
        norm_D=decoder.norm.weight,
        head_VD=model.lm_head.weight,
        epsilon=config.rms_norm_eps,
        frequency_F=rope.inv_freq.float(),
        axis_F=_axes(len(rope.inv_freq), rope.mrope_section).to(rope.inv_freq.device),
        rope_scale=rope.attention_scaling,
        query_heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_size=decoder.layers[0].self_attn.head_dim,
        max_context=config.max_position_embeddings,
        merge_size=model.config.vision_config.spatial_merge_size,
    )


def _layer_parts(layer: Any) -> LayerParts:
    attention, mlp = layer.self_attn, layer.mlp
    return LayerParts(
        layer.input_layernorm.weight,
        attention.q_proj,
        attention.k_proj,
        attention.v_proj,
        attention.q_norm.weight,
        attention.k_norm.weight,
        attention.o_proj,
        layer.post_attention_layernorm.weight,
        mlp.gate_proj,
        mlp.up_proj,
        mlp.down_proj,
    )


def _axes(frequencies: int, sections: list[int]) -> Tensor:
    """Height takes every third frequency from the second on, width from the third, as far as its section goes."""
    axis_F = torch.zeros(frequencies, dtype=torch.int64)
    for axis in (1, 2):
        axis_F[axis : 3 * sections[axis] : 3] = axis
    return axis_F


def visual_features(
    model: Any, pixel_values_PD: Tensor, image_grid_thw_N3: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """The vision tower's output for some pictures.

    Returns:
        [N, D] to put in place of the image tokens' embeddings, and as many tensors [N, D] as there are
        first layers after which such a one is added (deepstack).
    """
    vision = model.get_submodule(VISION)
    seen = vision(pixel_values_PD.to(vision.dtype), grid_thw=image_grid_thw_N3, return_dict=True)
    return seen.pooler_output, list(seen.deepstack_features)
