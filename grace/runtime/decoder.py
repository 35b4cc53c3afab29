"""A decoder with a static KV cache: several independent sequences, each at its own place, on one device.

The forward pass is our own, over the weights of `grace.models.decoder_parts`: few operations per layer, fused
projections, no masks over the square of the context. Pictures go through the library's vision tower.

Shape suffixes: T tokens, R rows decoded together, B rows of the cache up to the last of them, D hidden width,
Z queries, keys and values side by side, H query heads, K key/value heads, S head size, F rotary frequencies
(= S / 2), C context, V vocabulary, N visual tokens.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from grace.data.packing import positions_3L
from grace.data.template import IMAGE_TOKEN_TYPE, Sample
from grace.errors import UserError
from grace.memory import private_memory
from grace.models.decoder_parts import DecoderParts, decoder_parts, visual_features
from grace.runtime.fused_linear import FusedLinear
from grace.runtime.head import Head
from grace.runtime.layer_math import layer_math
from grace.runtime.row_attention import Attend, prompt_attention, row_attention


class Layer:
    """One decoder layer over its fused linears."""

    def __init__(self, parts: Any, whole: DecoderParts):
        self.input_norm_D, self.post_norm_D = parts.input_norm_D, parts.post_norm_D
        self.qkv = FusedLinear([parts.query, parts.key, parts.value])
        self.output = FusedLinear([parts.output])
        self.gate_up = FusedLinear([parts.gate, parts.up])
        self.down = FusedLinear([parts.down])
        self.gate_width = parts.gate.out_features
        heads = [
            parts.query_norm_H.expand(whole.query_heads, -1),
            parts.key_norm_H.expand(whole.kv_heads, -1),
        ]
        self.qk_norm_XS = torch.cat(heads).contiguous()


class Decoder:
    """Decodes up to `rows` sequences of up to `context` tokens.

    Args:
        model: a loaded Qwen3-VL model, dense or packed.
        rows: sequences side by side.
        context: tokens of each, prompt, pictures and answer together.

    Raises:
        UserError: a context longer than the model is made for.
    """

    def __init__(self, model: Any, rows: int = 1, context: int = 4096):
        parts = decoder_parts(model)
        self.model, self.parts = model, parts
        self.layers = [Layer(layer, parts) for layer in parts.layers]
        self.head = Head(parts.head_VD)
        self.device, self.dtype = parts.embed_VD.device, parts.embed_VD.dtype
        widths = len(parts.norm_D), parts.head_size, self.layers[0].gate_width
        self._math = layer_math(parts.epsilon, widths, self.dtype, self.device)
        self.resize(rows, context)

    def resize(self, rows: int | None = None, context: int | None = None) -> None:
        """Gives the cache another size; all rows are empty then.

        Raises:
            UserError: a context longer than the model is made for.
        """
        if context is not None and context > self.parts.max_context:
            raise UserError(
                f"a context of {context} tokens is more than the model's {self.parts.max_context}: lower --context"
            )
        self.rows, self.context = rows or self.rows, context or self.context
        # One place more than the context: where rows that only fill up a batch write.
        shape = (len(self.layers), self.rows, self.parts.kv_heads, self.context + 1, self.parts.head_size)
        self.keys_LRKCS = _blank(shape, self.dtype, self.device)
        self.values_LRKCS = _blank(shape, self.dtype, self.device)
        self._lengths = [0] * self.rows
        self._offsets = [0] * self.rows  # of the rotary position from the place in the cache

    def length(self, row: int) -> int:
        """Tokens in a row."""
        return self._lengths[row]

    def release(self, row: int) -> None:
        """Empties a row. What it held is never attended to again."""
        self._lengths[row] = self._offsets[row] = 0

    def prefill(self, row: int, sample: Sample) -> Tensor:
        """Reads a prompt with its pictures into a row, over what was there.

        Returns:
            fp32 logits [V] of the token that follows.

        Raises:
            UserError: the prompt leaves no room in the context.
        """
        return self.prefill_all([row], [sample])[0]

    @torch.inference_mode()
    def prefill_all(self, rows: Sequence[int], samples: Sequence[Sample]) -> Tensor:
        """Reads several prompts into as many rows, in one pass over the weights.

        Returns:
            fp32 logits [R, V] of the tokens that follow.

        Raises:
            UserError: one of the prompts leaves no room in the context.
        """
        sizes = [len(sample.input_ids_L) for sample in samples]
        for row in rows:
            self.release(row)
        if max(sizes) > self.context:
            raise UserError(
                f"the prompt has {max(sizes)} tokens, the context holds {self.context}: "
                "shorten it, use fewer or smaller pictures, or raise --context"
            )
        positions = [positions_3L(sample, self.parts.merge_size) for sample in samples]
        ids_T = torch.cat([sample.input_ids_L for sample in samples]).to(self.device)
        x_TD = F.embedding(ids_T, self.parts.embed_VD)
        deep_ND, visual_T = self._put_pictures(x_TD, samples)
        positions_3T = torch.cat(positions, -1).to(self.device)
        cos_TS, sin_TS = (part_T1S[:, 0] for part_T1S in self._rotation(positions_3T))
        attend = prompt_attention(self.keys_LRKCS, self.values_LRKCS, rows, sizes)
        sizes_R = torch.tensor(sizes, device=self.device)
        rows_T = torch.tensor(list(rows), device=self.device).repeat_interleave(sizes_R)
        places_T = torch.cat([torch.arange(size, device=self.device) for size in sizes])
        x_TD = self._layers(x_TD, cos_TS, sin_TS, rows_T, places_T, attend, deep_ND, visual_T)
        for row, size, positions_3P in zip(rows, sizes, positions, strict=True):
            self._lengths[row] = size
            self._offsets[row] = int(positions_3P.max()) + 1 - size
        return self._logits(x_TD[sizes_R.cumsum(0) - 1])

    @torch.inference_mode()
    def decode(self, rows: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """One step: each of `rows` takes its next token.

        Returns:
            fp32 logits [R, V], in the order of `rows`.

        Raises:
            ValueError: a row twice, none at all, or one that is empty.
            UserError: a row that is full.
        """
        self.check_step(rows, tokens)
        logits_RV = self._step(list(rows), list(tokens))
        self.advance(rows)
        return logits_RV

    def check_step(self, rows: Sequence[int], tokens: Sequence[int]) -> None:
        """Raises what `decode` raises for these rows."""
        if not rows or len(set(rows)) != len(rows) or len(rows) != len(tokens):
            raise ValueError(f"rows {list(rows)} with {len(tokens)} tokens")
        if any(not self._lengths[row] for row in rows):
            raise ValueError(f"rows {list(rows)}: one of them has no prompt")
        if any(self._lengths[row] >= self.context for row in rows):
            raise UserError(f"the context of {self.context} tokens is full: raise --context")

    def advance(self, rows: Sequence[int]) -> None:
        """Counts a token more in each of `rows`."""
        for row in rows:
            self._lengths[row] += 1

    # ------------------------------------------------------------ the forward pass

    def _step(self, rows: list[int], tokens: list[int]) -> Tensor:
        lengths = [self._lengths[row] for row in rows]
        turns = [length + self._offsets[row] for row, length in zip(rows, lengths, strict=True)]
        x_RD = F.embedding(torch.tensor(tokens, device=self.device), self.parts.embed_VD)
        turns_3R = torch.tensor(turns, device=self.device).expand(3, -1)
        cos_RS, sin_RS = (part_R1S[:, 0] for part_R1S in self._rotation(turns_3R))

        attend = row_attention(self.keys_LRKCS, self.values_LRKCS, rows, lengths)
        rows_R, places_R = (torch.tensor(numbers, device=self.device) for numbers in (rows, lengths))
        return self._logits(self._layers(x_RD, cos_RS, sin_RS, rows_R, places_R, attend))

    def _layers(
        self,
        x_TD: Tensor,
        cos_TS: Tensor,
        sin_TS: Tensor,
        rows_T: Tensor,
        places_T: Tensor,
        attend: Attend,
        deep_ND: Sequence[Tensor] = (),
        visual_T: Tensor | None = None,
    ) -> Tensor:
        """All layers; `deep_ND` are added to visual tokens after the first of them."""
        math, delta_TD = self._math, None
        for index, layer in enumerate(self.layers):
            cache = self.keys_LRKCS[index], self.values_LRKCS[index]
            x_TD, normed_TD = math.add_norm(x_TD, delta_TD, layer.input_norm_D)
            qkv_TZ = layer.qkv(normed_TD)
            q_THS = math.rotate(qkv_TZ, layer.qk_norm_XS, cos_TS, sin_TS, *cache, rows_T, places_T)
            x_TD, normed_TD = math.add_norm(x_TD, layer.output(attend(index, q_THS)), layer.post_norm_D)
            delta_TD = layer.down(math.gate(layer.gate_up(normed_TD)))
            if index < len(deep_ND):
                x_TD, delta_TD = x_TD + delta_TD, None
                x_TD[visual_T] += deep_ND[index].to(x_TD.dtype)
        return x_TD if delta_TD is None else x_TD + delta_TD

    def _logits(self, x_RD: Tensor) -> Tensor:
        _, normed_RD = self._math.add_norm(x_RD, None, self.parts.norm_D)
        return self.head(normed_RD).float()

    def _rotation(self, positions_3T: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and signed sine [T, 1, S] of tokens at (time, height, width)."""
        parts = self.parts
        angle_TF = positions_3T[parts.axis_F].T * parts.frequency_F
        cos_TF, sin_TF = angle_TF.cos() * parts.rope_scale, angle_TF.sin() * parts.rope_scale
        both = torch.cat([cos_TF, cos_TF], -1), torch.cat([-sin_TF, sin_TF], -1)
        cos_TS, sin_TS = (part.to(self.dtype)[:, None] for part in both)
        return cos_TS, sin_TS

    def _put_pictures(self, x_TD: Tensor, samples: Sequence[Sample]) -> tuple[list[Tensor], Tensor | None]:
        """Replaces image tokens' embeddings in place; the deepstack features and where they belong."""
        pixels = [one.pixel_values_PD for one in samples if one.pixel_values_PD is not None]
        grids = [one.image_grid_thw_N3 for one in samples if one.image_grid_thw_N3 is not None]
        if not pixels:
            return [], None
        seen_ND, deep_ND = visual_features(
            self.model, torch.cat(pixels).to(self.device), torch.cat(grids).to(self.device)
        )
        kinds_T = torch.cat([sample.mm_token_type_ids_L for sample in samples])
        visual_T = (kinds_T == IMAGE_TOKEN_TYPE).to(self.device)
        x_TD[visual_T] = seen_ND.to(x_TD.dtype)
        return deep_ND, visual_T


def _blank(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros: what is masked still takes part, as zero times something that must be finite.

    On the CPU memory is taken page by page as it is written to, and in small pages: a row has a strip for each layer
    and head, and a large page would take most of every strip with its first token.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = torch.Size(shape).numel() * dtype.itemsize
    try:
        memory = private_memory(size, "MADV_NOHUGEPAGE")
    except (OSError, OverflowError) as error:
        raise MemoryError(f"no memory for {size / 1e9:.1f} GB of keys and values") from error
    return torch.frombuffer(memory, dtype=dtype).view(shape)
