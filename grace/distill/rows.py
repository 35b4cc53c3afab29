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

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from grace.distill.bernoulli import binary_kl, sigmoid_difference

# Elements of a block: rows enough for two threads, and few enough for the last-level cache (measured: 2**15 and
# 2**23 are a third slower).
_CPU_BLOCK = 2**20


@dataclass(frozen=True)
class RowSettings:
    """Constants of the loss.

    Attributes:
        ce_scale, kd_scale: factors of the cross-entropy and of gate * KD in the gradient.
        nckd_weight: None is plain KL, see above.
        shared: vocabulary entries that both models have; CE uses all of the student's.
    """

    ce_scale: float
    kd_scale: float
    temperature: float
    tckd_weight: float
    nckd_weight: float | None
    shared: int


@dataclass(frozen=True)
class RowLosses:
    """Per token [C]: cross-entropy, KD loss (T^2 included, gate not) and gate, in float32 or wider."""

    ce_C: Tensor
    kd_C: Tensor
    gate_C: Tensor


def loss_rows(
    student_CV: Tensor,
    teacher_CS: Tensor | None,
    targets_C: Tensor,
    gate_C: Tensor | None,
    settings: RowSettings,
    with_gradient: bool,
) -> RowLosses:
    """Losses of every row; overwrites `student_CV` with the gradient of sum(ce_scale CE + kd_scale gate KD).

    Args:
        student_CV: logits in any floating dtype; without `with_gradient` they are left as they are.
        teacher_CS: logits over the shared vocabulary; None is cross-entropy alone.
        gate_C: None takes exp(-H / log S) of the teacher at temperature 1; all ones for plain KL.
    """
    parts = [
        _block(
            student_CV[rows],
            None if teacher_CS is None else teacher_CS[rows],
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


def gate_rows(teacher_CS: Tensor) -> Tensor:
    """Confidence gates exp(-H / log S) of teacher logits [C], without a second copy of the logits."""
    gates = [torch.exp(-_entropy(teacher_CS[rows]) / log_size(teacher_CS)) for rows in _blocks(teacher_CS)]
    return torch.cat(gates) if gates else teacher_CS.new_zeros(0, dtype=wide(teacher_CS))


def wide(logits: Tensor) -> torch.dtype:
    """The dtype that sums and exponentials are taken in."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _blocks(logits_CV: Tensor) -> Iterator[slice]:
    tokens, size = logits_CV.shape
    step = max(1, _CPU_BLOCK // max(1, size)) if logits_CV.device.type == "cpu" else max(1, tokens)
    return (slice(start, start + step) for start in range(0, tokens, step))


def log_size(logits_CS: Tensor) -> float:
    return math.log(max(2, logits_CS.shape[-1]))


def _entropy(teacher_BS: Tensor) -> Tensor:
    """Entropy of softmax(logits) [B]; sum p (log z - x) over the shifted logits x."""
    logits_BS = teacher_BS.to(wide(teacher_BS))
    shifted_BS = logits_BS - logits_BS.amax(-1, keepdim=True)
    mass_BS = shifted_BS.exp()
    total_B = mass_BS.sum(-1)
    return total_B.log() - torch.linalg.vecdot(mass_BS, shifted_BS) / total_B


@dataclass(frozen=True)
class _Rest:
    """A model's rows with the target taken out.

    Attributes:
        scaled_BS: (logits - top) / temperature; 0 at the target.
        mass_BS, mass_B1: exp(scaled), 0 at the target, and its sum.
        top_B1: largest logit of the rest (0 where there is no rest).
        target_B1: logit of the target.
    """

    scaled_BS: Tensor
    mass_BS: Tensor
    mass_B1: Tensor
    top_B1: Tensor
    target_B1: Tensor

    def odds_B1(self, temperature: float, mass_B1: Tensor) -> Tensor:
        """Log-odds of the target against a rest of this mass."""
        return (self.target_B1 - self.top_B1) / temperature - mass_B1.log()


def _rest(logits_BV: Tensor, target_B1: Tensor, temperature: float, shared: int) -> _Rest:
    """Consumes `logits_BV`; what lies past `shared` is left as logits - top."""
    own_B1 = logits_BV.gather(-1, target_B1)
    logits_BV.scatter_(-1, target_B1, -torch.inf)
    top_B1 = logits_BV.amax(-1, keepdim=True)
    top_B1.masked_fill_(top_B1 == -torch.inf, 0.0)  # a vocabulary of one token has no rest
    logits_BV.sub_(top_B1)
    scaled_BS = logits_BV[:, :shared].div_(temperature)
    mass_BS = scaled_BS.exp()
    scaled_BS.scatter_(-1, target_B1, 0.0)
    return _Rest(scaled_BS, mass_BS, mass_BS.sum(-1, keepdim=True), top_B1, own_B1)


def _at_one(rest: _Rest, temperature: float, target_B1: Tensor) -> Tensor:
    """Masses of the rest at temperature 1, 0 at the target; a buffer of its own."""
    if temperature == 2.0:
        return rest.mass_BS.square()
    return (rest.scaled_BS * temperature).exp_().scatter_(-1, target_B1, 0.0)


def _block(
    student_BV: Tensor,
    teacher_BS: Tensor | None,
    target_B1: Tensor,
    gate_B1: Tensor | None,
    settings: RowSettings,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(CE, KD, gate) [B, 1] of one block of rows; the gradient goes over `student_BV`."""
    shared, tau = settings.shared, settings.temperature
    work_BV = student_BV.to(wide(student_BV), copy=True)
    student = _rest(work_BV, target_B1, tau, shared)
    at_one_BS = _at_one(student, tau, target_B1)
    beyond_BR = work_BV[:, shared:].exp_()  # entries that the teacher lacks: cross-entropy alone
    mass_B1 = at_one_BS.sum(-1, keepdim=True) + beyond_BR.sum(-1, keepdim=True)
    odds_B1 = student.odds_B1(1.0, mass_B1)
    ce_B1 = -F.logsigmoid(odds_B1)
    wrong_B1 = settings.ce_scale * torch.sigmoid(-odds_B1)
    # d CE / d rest is the mass times this; d CE / d target is -wrong
    ce_factor_B1 = wrong_B1 / _positive(mass_B1)
    if teacher_BS is None:
        if with_gradient:
            student_BV[:, :shared] = at_one_BS.mul_(ce_factor_B1).scatter_(-1, target_B1, -wrong_B1)
            student_BV[:, shared:] = beyond_BR.mul_(ce_factor_B1)
        return ce_B1, torch.zeros_like(ce_B1), torch.ones_like(ce_B1)
    teacher = _rest(teacher_BS.to(wide(student_BV), copy=True), target_B1, tau, shared)
    if gate_B1 is None:
        gate_B1 = torch.exp(-_rest_entropy(teacher, tau, target_B1) / log_size(teacher_BS))
    gate_B1 = gate_B1.to(ce_B1.dtype)
    student_odds_B1, teacher_odds_B1 = (rest.odds_B1(tau, rest.mass_B1) for rest in (student, teacher))
    tckd, nckd = settings.tckd_weight, settings.nckd_weight
    nckd_B1 = torch.sigmoid(-teacher_odds_B1) if nckd is None else torch.full_like(ce_B1, nckd)
    kd_B1 = tau**2 * (tckd * binary_kl(teacher_odds_B1, student_odds_B1) + nckd_B1 * _nckd(teacher, student))
    if with_gradient:
        delta_B1 = sigmoid_difference(student_odds_B1, teacher_odds_B1)
        kd_factor_B1 = settings.kd_scale * tau * gate_B1
        gradient_BS = at_one_BS.mul_(ce_factor_B1)
        gradient_BS.addcmul_(
            student.mass_BS, kd_factor_B1 * (nckd_B1 - tckd * delta_B1) / _positive(student.mass_B1)
        )
        gradient_BS.addcmul_(teacher.mass_BS, -kd_factor_B1 * nckd_B1 / _positive(teacher.mass_B1))
        gradient_BS.scatter_(-1, target_B1, kd_factor_B1 * tckd * delta_B1 - wrong_B1)
        student_BV[:, :shared] = gradient_BS
        student_BV[:, shared:] = beyond_BR.mul_(ce_factor_B1)
    return ce_B1, kd_B1, gate_B1


def _nckd(teacher: _Rest, student: _Rest) -> Tensor:
    """KL between the two rests, each renormalised [B, 1]; consumes `teacher.scaled_BS`."""
    # Differences of the shifted logits first: two large normalisers would swamp them.
    step_BS = teacher.scaled_BS.sub_(student.scaled_BS)
    step_BS.add_((student.mass_B1 / _positive(teacher.mass_B1)).clamp_min(_tiny(teacher.mass_B1)).log())
    return torch.linalg.vecdot(teacher.mass_BS, step_BS).unsqueeze(-1) / _positive(teacher.mass_B1)


def _rest_entropy(teacher: _Rest, temperature: float, target_B1: Tensor) -> Tensor:
    """Entropy at temperature 1 of the whole row [B, 1]: of "the target or not", plus that of the rest."""
    mass_BS = _at_one(teacher, temperature, target_B1)
    mass_B1 = mass_BS.sum(-1, keepdim=True)
    odds_B1 = teacher.odds_B1(1.0, mass_B1)
    mean_B1 = torch.linalg.vecdot(mass_BS, teacher.scaled_BS).unsqueeze(-1) * temperature / _positive(mass_B1)
    log_mass_B1 = mass_B1.clamp_min(_tiny(mass_B1)).log()
    yes_B1, no_B1 = torch.sigmoid(odds_B1), torch.sigmoid(-odds_B1)
    # p log p -> 0 as p -> 0, also where log p is -inf: a rest of nothing
    no_log_no_B1 = torch.where(no_B1 > 0, no_B1 * F.logsigmoid(-odds_B1), 0.0)
    between_B1 = -yes_B1 * F.logsigmoid(odds_B1) - no_log_no_B1
    return between_B1 + no_B1 * (log_mass_B1 - mean_B1)


def _positive(mass_B1: Tensor) -> Tensor:
    """A divisor: an empty rest has mass 0, and every numerator 0 with it."""
    return mass_B1.clamp_min(_tiny(mass_B1))


def _tiny(mass_B1: Tensor) -> float:
    return torch.finfo(mass_B1.dtype).tiny
