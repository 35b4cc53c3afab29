"""What rows of losses are made of: a row with its target taken out, and the cross-entropy of the student's.

`grace.distill.rows` has the equations.

Shape suffixes: C tokens of a chunk, B tokens of a block, V vocabulary, S the part of it that both models
share, R what the student has beyond; a 1 marks a kept dimension.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


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


@dataclass(frozen=True)
class Rest:
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


def take_out(logits_BV: Tensor, target_B1: Tensor, temperature: float, shared: int) -> Rest:
    """Consumes `logits_BV`; what lies past `shared` is left as logits - top."""
    own_B1 = logits_BV.gather(-1, target_B1)
    logits_BV.scatter_(-1, target_B1, -torch.inf)
    top_B1 = logits_BV.amax(-1, keepdim=True)
    top_B1.masked_fill_(top_B1 == -torch.inf, 0.0)  # a vocabulary of one token has no rest
    logits_BV.sub_(top_B1)
    scaled_BS = logits_BV[:, :shared].div_(temperature)
    mass_BS = scaled_BS.exp()
    scaled_BS.scatter_(-1, target_B1, 0.0)
    return Rest(scaled_BS, mass_BS, mass_BS.sum(-1, keepdim=True), top_B1, own_B1)


def at_one(rest: Rest, temperature: float, target_B1: Tensor) -> Tensor:
    """Masses of the rest at temperature 1, 0 at the target; a buffer of its own."""
    if temperature == 2.0:
        return rest.mass_BS.square()
    return (rest.scaled_BS * temperature).exp_().scatter_(-1, target_B1, 0.0)


@dataclass(frozen=True)
class FullRows:
    """A teacher whose logits are all there, at the temperature of its `rest`."""

    rest: Rest
    temperature: float

    @property
    def odds_B1(self) -> Tensor:
        """The target's log-odds."""
        return self.rest.odds_B1(self.temperature, self.rest.mass_B1)

    def divergence_B1(self, student: Rest) -> Tensor:
        """KL between the two rests, each renormalised; once only, it consumes `rest.scaled_BS`."""
        teacher = self.rest
        # Differences of the shifted logits first: two large normalisers would swamp them.
        step_BS = teacher.scaled_BS.sub_(student.scaled_BS)
        step_BS.add_((student.mass_B1 / positive(teacher.mass_B1)).clamp_min(tiny(teacher.mass_B1)).log())
        return torch.linalg.vecdot(teacher.mass_BS, step_BS).unsqueeze(-1) / positive(teacher.mass_B1)

    def subtract_(self, gradient_BS: Tensor, student: Rest, factor_B1: Tensor) -> None:
        """gradient -= factor * the renormalised rest."""
        gradient_BS.addcmul_(self.rest.mass_BS, -factor_B1 / positive(self.rest.mass_B1))


@dataclass(frozen=True)
class StudentSide:
    """The student's rows, with what cross-entropy makes of them.

    Attributes:
        rest: at the temperature of the KD loss.
        at_one_BS: masses of the rest at temperature 1.
        beyond_BR: masses at temperature 1 of the entries that the teacher lacks; they matter to CE alone.
        ce_B1: cross-entropy.
        wrong_B1: ce_scale (1 - p(target)); its negative is the gradient at the target.
        ce_factor_B1: what a mass at temperature 1 is multiplied by in the gradient.
    """

    rest: Rest
    at_one_BS: Tensor
    beyond_BR: Tensor
    ce_B1: Tensor
    wrong_B1: Tensor
    ce_factor_B1: Tensor

    def write_gradient(
        self, student_BV: Tensor, gradient_BS: Tensor, target_B1: Tensor, at_target_B1: Tensor
    ) -> None:
        """Puts the gradient of the rest, of the target and beyond over the logits."""
        shared = gradient_BS.shape[1]
        student_BV[:, :shared] = gradient_BS.scatter_(-1, target_B1, at_target_B1)
        student_BV[:, shared:] = self.beyond_BR.mul_(self.ce_factor_B1)


def student_side(student_BV: Tensor, target_B1: Tensor, settings: RowSettings) -> StudentSide:
    """Leaves `student_BV` as it is."""
    tau = settings.temperature
    work_BV = student_BV.to(wide(student_BV), copy=True)
    rest = take_out(work_BV, target_B1, tau, settings.shared)
    at_one_BS = at_one(rest, tau, target_B1)
    beyond_BR = work_BV[:, settings.shared :].exp_()
    mass_B1 = at_one_BS.sum(-1, keepdim=True) + beyond_BR.sum(-1, keepdim=True)
    odds_B1 = rest.odds_B1(1.0, mass_B1)
    wrong_B1 = settings.ce_scale * torch.sigmoid(-odds_B1)
    return StudentSide(
        rest, at_one_BS, beyond_BR, -F.logsigmoid(odds_B1), wrong_B1, wrong_B1 / positive(mass_B1)
    )


def rest_entropy(teacher: Rest, temperature: float, target_B1: Tensor) -> Tensor:
    """Entropy at temperature 1 of the whole row [B, 1]: of "the target or not", plus that of the rest."""
    mass_BS = at_one(teacher, temperature, target_B1)
    mass_B1 = mass_BS.sum(-1, keepdim=True)
    odds_B1 = teacher.odds_B1(1.0, mass_B1)
    mean_B1 = torch.linalg.vecdot(mass_BS, teacher.scaled_BS).unsqueeze(-1) * temperature / positive(mass_B1)
    log_mass_B1 = mass_B1.clamp_min(tiny(mass_B1)).log()
    yes_B1, no_B1 = torch.sigmoid(odds_B1), torch.sigmoid(-odds_B1)
    # p log p -> 0 as p -> 0, also where log p is -inf: a rest of nothing
    no_log_no_B1 = torch.where(no_B1 > 0, no_B1 * F.logsigmoid(-odds_B1), 0.0)
    between_B1 = -yes_B1 * F.logsigmoid(odds_B1) - no_log_no_B1
    return between_B1 + no_B1 * (log_mass_B1 - mean_B1)


def positive(mass_B1: Tensor) -> Tensor:
    """A divisor: an empty rest has mass 0, and every numerator 0 with it."""
    return mass_B1.clamp_min(tiny(mass_B1))


def tiny(mass_B1: Tensor) -> float:
    return torch.finfo(mass_B1.dtype).tiny


def wide(logits: Tensor) -> torch.dtype:
    """The dtype that sums and exponentials are taken in."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32
