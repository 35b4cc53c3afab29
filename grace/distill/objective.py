"""One micro-batch's share of the training loss, with the normalisers of the whole optimizer step.

    L_total = L_CE + beta L_KD + omega L_RCKA                           DESIGN section 4, arXiv:2601.22709
            = sum CE_i / N + beta sum g_i DKD_i / G + omega sum RCKA_j / I

N supervised tokens, G sum of gates and I images with a usable teacher Gram are counted over every
micro-batch and rank beforehand, so that adding up micro-batches gives the loss of the step exactly.

Shape suffixes: T supervised tokens of the micro-batch, D / E student / teacher width, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from grace.distill.fused import RowKernel, fused_ce_gdkd
from grace.distill.rcka import rcka_per_image, rcka_to_grams
from grace.distill.rows import loss_rows
from grace.distill.top_k import TopK

Kind = Literal["none", "kl", "gkl", "gdkd"]
GATED = ("gkl", "gdkd")


@dataclass(frozen=True)
class LossParts:
    """Unnormalised sums of a micro-batch: detached 0-d tensors, to be added up over the step.

    Attributes:
        ce_sum: cross-entropy summed over tokens, in nats.
        kd_sum: KL ("kl"), gated KL ("gkl") or gated DKD ("gdkd") summed over tokens; before beta.
        rcka_sum: 1 - CKA summed over images; before omega.
        gate_sum: gates summed over tokens; 0 unless "gkl" or "gdkd".
        images: images compared.
        degenerate: images left out because either Gram is degenerate.
        relation_N: 1 - CKA of each image, 0 where degenerate.
        compared_N: which images are not degenerate.
    """

    ce_sum: Tensor
    kd_sum: Tensor
    rcka_sum: Tensor
    gate_sum: Tensor
    images: Tensor
    degenerate: Tensor
    relation_N: Tensor
    compared_N: Tensor


def micro_batch_loss(
    student_hidden_TD: Tensor,
    student_head_VD: Tensor,
    targets_T: Tensor,
    *,
    token_count: float,
    teacher_hidden_TE: Tensor | None = None,
    teacher_head_VE: Tensor | None = None,
    gate_T: Tensor | None = None,
    gate_sum: float | None = None,
    beta: float = 0.0,
    kind: str = "none",
    temperature: float = 2.0,
    tckd_weight: float = 1.0,
    nckd_weight: float = 4.0,
    student_visual: Sequence[Tensor] = (),
    teacher_visual: Sequence[Tensor] = (),
    teacher_top_k: TopK | None = None,
    teacher_grams: Sequence[Tensor] = (),
    image_count: float = 1.0,
    omega: float = 0.0,
    row_kernel: RowKernel = loss_rows,
) -> tuple[Tensor, LossParts]:
    """ce_sum / token_count + beta kd_sum / G + omega rcka_sum / image_count, and the sums.

    G is `gate_sum` for "gkl" and "gdkd" and `token_count` for "kl". An empty micro-batch gives 0 with a graph.

    Args:
        student_hidden_TD, teacher_hidden_TE: final hidden states at the supervised positions only.
        student_head_VD, teacher_head_VE: output embeddings. Where the two vocabularies are padded differently,
            KD compares the first entries, which both have; CE always uses all of the student's.
        targets_T: int64 targets, no ignore index.
        token_count: supervised tokens of the whole step.
        gate_T: confidence gates; taken from the teacher's logits when absent.
        gate_sum: gates summed over the whole step.
        teacher_top_k, teacher_grams: what a cached teacher knows, in place of its hidden states and head and of
            its visual tokens.
        image_count: images of the whole step whose teacher Gram is usable. An image that only the
            student's Gram makes degenerate adds 0 to the sum and stays in this count.
        row_kernel: as in `fused_ce_gdkd`.

    Raises:
        ValueError: an unknown `kind`, an ingredient that `kind` needs is missing, a normaliser is not
            positive, or shapes do not fit.
    """
    _require_kind(kind, gate_T)
    token_count = _require_positive(token_count, "token_count")
    if kind == "none":
        teacher_hidden_TE = teacher_head_VE = teacher_top_k = gate_T = None
    elif teacher_top_k is None and (teacher_hidden_TE is None or teacher_head_VE is None):
        raise ValueError(f'kind "{kind}" needs teacher_hidden_TE and teacher_head_VE, or teacher_top_k')
    kd_count = _require_positive(gate_sum, "gate_sum") if kind in GATED else token_count
    plain = kind != "gdkd"  # KL
    total, fused = fused_ce_gdkd(
        student_hidden_TD, student_head_VD, teacher_hidden_TE, teacher_head_VE, targets_T,
        ce_scale=1 / token_count, gdkd_scale=beta / kd_count, temperature=temperature,
        tckd_weight=1.0 if plain else tckd_weight, nckd_weight=None if plain else nckd_weight,
        gates_T=gate_T if kind in GATED else None, teacher_top_k=teacher_top_k, row_kernel=row_kernel,
    )  # fmt: skip
    zero = fused.ce_sum.new_zeros(())
    rcka_sum = degenerate = zero
    loss_N = valid_N = zero.new_zeros(0)
    if student_visual or teacher_visual or teacher_grams:
        compare, teacher = (
            (rcka_to_grams, teacher_grams) if teacher_grams else (rcka_per_image, teacher_visual)
        )
        loss_N, valid_N = compare(student_visual, teacher)
        rcka_sum, degenerate = loss_N.sum(), (~valid_N).sum()
        total = total + omega * rcka_sum / _require_positive(image_count, "image_count")
    gates = fused.gate_sum if kind in GATED else zero
    parts = (
        fused.ce_sum,
        fused.gdkd_sum,
        rcka_sum,
        gates,
        zero + float(len(student_visual)),
        degenerate,
        loss_N,
        valid_N,
    )
    return total, LossParts(*(part.detach() for part in parts))


def _require_kind(kind: str, gate_T: Tensor | None) -> None:
    if kind not in get_args(Kind):
        raise ValueError(f'kind must be "none", "kl", "gkl" or "gdkd", got {kind!r}')
    if kind == "gkl" and gate_T is None:
        raise ValueError('kind "gkl" needs gate_T: the gates of the teacher')


def _require_positive(count: float | None, name: str) -> float:
    if count is None or not count > 0:
        raise ValueError(f"{name} must be positive, got {count}: count it over the whole optimizer step")
    return count
