"""One micro-batch's share of the training loss, with the normalisers of the whole optimizer step.

    L_total = L_CE + beta L_KD + omega L_RCKA                           DESIGN section 4, arXiv:2601.22709
            = sum CE_i / N + beta sum g_i DKD_i / G + omega sum RCKA_j / I

N supervised tokens, G sum of gates and I images with a usable teacher Gram are counted over every
micro-batch and rank beforehand, so that adding up micro-batches gives the loss of the step exactly.

Shape suffixes: T supervised tokens of the micro-batch, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from grace.distill.gdkd import confidence_gate, dkd_per_token, kl_per_token
from grace.distill.rcka import rcka_per_image

Kind = Literal["none", "kl", "gdkd"]


@dataclass(frozen=True)
class LossParts:
    """Unnormalised sums of a micro-batch: detached 0-d tensors, to be added up over the step.

    Attributes:
        ce_sum: cross-entropy summed over tokens, in nats.
        kd_sum: KL ("kl") or gated DKD ("gdkd") summed over tokens; before beta.
        rcka_sum: 1 - CKA summed over images; before omega.
        gate_sum: gates summed over tokens; 0 unless "gdkd".
        images: images compared.
        degenerate: images left out because either Gram is degenerate.
    """

    ce_sum: Tensor
    kd_sum: Tensor
    rcka_sum: Tensor
    gate_sum: Tensor
    images: Tensor
    degenerate: Tensor


def micro_batch_loss(
    student_logits_TV: Tensor,
    targets_T: Tensor,
    *,
    token_count: float,
    teacher_logits_TV: Tensor | None = None,
    gate_T: Tensor | None = None,
    gate_sum: float | None = None,
    beta: float = 0.0,
    kind: str = "none",
    temperature: float = 2.0,
    tckd_weight: float = 1.0,
    nckd_weight: float = 4.0,
    student_visual: Sequence[Tensor] = (),
    teacher_visual: Sequence[Tensor] = (),
    image_count: float = 1.0,
    omega: float = 0.0,
) -> tuple[Tensor, LossParts]:
    """ce_sum / token_count + beta kd_sum / G + omega rcka_sum / image_count, and the sums.

    G is `gate_sum` for "gdkd" and `token_count` for "kl". An empty micro-batch gives 0 with a graph.

    Args:
        student_logits_TV: logits of the supervised positions only; computed in float32.
        targets_T: int64 targets, no ignore index.
        token_count: supervised tokens of the whole step.
        teacher_logits_TV: where the two vocabularies are padded differently, KD compares the first
            entries, which both have; CE always uses all of the student's.
        gate_T: confidence gates; taken from the teacher's logits when absent.
        gate_sum: gates summed over the whole step.
        image_count: images of the whole step whose teacher Gram is usable. An image that only the
            student's Gram makes degenerate adds 0 to the sum and stays in this count.

    Raises:
        ValueError: an unknown `kind`, an ingredient that `kind` needs is missing, a normaliser is not
            positive, or shapes do not fit.
    """
    if kind not in ("none", "kl", "gdkd"):
        raise ValueError(f'kind must be "none", "kl" or "gdkd", got {kind!r}')
    _require_positive(token_count, "token_count")
    logits_TV = student_logits_TV if student_logits_TV.dtype == torch.float64 else student_logits_TV.float()
    zero = logits_TV.new_zeros(())
    ce_sum = _cross_entropy_sum(logits_TV, targets_T)
    total = ce_sum / token_count
    kd_sum = gates = rcka_sum = degenerate = zero
    if kind == "kl":
        student_TV, teacher_TV = _shared_vocabulary(logits_TV, teacher_logits_TV, kind)
        kd_sum = kl_per_token(student_TV, teacher_TV, temperature).sum()
        total = total + beta * kd_sum / token_count
    elif kind == "gdkd":
        student_TV, teacher_TV = _shared_vocabulary(logits_TV, teacher_logits_TV, kind)
        gate_sum = _require_positive(gate_sum, "gate_sum")
        gate_T = (confidence_gate(teacher_TV) if gate_T is None else gate_T).detach()
        if gate_T.shape != targets_T.shape:
            raise ValueError(f"gates {tuple(gate_T.shape)} do not fit targets {tuple(targets_T.shape)}")
        dkd_T = dkd_per_token(student_TV, teacher_TV, targets_T, temperature, tckd_weight, nckd_weight)
        kd_sum, gates = (gate_T * dkd_T).sum(), gate_T.sum()
        total = total + beta * kd_sum / gate_sum
    if student_visual or teacher_visual:
        loss_N, valid_N = rcka_per_image(student_visual, teacher_visual)
        rcka_sum, degenerate = loss_N.sum(), (~valid_N).sum()
        total = total + omega * rcka_sum / _require_positive(image_count, "image_count")
    images = zero + float(len(student_visual))
    parts = (ce_sum, kd_sum, rcka_sum, gates, images, degenerate)
    return total, LossParts(*(part.detach() for part in parts))


def _cross_entropy_sum(logits_TV: Tensor, targets_T: Tensor) -> Tensor:
    """Sum over tokens of -log P_S(target), in nats; 0 with a graph for no tokens."""
    if targets_T.shape != logits_TV.shape[:1]:
        raise ValueError(f"targets {tuple(targets_T.shape)} do not fit logits {tuple(logits_TV.shape)}")
    if not len(targets_T):
        return logits_TV.sum()
    return F.cross_entropy(logits_TV, targets_T, reduction="sum")


def _shared_vocabulary(student_TV: Tensor, teacher_TV: Tensor | None, kind: Kind) -> tuple[Tensor, Tensor]:
    if teacher_TV is None:
        raise ValueError(f'kind "{kind}" needs teacher_logits_TV')
    shared = min(student_TV.shape[-1], teacher_TV.shape[-1])
    return student_TV[..., :shared], teacher_TV.detach()[..., :shared]


def _require_positive(count: float | None, name: str) -> float:
    if count is None or not count > 0:
        raise ValueError(f"{name} must be positive, got {count}: count it over the whole optimizer step")
    return count
