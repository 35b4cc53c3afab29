"""Losses of many vocabulary rows and their gradient to the student's logits, in one go.

What `grace.distill.gdkd` defines with plain operations, with the gradient worked out by hand, for blocks
of logits that stay in a core's cache. Per supervised token with target y, temperature tau, student logits x
and teacher logits t, everything is taken over the *rest* (all tokens but y) and the target's log-odds o
(DESIGN section 4, arXiv:2601.22709):

    q = softmax(rest / tau),   b = sigmoid(o),   delta = b_S - b_T
    d DKD / dx_j = tau ((nckd - tckd delta) q_S(j) - nckd q_T(j)),    d DKD / dx_y = tau tckd delta
    d CE  / dx_j = softmax(x)_j,                                      d CE  / dx_y = -(1 - softmax(x)_y)

Plain KL at temperature tau is the same with tckd = 1 and nckd = 1 - b_T of each token (Zhao et al. 2022,
eq. 6). No probability is subtracted from 1: 1 - sigmoid(o) is sigmoid(-o).

Shape suffixes: C tokens of a chunk, B tokens of a block, V vocabulary, S the part of it that both models
share; a 1 marks a kept dimension.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from grace.distill.bernoulli import binary_kl, sigmoid_difference
from grace.distill.gate import PUBLISHED, GateShape
from grace.distill.row_parts import (
    FullRows,
    RowLosses,
    RowSettings,
    positive,
    rest_entropy,
    student_side,
    take_out,
    wide,
)
from grace.distill.rows_top_k import TopKRows

__all__ = ["RowLosses", "RowSettings", "TopKRows", "gate_rows", "loss_rows"]

# Elements of a block: rows enough for two threads, and few enough for the last-level cache (measured: 2**15 and
# 2**23 are a third slower).
_CPU_BLOCK = 2**20


def loss_rows(
    student_CV: Tensor,
    teacher: Tensor | TopKRows | None,
    targets_C: Tensor,
    gate_C: Tensor | None,
    settings: RowSettings,
    with_gradient: bool,
) -> RowLosses:
    """Losses of every row; overwrites `student_CV` with the gradient of sum(ce_scale CE + kd_scale gate KD).

    Args:
        student_CV: logits in any floating dtype; without `with_gradient` they are left as they are.
        teacher: logits [C, S] over the shared vocabulary, or what is known of its likeliest tokens; None is
            cross-entropy alone.
        gate_C: None takes exp(-H / log S) of the teacher's logits at temperature 1; all ones for plain KL.
    """
    parts = [
        _block(
            student_CV[rows],
            teacher.of(rows) if isinstance(teacher, TopKRows) else None if teacher is None else teacher[rows],
            targets_C[rows].unsqueeze(-1),
            None if gate_C is None else gate_C[rows].unsqueeze(-1),
            settings,
            with_gradient,
        )
        for rows in _blocks(student_CV)
    ]
    if not parts:
        empty_C = student_CV.new_zeros(0, dtype=wide(student_CV))
        return RowLosses(empty_C, empty_C, empty_C)
    ce_C1, kd_C1, gate_C1 = (torch.cat(column).squeeze(-1) for column in zip(*parts, strict=True))
    return RowLosses(ce_C1, kd_C1, gate_C1)


def gate_rows(teacher_CS: Tensor, shape: GateShape = PUBLISHED) -> Tensor:
    """Confidence gates of teacher logits [C], without a second copy of the logits."""
    vocabulary = teacher_CS.shape[-1]
    kept = shape.kept(vocabulary)
    gates = []
    for rows in _blocks(teacher_CS):
        block_BK = teacher_CS[rows]
        if kept < vocabulary:
            block_BK = block_BK.topk(kept, dim=-1).values
        gates.append(shape.of_entropy(_entropy(block_BK), vocabulary))
    return torch.cat(gates) if gates else teacher_CS.new_zeros(0, dtype=wide(teacher_CS))


def _blocks(logits_CV: Tensor) -> Iterator[slice]:
    tokens, size = logits_CV.shape
    step = max(1, _CPU_BLOCK // max(1, size)) if logits_CV.device.type == "cpu" else max(1, tokens)
    return (slice(start, start + step) for start in range(0, tokens, step))


def _entropy(teacher_BS: Tensor) -> Tensor:
    """Entropy of softmax(logits) [B]; sum p (log z - x) over the shifted logits x."""
    logits_BS = teacher_BS.to(wide(teacher_BS))
    shifted_BS = logits_BS - logits_BS.amax(-1, keepdim=True)
    mass_BS = shifted_BS.exp()
    total_B = mass_BS.sum(-1)
    return total_B.log() - torch.linalg.vecdot(mass_BS, shifted_BS) / total_B


def _block(
    student_BV: Tensor,
    teacher: Tensor | TopKRows | None,
    target_B1: Tensor,
    gate_B1: Tensor | None,
    settings: RowSettings,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(CE, KD, gate) [B, 1] of one block of rows; the gradient goes over `student_BV`."""
    student = student_side(student_BV, target_B1, settings)
    if teacher is None:
        if with_gradient:
            gradient_BS = student.at_one_BS.mul_(student.ce_factor_B1)
            student.write_gradient(student_BV, gradient_BS, target_B1, -student.wrong_B1)
        return student.ce_B1, torch.zeros_like(student.ce_B1), torch.ones_like(student.ce_B1)
    tau, tckd, nckd = settings.temperature, settings.tckd_weight, settings.nckd_weight
    rest = student.rest
    if isinstance(teacher, TopKRows):
        known: FullRows | TopKRows = teacher
    else:
        known = FullRows(
            take_out(teacher.to(rest.mass_BS.dtype, copy=True), target_B1, tau, settings.shared), tau
        )
        if gate_B1 is None:
            gate_B1 = PUBLISHED.of_entropy(rest_entropy(known.rest, tau, target_B1), settings.shared)
    assert gate_B1 is not None  # what is known of a teacher's likeliest tokens includes its gates
    gate_B1 = gate_B1.to(student.ce_B1.dtype)
    odds_B1, teacher_odds_B1 = rest.odds_B1(tau, rest.mass_B1), known.odds_B1
    nckd_B1 = torch.sigmoid(-teacher_odds_B1) if nckd is None else torch.full_like(student.ce_B1, nckd)
    kd_B1 = tau**2 * (tckd * binary_kl(teacher_odds_B1, odds_B1) + nckd_B1 * known.divergence_B1(rest))
    if with_gradient:
        delta_B1 = sigmoid_difference(odds_B1, teacher_odds_B1)
        factor_B1 = settings.kd_scale * tau * gate_B1
        gradient_BS = student.at_one_BS.mul_(student.ce_factor_B1)
        gradient_BS.addcmul_(rest.mass_BS, factor_B1 * (nckd_B1 - tckd * delta_B1) / positive(rest.mass_B1))
        known.subtract_(gradient_BS, rest, factor_B1 * nckd_B1)
        at_target_B1 = factor_B1 * tckd * delta_B1 - student.wrong_B1
        student.write_gradient(student_BV, gradient_BS, target_B1, at_target_B1)
    return student.ce_B1, kd_B1, gate_B1
