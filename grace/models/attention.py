"""Attention over packed rows: each sample by itself, without a mask over the square of the row.

The samples' lengths come as whole numbers (`lengths=`), so that nothing waits for the device. Each sample is an
ordinary causal call of scaled_dot_product_attention, which on a GPU is a flash kernel in bfloat16.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

PACKED = "packed_sdpa"  # its name to transformers


def packed_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    lengths: Sequence[int] | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' SDPA, sample by sample where `lengths` are given.

    Args:
        query, key, value: [B, heads, L, head size]; B is 1 with `lengths`, which add up to L.

    Raises:
        ValueError: lengths that do not fit the row.
    """
    attend = AttentionInterface()["sdpa"]
    if lengths is None:
        return attend(module, query, key, value, attention_mask, **options)
    if query.shape[0] != 1 or sum(lengths) != query.shape[2] or key.shape[2] != query.shape[2]:
        raise ValueError(f"samples of {list(lengths)} tokens do not fill a row of {tuple(query.shape)}")
    samples = zip(*(states.split(list(lengths), dim=2) for states in (query, key, value)), strict=True)
    return torch.cat([attend(module, *sample, None, **options)[0] for sample in samples], dim=1), None


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, AttentionMaskInterface()["sdpa"])
