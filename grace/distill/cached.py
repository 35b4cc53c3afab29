"""The teacher's side of training from a cache: what is kept of a record, and of a micro-batch.

`grace teacher-cache` computes it once (`cached_record`), `grace.distill.cache_store` keeps it on disk, and training
takes it in place of a teacher (`CachedSignals`).

Shape suffixes: T supervised tokens, C tokens of a chunk, E teacher width, S shared vocabulary, K tokens kept,
2 the temperatures (1, that of the loss); n visual tokens of an image; a 1 marks a kept dimension.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from grace.distill.fused import teacher_chunk_rows
from grace.distill.rcka import teacher_gram
from grace.distill.row_parts import at_one, positive, take_out
from grace.distill.rows import gate_rows
from grace.distill.top_k import TopK, concatenate


@dataclass(frozen=True)
class CachedRecord:
    """What is kept of one record.

    Attributes:
        top_k: of its supervised tokens, in order.
        grams: per image the upper triangle of the teacher's Gram matrix, row by row, float16
            [n (n + 1) / 2]; none where the cache was made without.
    """

    top_k: TopK
    grams: tuple[Tensor, ...]


@dataclass(frozen=True)
class CachedSignals:
    """The teacher's side of one micro-batch, as `grace.distill.teacher.TeacherSignals` is that of a living one.

    Attributes:
        top_k: of the supervised tokens of its records, in order.
        grams: Gram matrices [n, n] of its images, float16.
        image_count: images whose Gram matrix is not degenerate, a 0-d tensor.
    """

    top_k: TopK
    grams: tuple[Tensor, ...]
    image_count: Tensor

    @property
    def gate_T(self) -> Tensor:
        """Confidence gate of each supervised token."""
        return self.top_k.gate_T

    def to(self, device: torch.device | str) -> "CachedSignals":
        """The same on `device`."""
        grams = tuple(gram.to(device) for gram in self.grams)
        return replace(
            self, top_k=self.top_k.to(device), grams=grams, image_count=self.image_count.to(device)
        )

    def loss_inputs(self, head_VE: Tensor | None, with_images: bool) -> dict[str, Any]:
        """The teacher's arguments of `grace.distill.objective.micro_batch_loss`."""
        return {"teacher_top_k": self.top_k, "gate_T": self.gate_T} | (
            {"teacher_grams": self.grams} if with_images else {}
        )


def collate_cached(records: Sequence[CachedRecord], gate_sharpness: float = 1.0) -> CachedSignals:
    """The records of a micro-batch, in the order of its rows; their gates to the power of `gate_sharpness`."""
    grams = tuple(unpack_gram(gram) for record in records for gram in record.grams)
    usable = [gram.any() for gram in grams]
    image_count = torch.stack(usable).sum() if usable else torch.zeros((), dtype=torch.long)
    top_k = concatenate([record.top_k for record in records])
    if gate_sharpness != 1.0:
        top_k = replace(top_k, gate_T=top_k.gate_T**gate_sharpness)
    return CachedSignals(top_k, grams, image_count)


def cached_record(
    hidden_TE: Tensor,
    head_VE: Tensor,
    targets_T: Tensor,
    visual: Sequence[Tensor],
    k: int,
    *,
    temperature: float = 2.0,
    shared: int | None = None,
) -> CachedRecord:
    """What to keep of a record; arguments and errors as `teacher_top_k`.

    Args:
        visual: hidden states of the visual tokens of each image [n_i, E]; empty keeps no Gram matrices.
    """
    top_k = teacher_top_k(hidden_TE, head_VE, targets_T, k, temperature=temperature, shared=shared)
    return CachedRecord(top_k, tuple(pack_gram(image) for image in visual))


def pack_gram(visual: Tensor) -> Tensor:
    """The upper triangle of an image's Gram matrix (`teacher_gram`), float16, from its tokens [n, E]."""
    row, column = torch.triu_indices(len(visual), len(visual), device=visual.device)
    return teacher_gram(visual)[row, column].half()


def unpack_gram(packed: Tensor) -> Tensor:
    """The symmetric matrix [n, n] of an upper triangle [n (n + 1) / 2]."""
    n = gram_side(len(packed))
    row, column = torch.triu_indices(n, n, device=packed.device)
    gram = packed.new_empty(n, n)
    gram[row, column] = packed
    gram[column, row] = packed
    return gram


def gram_side(entries: int) -> int:
    """The n of n (n + 1) / 2 entries.

    Raises:
        ValueError: no triangle has that many.
    """
    n = int(((8 * entries + 1) ** 0.5 - 1) / 2 + 0.5)
    if n * (n + 1) // 2 != entries:
        raise ValueError(f"{entries} numbers are not the triangle of a matrix")
    return n


@torch.no_grad()
def teacher_top_k(
    hidden_TE: Tensor,
    head_VE: Tensor,
    targets_T: Tensor,
    k: int,
    *,
    temperature: float = 2.0,
    shared: int | None = None,
    chunk: int | None = None,
) -> TopK:
    """What to keep of a teacher; logits exist chunk by chunk only.

    Args:
        targets_T: int64, within the shared vocabulary.
        k: tokens to keep beside the target; all others if there are fewer.
        shared: vocabulary entries that the student has too; None is all.
        chunk: tokens at a time; None takes what fits the budget of `grace.distill.fused`.

    Raises:
        ValueError: shapes do not fit together, a target lies outside, or k or the temperature is not positive.
    """
    if hidden_TE.ndim != 2 or hidden_TE.shape != (len(targets_T), head_VE.shape[1]):
        raise ValueError(
            f"teacher hidden states {tuple(hidden_TE.shape)}, head {tuple(head_VE.shape)} and "
            f"{len(targets_T)} targets do not fit: expected [T, width], [vocabulary, width] and [T]"
        )
    head_SE = head_VE[:shared].to(hidden_TE.dtype)
    if k < 1 or not temperature > 0:
        raise ValueError(f"k {k} and temperature {temperature} must be positive")
    if len(targets_T) and not 0 <= int(targets_T.min()) <= int(targets_T.max()) < len(head_SE):
        raise ValueError(f"a target lies outside the shared vocabulary of {len(head_SE)}")
    size = chunk or teacher_chunk_rows(head_SE)
    parts = [
        _chunk(F.linear(hidden_CE, head_SE), targets_C, min(k, len(head_SE) - 1), temperature)
        for hidden_CE, targets_C in zip(hidden_TE.split(size), targets_T.split(size), strict=True)
    ]
    return concatenate(parts)


def _chunk(logits_CS: Tensor, targets_C: Tensor, k: int, temperature: float) -> TopK:
    shared, target_C1 = logits_CS.shape[1], targets_C.unsqueeze(-1)
    gate_C = gate_rows(logits_CS)
    rest = take_out(logits_CS.float(), target_C1, temperature, shared)
    scaled_CS = rest.scaled_BS.scatter(-1, target_C1, -torch.inf)
    scaled_CK, ids_CK = scaled_CS.topk(k)
    odds, residual, log_prob = [], [], []
    for tau, mass_CS in ((1.0, at_one(rest, temperature, target_C1)), (temperature, rest.mass_BS)):
        mass_C1 = mass_CS.sum(-1, keepdim=True)
        odds_C1 = rest.odds_B1(tau, mass_C1)
        log_unit_C1 = F.logsigmoid(-odds_C1) - positive(mass_C1).log()  # of a mass of 1
        log_prob.append(scaled_CK * (temperature / tau) + log_unit_C1)
        residual.append(mass_CS.scatter(-1, ids_CK, 0.0).sum(-1).log() + log_unit_C1.squeeze(-1))
        odds.append(odds_C1.squeeze(-1))
    at_one_CK, tempered_CK = log_prob
    # The same for all k, and taken from the likeliest; with no others it does not matter.
    shift_C = (tempered_CK - at_one_CK / temperature)[:, 0] if k else torch.zeros_like(odds[0])
    return TopK(
        gate_T=gate_C.float(), target_T2=F.logsigmoid(torch.stack(odds, -1)), residual_T2=torch.stack(residual, -1),
        ids_TK=ids_CK.int(), log_prob_TK=at_one_CK, shift_T=shift_C, temperature=temperature, vocabulary=shared,
    )  # fmt: skip
