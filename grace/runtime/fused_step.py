"""The decode step of a `Decoder` as a function of device tensors alone, over fused kernels: ten launches per layer.

Floor: every weight once, the cache of every row once; `grace.kernels.decode_triton` and `w4a16` have the bytes.

Shape suffixes: B rows of the batch, padded ones included, P parts of a linear's output, and those of `decoder`.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from grace.kernels import w4a16
from grace.runtime.decoder import Decoder
from grace.runtime.fused_linear import FusedLinear
from grace.runtime.int4_linear import Int4Linear
from grace.runtime.joined import joined


def join_linears(decoder: Decoder) -> None:
    """Makes q, k, v one layer and gate, up another, for the decode step and for prompts alike."""
    for layer in decoder.layers:
        for name in ("qkv", "gate_up"):
            whole = joined(getattr(layer, name).modules)
            if whole is not None:
                setattr(layer, name, FusedLinear([whole]))


def parts_of(linear: FusedLinear, x_BD: Tensor) -> Tensor:
    """A linear's output [P, B, O], which the next kernel adds up; one part but for split Triton products."""
    module: Any = linear.modules[0]
    alone = len(linear.modules) == 1 and isinstance(module, Int4Linear) and module.bias is None
    if alone and module.choice(x_BD).kernel == "triton":
        return w4a16.parts(x_BD, module.qweight, module.qzeros, module.scales, module.group_size)
    return linear(x_BD)[None]


def fused_step(decoder: Decoder, inputs_5B: Tensor, splits: int) -> Tensor:
    """One token further in every row.

    Args:
        inputs_5B: int64: tokens, rows of the cache, places in them, rotary positions, and how many places to
            attend to, the new one included; 0 for a row that only fills up the batch.
        splits: programs that share a row and head in attention.

    Returns:
        fp32 logits [B, V].
    """
    from grace.kernels import decode_triton as kernels

    parts, dtype = decoder.parts, decoder.dtype
    tokens_B, rows_B, places_B, turns_B, counts_B = inputs_5B
    x_BD = F.embedding(tokens_B, parts.embed_VD)
    cos_B1S, sin_B1S = decoder._rotation(turns_B.expand(3, -1))
    delta_PBD = None
    for index, layer in enumerate(decoder.layers):
        keys_RKCS, values_RKCS = decoder.keys_LRKCS[index], decoder.values_LRKCS[index]
        x_BD, normed_BD = kernels.add_norm(x_BD, delta_PBD, layer.input_norm_D, parts.epsilon)
        query_BQS = kernels.rotate(
            parts_of(layer.qkv, normed_BD), layer.qk_norm_XS, cos_B1S, sin_B1S, rows_B, places_B,
            keys_RKCS, values_RKCS, parts.query_heads, parts.epsilon,
        )  # fmt: skip
        seen_BX = kernels.attend(query_BQS, keys_RKCS, values_RKCS, rows_B, counts_B, splits)
        x_BD, normed_BD = kernels.add_norm(
            x_BD, parts_of(layer.output, seen_BX), layer.post_norm_D, parts.epsilon
        )
        delta_PBD = parts_of(layer.down, kernels.gate(parts_of(layer.gate_up, normed_BD), dtype))
    _, normed_BD = kernels.add_norm(x_BD, delta_PBD, parts.norm_D, parts.epsilon)
    return decoder.head(normed_BD).float()
