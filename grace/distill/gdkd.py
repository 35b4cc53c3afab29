"""Confidence-gated decoupled knowledge distillation.

DESIGN section 4 (arXiv:2601.22709); the decoupling is that of Zhao et al. 2022, "Decoupled Knowledge
Distillation". Per supervised token with target y, at temperature T:

    TCKD = KL([P_T(y), 1 - P_T(y)] || [P_S(y), 1 - P_S(y)])
    NCKD = KL(P_T renormalised without y || P_S renormalised without y)
    DKD  = T^2 (alpha TCKD + beta_dkd NCKD)
    g    = exp(-H(P_T) / log V)                             P_T at temperature 1, natural logs
    L_GDKD = sum_i g_i DKD_i / sum_i g_i

No probability is ever subtracted from 1: with the target's log-odds d = x_y / T - logsumexp(x_rest / T),
log P(y) = logsigmoid(d) and log(1 - P(y)) = logsigmoid(-d), which is logsumexp over the non-targets
minus logsumexp over all without its cancellation.

Logits are computed in float32 (float64 stays). The teacher gets no gradient. A logit of -inf that
both models share is a token outside the vocabulary and counts for nothing.

Shape suffixes: T supervised tokens, V vocabulary; a 1 marks a kept dimension.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from grace.distill.bernoulli import binary_kl, expectation
from grace.distill.fused import fused_ce_gdkd, teacher_gates
from grace.distill.gate import PUBLISHED, GateShape

__all__ = [
    "confidence_gate",
    "dkd_per_token",
    "fused_ce_gdkd",
    "gated_dkd",
    "kl_per_token",
    "teacher_gates",
]


def dkd_per_token(
    student_TV: Tensor,
    teacher_TV: Tensor,
    targets_T: Tensor,
    temperature: float = 2.0,
    tckd_weight: float = 1.0,
    nckd_weight: float = 4.0,
) -> Tensor:
    """T^2 (tckd_weight TCKD + nckd_weight NCKD) of every token, in nats [T] (Zhao et al. 2022, eq. 7).

    Args:
        student_TV, teacher_TV: logits over the same vocabulary.
        targets_T: int64 targets in [0, V); no ignore index.

    Raises:
        ValueError: shapes do not fit together, or the temperature is not positive.
    """
    _check_pair(student_TV, teacher_TV, temperature)
    _check_targets(student_TV, targets_T)
    student_odds_T, student_rest_TV = _decouple(_full_precision(student_TV), targets_T, temperature)
    with torch.no_grad():
        teacher_odds_T, teacher_rest_TV = _decouple(_full_precision(teacher_TV), targets_T, temperature)
    tckd_T = binary_kl(teacher_odds_T, student_odds_T)
    nckd_T = _kl(teacher_rest_TV, student_rest_TV)
    return temperature**2 * (tckd_weight * tckd_T + nckd_weight * nckd_T)


def kl_per_token(student_TV: Tensor, teacher_TV: Tensor, temperature: float = 2.0) -> Tensor:
    """T^2 KL(P_T || P_S) of every token, in nats [T] (Hinton et al. 2015).

    Raises:
        ValueError: shapes do not fit together, or the temperature is not positive.
    """
    _check_pair(student_TV, teacher_TV, temperature)
    student_log_TV = F.log_softmax(_full_precision(student_TV) / temperature, dim=-1)
    teacher_log_TV = F.log_softmax(_full_precision(teacher_TV.detach()) / temperature, dim=-1)
    return temperature**2 * _kl(teacher_log_TV, student_log_TV)


@torch.no_grad()
def confidence_gate(teacher_logits_TV: Tensor, shape: GateShape = PUBLISHED) -> Tensor:
    """g = exp(-H(P_T) / log V) in [1/e, 1] of every token [T]; 1 where the teacher is certain.

    H at temperature 1 in natural logs. A vocabulary of one token is certain. Other shapes: `grace.distill.gate`.
    """
    vocabulary = teacher_logits_TV.shape[-1]
    kept_TV = _full_precision(teacher_logits_TV).topk(shape.kept(vocabulary), dim=-1).values
    log_TV = F.log_softmax(kept_TV, dim=-1)
    # xlogy's limit: p log p -> 0 as p -> 0, also at log p = -inf.
    entropy_T = -torch.where(log_TV > -torch.inf, log_TV.exp() * log_TV, 0.0).sum(-1)
    return shape.of_entropy(entropy_T, vocabulary)


def gated_dkd(
    student_logits_TV: Tensor,
    teacher_logits_TV: Tensor,
    targets_T: Tensor,
    temperature: float = 2.0,
    tckd_weight: float = 1.0,
    nckd_weight: float = 4.0,
) -> Tensor:
    """L_GDKD = sum g DKD / sum g, a scalar; 0 with a graph when there are no tokens.

    Args as `dkd_per_token`.

    Raises:
        ValueError: shapes do not fit together, or the temperature is not positive.
    """
    loss_T = dkd_per_token(
        student_logits_TV, teacher_logits_TV, targets_T, temperature, tckd_weight, nckd_weight
    )
    if not len(loss_T):
        return loss_T.sum()
    gate_T = confidence_gate(teacher_logits_TV)
    return (gate_T * loss_T).sum() / gate_T.sum()


def _decouple(logits_TV: Tensor, targets_T: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Splits softmax(logits / temperature) into the target's log-odds [T] and the log-probabilities
    of the others among themselves [T, V] (-inf at the target).

    The others' maximum is taken off before the division, so that the log-odds carry the rounding of
    a difference, not of two large logits.
    """
    target_T1 = targets_T.unsqueeze(-1)
    rest_TV = logits_TV.scatter(-1, target_T1, -torch.inf)
    top_T1 = rest_TV.detach().amax(-1, keepdim=True)
    has_rest_T1 = top_T1 > -torch.inf
    top_T1 = torch.where(has_rest_T1, top_T1, 0.0)
    rest_TV = (rest_TV - top_T1) / temperature
    mass_T1 = rest_TV.exp().sum(-1, keepdim=True)
    log_mass_T1 = torch.where(has_rest_T1, mass_T1, 1.0).log()  # no log(0), whose gradient is NaN
    odds_T1 = (logits_TV.gather(-1, target_T1) - top_T1) / temperature - log_mass_T1
    odds_T1 = torch.where(has_rest_T1, odds_T1, torch.inf)
    return odds_T1.squeeze(-1), rest_TV - log_mass_T1


def _kl(teacher_log_TV: Tensor, student_log_TV: Tensor) -> Tensor:
    """KL of two log-distributions over the last dimension, [T].

    q - p, which sums to nothing, is added to p (log p - log q): a rounded normaliser then changes
    the terms of the sum to second order only, and nearly equal distributions keep their digits.
    """
    surplus_TV = student_log_TV.exp() - teacher_log_TV.exp()
    return (expectation(teacher_log_TV, student_log_TV) + surplus_TV).sum(-1)


def _full_precision(logits_TV: Tensor) -> Tensor:
    return logits_TV if logits_TV.dtype == torch.float64 else logits_TV.float()


def _check_pair(student_TV: Tensor, teacher_TV: Tensor, temperature: float) -> None:
    if student_TV.ndim != 2 or student_TV.shape != teacher_TV.shape:
        raise ValueError(
            f"student logits {tuple(student_TV.shape)} and teacher logits {tuple(teacher_TV.shape)} must both be "
            "[tokens, vocabulary]; cut the two to the vocabulary they share"
        )
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")


def _check_targets(student_TV: Tensor, targets_T: Tensor) -> None:
    if targets_T.shape != student_TV.shape[:1]:
        raise ValueError(
            f"targets {tuple(targets_T.shape)} do not fit {student_TV.shape[0]} tokens of logits"
        )
