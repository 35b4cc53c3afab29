"""What several processes need of one model: equal work in every forward pass, and a whole copy of a sharded one.

Shape suffixes: P image patches, D numbers per patch, N images.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from grace.models import qwen3vl
from grace.quant.grid import dequantize, quantize


@contextlib.contextmanager
def idle_vision(model: qwen3vl.Qwen3VLForConditionalGeneration) -> Iterator[None]:
    """Within, a forward pass without pictures runs the vision tower too: on four empty patches, to no effect.

    Where processes gather weights or reduce gradients layer by layer, each must come to the same layers in the
    same order, whatever its records hold. So the tower runs where a picture's would, right after the input
    embedding, and all its parameters get a gradient: zero.
    """

    def add_nothing(_module: nn.Module, _args: Any, embedded: Tensor) -> Tensor:
        return embedded + nothing_seen(model).to(embedded.dtype)

    handle = model.get_input_embeddings().register_forward_hook(add_nothing)
    try:
        yield
    finally:
        handle.remove()


def nothing_seen(model: qwen3vl.Qwen3VLForConditionalGeneration) -> Tensor:
    """A zero, 0-d, that depends on every parameter of the vision tower."""
    vision: Any = model.get_submodule(qwen3vl.VISION)
    config = vision.config
    merge = config.spatial_merge_size
    width = config.in_channels * config.temporal_patch_size * config.patch_size**2
    device = qwen3vl.input_device(model)
    empty_PD = torch.zeros(merge**2, width, dtype=vision.dtype, device=device)
    seen = vision(empty_PD, grid_thw=torch.tensor([[1, merge, merge]], device=device), return_dict=True)
    total = seen.pooler_output.sum() * 0.0
    for feature in seen.deepstack_features:
        total = total + feature.sum() * 0.0
    return total


def whole_copy(
    model: qwen3vl.Qwen3VLForConditionalGeneration, weights: Mapping[str, Tensor]
) -> qwen3vl.Qwen3VLForConditionalGeneration:
    """The model that a sharded one is, whole and plain: quantized layers as linears on their W_hat.

    Args:
        weights: whole parameters by the names that `model` gives them.
    """
    state = dict(weights)
    for name, layer in qwen3vl.quantized_linears(model).items():
        latent_OI, theta_OG = state[f"{name}.weight"], state.pop(f"{name}.theta")
        codes_OI, scales_OG = quantize(latent_OI, theta_OG, layer.group_size, layer.bits)
        state[f"{name}.weight"] = dequantize(codes_OI, scales_OG, layer.group_size)
    copy = qwen3vl.skeleton(model.config)
    copy.load_state_dict(state, strict=False, assign=True)  # a tied output layer is not among them
    copy.tie_weights()
    for name, buffer in model.named_buffers():  # rotary frequencies, which no checkpoint holds
        parent, _, child = name.rpartition(".")
        setattr(copy.get_submodule(parent), child, buffer)
    missing = [name for name, tensor in copy.state_dict().items() if tensor.is_meta]
    assert not missing, f"no weights for {missing}"
    copy.generation_config = model.generation_config
    return copy.requires_grad_(False).eval()
