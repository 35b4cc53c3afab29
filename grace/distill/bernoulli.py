"""Divergence of two yes/no distributions given by their log-odds, to the last digit.

Shape suffix: T tokens (any shape will do).
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def binary_kl(teacher_odds_T: Tensor, student_odds_T: Tensor) -> Tensor:
    """KL([P, 1 - P] || [Q, 1 - Q]) with P, Q = sigmoid(log-odds), in nats; no probability is subtracted from 1."""
    # Both certain, and of the same: 0, without inf - inf.
    same_T = torch.isinf(teacher_odds_T) & (teacher_odds_T == student_odds_T)
    teacher_T = torch.where(same_T, 0.0, teacher_odds_T)
    student_T = torch.where(same_T, 0.0, student_odds_T)
    yes_T = expectation(F.logsigmoid(teacher_T), F.logsigmoid(student_T))
    no_T = expectation(F.logsigmoid(-teacher_T), F.logsigmoid(-student_T))
    # Close together these two cancel. With p of the rarer outcome and the step d from the teacher's
    # log-odds to the student's, the same KL is log(1 + p (e^d - 1)) - p d.
    step_T = torch.where(teacher_T > 0, teacher_T - student_T, student_T - teacher_T)
    near_T = step_T.abs() < 0.5
    step_T = torch.where(near_T, step_T, 0.0)
    rare_T = torch.sigmoid(-teacher_T.abs())
    return torch.where(near_T, torch.log1p(rare_T * step_T.expm1()) - rare_T * step_T, yes_T + no_T)


def expectation(teacher_log: Tensor, student_log: Tensor) -> Tensor:
    """p (log p - log q), 0 where p = 0; q = 0 < p is an honest infinity."""
    possible = teacher_log > -torch.inf
    difference = torch.where(possible, teacher_log, 0.0) - torch.where(possible, student_log, 0.0)
    return teacher_log.exp() * difference


def sigmoid_difference(a: Tensor, b: Tensor) -> Tensor:
    """sigmoid(a) - sigmoid(b), also where both are close to 1."""
    return torch.where(b > 0, torch.sigmoid(-b) - torch.sigmoid(-a), torch.sigmoid(a) - torch.sigmoid(b))
