"""Cross-entropy and gated distillation straight from hidden states: no tensor of tokens x vocabulary.

    total = ce_scale sum CE_i + kd_scale sum g_i DKD_i                  DESIGN sections 4 and 5

Tokens go through both heads chunk by chunk. While a chunk's logits are there, its losses *and* their gradient
are taken (`grace.distill.rows`), the gradient overwrites the logits and goes straight on to the hidden
states and the head. What is kept from forward to backward is those two gradients; the backward pass only
scales them. Matrix products: one with each head, and two for the gradients, which is the least there is.

A head gradient in a 16-bit dtype is summed in that dtype, chunk by chunk; one in float32 in float32.

Shape suffixes: T supervised tokens, C tokens of a chunk, D / E student / teacher width, V student
vocabulary, S the part of it that both models share.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from grace.distill import rows
from grace.distill.fused_check import check_inputs, check_targets, check_top_k
from grace.distill.gate import PUBLISHED, GateShape
from grace.distill.rows import RowLosses, RowSettings, TopKRows
from grace.distill.top_k import TopK

# Bytes of a chunk's student logits. The teacher's exist for a quarter of the chunk at a time: a larger chunk
# makes the two gradient products cheaper, which read and write the whole head each time.
CHUNK_BYTES = {"cpu": 64 * 2**20, "cuda": 512 * 2**20}
_TEACHER_SHARE = 4
# Vocabulary entries at a time where a 16-bit product is added to a wider gradient.
_HEAD_TILE = 16384

# Final hidden states and head, or what is known of the rows.
Teacher = tuple[Tensor, Tensor] | TopKRows | None
RowKernel = Callable[[Tensor, Tensor | TopKRows | None, Tensor, Tensor | None, RowSettings, bool], RowLosses]


@dataclass(frozen=True)
class FusedParts:
    """What the loss was made of: detached 0-d tensors, also by name (`parts["ce_sum"]`).

    Attributes:
        ce_sum: cross-entropy, summed over tokens.
        gdkd_sum: gate * DKD (or KL), summed over tokens.
        gate_sum, gate_square_sum: of the gates.
        gate_min, gate_max: of the gates; 1 for no tokens.
        tokens: their number.
    """

    ce_sum: Tensor
    gdkd_sum: Tensor
    gate_sum: Tensor
    gate_square_sum: Tensor
    gate_min: Tensor
    gate_max: Tensor
    tokens: Tensor

    def __getitem__(self, name: str) -> Tensor:
        return getattr(self, name)


def fused_ce_gdkd(
    student_hidden_TD: Tensor,
    student_head_VD: Tensor,
    teacher_hidden_TE: Tensor | None,
    teacher_head_VE: Tensor | None,
    targets_T: Tensor,
    *,
    ce_scale: float,
    gdkd_scale: float,
    temperature: float = 2.0,
    tckd_weight: float = 1.0,
    nckd_weight: float | None = 4.0,
    gates_T: Tensor | None = None,
    teacher_top_k: TopK | None = None,
    chunk: int | None = None,
    row_kernel: RowKernel = rows.loss_rows,
) -> tuple[Tensor, FusedParts]:
    """ce_scale sum(CE) + gdkd_scale sum(gate DKD) of the supervised tokens, and its parts.

    Differentiable to the student's hidden states and head, each in its own dtype. Products run in the dtype of the
    student's hidden states, or in that of an enclosing autocast.

    Args:
        student_head_VD, teacher_head_VE: output embeddings; padded to different sizes, DKD compares the
            entries that both have, and CE uses all of the student's.
        teacher_hidden_TE: None (with `teacher_head_VE`) is cross-entropy alone.
        targets_T: int64 targets, no ignore index.
        nckd_weight: None is plain KL(teacher || student) at the temperature in place of DKD, ungated.
        gates_T: confidence gates; None takes them from the teacher's logits (`teacher_gates`), or those of
            `teacher_top_k`.
        teacher_top_k: what a cached teacher knows, in place of its hidden states and head: NCKD is then taken over
            its likeliest tokens and one residual (`grace.distill.rows_top_k`), and the temperature must be its own.
        chunk: tokens at a time; None takes what fits `CHUNK_BYTES`.
        row_kernel: computes a chunk's losses and gradient.

    Raises:
        ValueError: shapes do not fit together, targets lie outside the shared vocabulary, or the
            temperature or chunk is not positive.
    """
    check_inputs(
        student_hidden_TD,
        student_head_VD,
        teacher_hidden_TE,
        teacher_head_VE,
        targets_T,
        gates_T,
        teacher_top_k,
    )
    if not temperature > 0 or (chunk is not None and chunk < 1):
        raise ValueError(f"temperature {temperature} and chunk {chunk} must be positive")
    shared = student_head_VD.shape[0]
    teacher: Teacher = None
    if teacher_hidden_TE is not None and teacher_head_VE is not None:
        teacher = (teacher_hidden_TE, teacher_head_VE)
        shared = min(shared, teacher_head_VE.shape[0])
    elif teacher_top_k is not None:
        check_top_k(teacher_top_k, len(targets_T), shared, temperature)
        teacher, shared = teacher_top_k.rows(), teacher_top_k.vocabulary
        gates_T = teacher_top_k.gate_T if gates_T is None and nckd_weight is not None else gates_T
    check_targets(targets_T, shared)
    settings = RowSettings(float(ce_scale), float(gdkd_scale), temperature, tckd_weight, nckd_weight, shared)
    if nckd_weight is None and gates_T is None:
        gates_T = torch.ones(len(targets_T), device=targets_T.device)
    result: Any = _FusedLoss.apply(
        student_hidden_TD, student_head_VD, teacher, targets_T, gates_T, settings, chunk, row_kernel
    )
    total, sums, extremes = result
    tokens = torch.full_like(sums[0], len(targets_T))
    return total, FusedParts(sums[0], sums[1], sums[2], sums[3], extremes[0], extremes[1], tokens)


@torch.no_grad()
def teacher_gates(
    teacher_hidden_TE: Tensor,
    teacher_head_VE: Tensor,
    *,
    shared: int | None = None,
    shape: GateShape = PUBLISHED,
    chunk: int | None = None,
) -> Tensor:
    """Confidence gates (`grace.distill.gate`) of every token [T], float32: what a step needs before its student runs.

    Args:
        shared: vocabulary entries that the student has too; None is all.
        chunk: tokens at a time; None takes what fits `CHUNK_BYTES`.

    Raises:
        ValueError: shapes do not fit together.
    """
    if teacher_hidden_TE.ndim != 2 or teacher_hidden_TE.shape[1:] != teacher_head_VE.shape[1:]:
        raise ValueError(
            f"teacher hidden states {tuple(teacher_hidden_TE.shape)} do not fit head {tuple(teacher_head_VE.shape)}"
        )
    head_SE = teacher_head_VE[:shared].to(teacher_hidden_TE.dtype)
    size = chunk or teacher_chunk_rows(head_SE)
    gates = [rows.gate_rows(F.linear(part_CE, head_SE), shape) for part_CE in teacher_hidden_TE.split(size)]
    return torch.cat(gates)


def chunk_rows(head_VD: Tensor) -> int:
    """Tokens whose logits fill `CHUNK_BYTES`."""
    budget = CHUNK_BYTES.get(head_VD.device.type, CHUNK_BYTES["cuda"])
    return max(1, budget // max(1, head_VD.shape[0] * head_VD.element_size()))


def teacher_chunk_rows(head_SE: Tensor) -> int:
    """Tokens of a teacher alone at a time."""
    return max(1, chunk_rows(head_SE) // _TEACHER_SHARE)


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        head_VD: Tensor,
        teacher: Teacher,
        targets_T: Tensor,
        gates_T: Tensor | None,
        settings: RowSettings,
        chunk: int | None,
        row_kernel: RowKernel,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype, device = hidden_TD.dtype, hidden_TD.device.type
        if torch.is_autocast_enabled(device) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device)
        grad_TD = torch.empty_like(hidden_TD) if ctx.needs_input_grad[0] else None
        grad_VD = torch.zeros_like(head_VD) if ctx.needs_input_grad[1] else None
        with torch.autocast(device, enabled=False):
            student = (hidden_TD.to(dtype), head_VD.to(dtype))
            size = chunk or chunk_rows(student[1])
            losses = _chunks(
                student, teacher, targets_T, gates_T, settings, size, row_kernel, grad_TD, grad_VD
            )
        ctx.grads = (grad_TD, grad_VD)
        ce_T, kd_T, gate_T = losses.ce_C, losses.kd_C, losses.gate_C
        weighted_T = gate_T * kd_T
        total = settings.ce_scale * ce_T.sum() + settings.kd_scale * weighted_T.sum()
        sums = torch.stack([ce_T.sum(), weighted_T.sum(), gate_T.sum(), gate_T.square().sum()])
        extremes = torch.stack([gate_T.amin(), gate_T.amax()]) if len(gate_T) else torch.ones_like(sums[:2])
        ctx.mark_non_differentiable(sums, extremes)
        return total, sums, extremes

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, *_: Any) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if ctx.grads is None:
            raise RuntimeError("fused_ce_gdkd hands its gradients out once: run the forward pass again")
        grads, ctx.grads = ctx.grads, None
        # On a GPU reading the factor would wait for the device; there a pass over the gradients is cheap.
        is_one = grad_total.device.type == "cpu" and grad_total.item() == 1.0
        scaled = [grad if grad is None or is_one else grad.mul_(grad_total.to(grad.dtype)) for grad in grads]
        return (*scaled, None, None, None, None, None, None)


def _chunks(
    student: tuple[Tensor, Tensor],
    teacher: Teacher,
    targets_T: Tensor,
    gates_T: Tensor | None,
    settings: RowSettings,
    size: int,
    row_kernel: RowKernel,
    grad_TD: Tensor | None,
    grad_VD: Tensor | None,
) -> RowLosses:
    """Losses of every token; fills `grad_TD` with and adds to `grad_VD` the gradients of the total."""
    (hidden_TD, head_VD), tokens = student, len(targets_T)
    # Logit gradients are kept near 1, whatever the scales: 16-bit floats would lose small ones.
    unit = max(abs(settings.ce_scale), abs(settings.kd_scale)) or 1.0
    scaled = replace(settings, ce_scale=settings.ce_scale / unit, kd_scale=settings.kd_scale / unit)
    wants = grad_TD is not None or grad_VD is not None
    logits_CV = head_VD.new_empty(min(size, tokens), len(head_VD))
    parts: list[RowLosses] = []
    for start in range(0, tokens, size):
        chunk_CD = hidden_TD[start : start + size]
        chunk_CV = logits_CV[: len(chunk_CD)]
        torch.mm(chunk_CD, head_VD.T, out=chunk_CV)
        step = max(1, size // _TEACHER_SHARE)
        for first in range(0, len(chunk_CD), step):
            part_CV = chunk_CV[first : first + step]
            at = slice(start + first, start + first + len(part_CV))
            known = _teacher_rows(teacher, at, settings.shared)
            gates = None if gates_T is None else gates_T[at]
            parts.append(row_kernel(part_CV, known, targets_T[at], gates, scaled, wants))
        if grad_TD is not None:
            grad_TD[start : start + size] = torch.mm(chunk_CV, head_VD).mul_(unit)
        if grad_VD is not None:
            _add_head_gradient(grad_VD, chunk_CV, chunk_CD, unit)
    if not parts:
        empty = hidden_TD.new_zeros(0, dtype=rows.wide(hidden_TD))
        return RowLosses(empty, empty, empty)
    columns = [[getattr(part, name) for part in parts] for name in ("ce_C", "kd_C", "gate_C")]
    return RowLosses(*(torch.cat(column) for column in columns))


def _teacher_rows(teacher: Teacher, at: slice, shared: int) -> Tensor | TopKRows | None:
    """The teacher's side of some tokens: logits [C, S] in its own dtype, or what is known of them."""
    if teacher is None:
        return None
    if isinstance(teacher, TopKRows):
        return teacher.of(at)
    hidden_TE, head_VE = teacher
    return F.linear(hidden_TE[at], head_VE[:shared].to(hidden_TE.dtype))


def _add_head_gradient(grad_VD: Tensor, logit_grad_CV: Tensor, hidden_CD: Tensor, unit: float) -> None:
    """grad += unit * logit_grad^T hidden, without a product of the gradient's size in a wider dtype."""
    if grad_VD.dtype == logit_grad_CV.dtype:
        grad_VD.addmm_(logit_grad_CV.T, hidden_CD, alpha=unit)
        return
    for start in range(0, len(grad_VD), _HEAD_TILE):
        tile = slice(start, start + _HEAD_TILE)
        grad_VD[tile].add_(logit_grad_CV[:, tile].T @ hidden_CD, alpha=unit)
