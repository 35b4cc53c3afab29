"""Attention over the rows of a cache: prompts that are read into it, and a decoding step's new tokens.

Shape suffixes: L layers, T tokens of several prompts one after the other, P tokens of one prompt, R rows decoded together,
B rows of the cache from the first of them to the last, H query heads, K key/value heads, G query heads per key/value
head, C places of the cache, S head size.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Attend = Callable[[int, Tensor], Tensor]
"""Layer and queries [T, H, S] to [T, H * S]; the new keys and values are in the cache by then."""

_WASTE = 2.0  # places computed for each that is needed, up to which one call for all rows is faster


def prompt_attention(
    keys_LRKCS: Tensor, values_LRKCS: Tensor, rows: Sequence[int], sizes: Sequence[int]
) -> Attend:
    """Attention of prompts, one after the other, each within itself, whose keys and values are in their rows already.

    Args:
        sizes: tokens of each prompt.
    """

    def attend(layer: int, q_THS: Tensor) -> Tensor:
        found = []
        for row, size, q_PHS in zip(rows, sizes, q_THS.split(list(sizes)), strict=True):
            q_HPS = q_PHS.transpose(0, 1)
            groups = q_HPS.shape[0] // keys_LRKCS.shape[2]
            k_HPS, v_HPS = (
                cache[layer, row, :, :size].repeat_interleave(groups, 0)
                for cache in (keys_LRKCS, values_LRKCS)
            )
            y_HPS = F.scaled_dot_product_attention(q_HPS[None], k_HPS[None], v_HPS[None], is_causal=True)[0]
            found.append(y_HPS.transpose(0, 1).reshape(size, -1))
        return found[0] if len(found) == 1 else torch.cat(found)

    return attend


def row_attention(
    keys_LRKCS: Tensor, values_LRKCS: Tensor, rows: Sequence[int], lengths: Sequence[int]
) -> Attend:
    """Attention of each row's new token, whose key and value are in their place already.

    Args:
        rows: different ones.
        lengths: tokens that each of them holds without the new one.
    """
    span, longest = max(rows) - min(rows) + 1, max(lengths) + 1
    if len(rows) > 1 and span * longest <= _WASTE * (sum(lengths) + len(rows)):
        return _together(keys_LRKCS, values_LRKCS, rows, lengths)
    return _one_by_one(keys_LRKCS, values_LRKCS, rows, lengths)


def _one_by_one(
    keys_LRKCS: Tensor, values_LRKCS: Tensor, rows: Sequence[int], lengths: Sequence[int]
) -> Attend:
    def attend(layer: int, q_RHS: Tensor) -> Tensor:
        keys, values = keys_LRKCS[layer], values_LRKCS[layer]
        found = []
        for index, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            k_1KCS, v_1KCS = keys[row : row + 1, :, : length + 1], values[row : row + 1, :, : length + 1]
            # The query heads that share a key head stand where a sequence of queries would.
            q_1KGS = q_RHS[index].view(1, keys.shape[1], -1, q_RHS.shape[-1])
            found.append(F.scaled_dot_product_attention(q_1KGS, k_1KCS, v_1KCS).reshape(1, -1))
        return found[0] if len(found) == 1 else torch.cat(found)

    return attend


def _together(
    keys_LRKCS: Tensor, values_LRKCS: Tensor, rows: Sequence[int], lengths: Sequence[int]
) -> Attend:
    """All rows in one call, the shorter ones masked; rows between them that are not asked for come along."""
    low, high, longest = min(rows), max(rows) + 1, max(lengths) + 1
    device = keys_LRKCS.device
    rows_R, lengths_R = torch.tensor(rows, device=device), torch.tensor(lengths, device=device)
    places_R = rows_R - low
    lengths_B = torch.zeros(high - low, dtype=torch.int64, device=device).index_copy_(0, places_R, lengths_R)
    hidden_BC = torch.arange(longest, device=device) > lengths_B[:, None]
    mask_B11C = torch.zeros_like(hidden_BC, dtype=keys_LRKCS.dtype).masked_fill_(hidden_BC, -torch.inf)
    mask_B11C = mask_B11C[:, None, None]
    in_order = list(rows) == list(range(low, high))

    def attend(layer: int, q_RHS: Tensor) -> Tensor:
        keys, values = keys_LRKCS[layer], values_LRKCS[layer]
        q_BKGS = q_RHS.view(len(rows), keys.shape[1], -1, q_RHS.shape[-1])
        if not in_order:
            q_BKGS = q_BKGS.new_zeros(high - low, *q_BKGS.shape[1:]).index_copy_(0, places_R, q_BKGS)
        y_BKGS = F.scaled_dot_product_attention(
            q_BKGS, keys[low:high, :, :longest], values[low:high, :, :longest], attn_mask=mask_B11C
        )
        return (y_BKGS if in_order else y_BKGS[places_R]).reshape(len(rows), -1)

    return attend
