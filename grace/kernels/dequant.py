"""Dequantize, then multiply densely: the path for many tokens, and for activations that are not bfloat16.

The weights are expanded one nibble position at a time, that is an eighth of the output columns: the
shifts run over whole words, nothing is scattered, and never more than 1/8 of the dense matrix exists.

Shape suffixes: M tokens, I input features, O output features, G groups along the input, W words (= O / 8).
"""

import functools

import torch
from torch import Tensor

from grace.kernels.awq_layout import NIBBLE_COLUMNS, PER_WORD


@functools.cache
def cpu_multiplies_bfloat16() -> bool:
    """Whether this processor has bfloat16 arithmetic.

    Without it a bfloat16 matmul is emulated, ~5x slower than fp32.
    """
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def compute_dtype(activations: torch.dtype, device: torch.device) -> torch.dtype:
    """The type the dense product runs in; the result is returned in the activations' own type.

    On a CPU: bfloat16 where the processor has it, else fp32 (more exact and faster). Elsewhere:
    the activations' type.
    """
    if device.type != "cpu":
        return activations
    if activations == torch.bfloat16 and cpu_multiplies_bfloat16():
        return torch.bfloat16
    return torch.float64 if activations == torch.float64 else torch.float32


def matmul(x_MI: Tensor, qweight_IW: Tensor, qzeros_GW: Tensor, scales_GO: Tensor, group_size: int) -> Tensor:
    """x W for AWQ tensors with any zero points; the result has the type of x."""
    dtype = compute_dtype(x_MI.dtype, x_MI.device)
    dense_MI = x_MI.to(dtype)
    tokens, words = x_MI.shape[0], qweight_IW.shape[1]
    result_MW8 = torch.empty(tokens, words, PER_WORD, dtype=x_MI.dtype, device=x_MI.device)
    scales_GW8 = scales_GO.view(-1, words, PER_WORD)
    exact = torch.float64 if dtype == torch.float64 else torch.float32  # scale * (q - zero) is exact in fp32
    for nibble, column in enumerate(NIBBLE_COLUMNS):
        codes_GgW = _nibble(qweight_IW, nibble).to(exact).view(-1, group_size, words)
        zeros_GW = _nibble(qzeros_GW, nibble).to(exact)
        scales_GW = scales_GW8[..., column].to(exact)
        weight_GgW = codes_GgW.sub_(zeros_GW[:, None]).mul_(scales_GW[:, None])
        result_MW8[..., column] = dense_MI @ weight_GgW.view(-1, words).to(dtype)
    return result_MW8.view(tokens, words * PER_WORD)


def _nibble(words_XW: Tensor, index: int) -> Tensor:
    """Nibble `index` of every word, as int32."""
    return (words_XW >> (4 * index)).bitwise_and_(15)
