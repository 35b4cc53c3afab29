"""A teacher of which only the likeliest tokens are known, as rows of a loss.

The rest (all tokens but the target) is then a distribution over k tokens and one residual r, "any other":

    NCKD_k = sum_{j in top k} q_T(j) log(q_T(j) / q_S(j)) + r_T log(r_T / r_S)

It never exceeds NCKD (the log-sum inequality) and equals it where the student spreads its residual as the teacher
does. Its gradient is that of NCKD with the teacher's residual so spread: q_T(j) = q_S(j) r_T / r_S there.
TCKD is exact.

Shape suffixes: B tokens of a block, K tokens known of each, S shared vocabulary; a 1 marks a kept dimension.
"""

from typing import NamedTuple

from torch import Tensor

from grace.distill.bernoulli import expectation
from grace.distill.row_parts import Rest, positive, tiny


class TopKRows(NamedTuple):
    """The teacher's rest at the temperature of the loss.

    Attributes:
        odds_B1: the target's log-odds.
        ids_BK: int64, the likeliest of the rest; each once, never the target.
        log_share_BK, log_residual_B1: their log-probabilities within the rest, and that of all others;
            together they sum to 1.
    """

    odds_B1: Tensor
    ids_BK: Tensor
    log_share_BK: Tensor
    log_residual_B1: Tensor

    def of(self, rows: slice) -> "TopKRows":
        """Some of the rows."""
        return TopKRows(*(part[rows] for part in self))

    def divergence_B1(self, student: Rest) -> Tensor:
        """NCKD_k."""
        known_BK = student.mass_BS.gather(-1, self.ids_BK)
        student.mass_BS.scatter_(-1, self.ids_BK, 0.0)
        residual_B1 = student.mass_BS.sum(-1, keepdim=True)  # not as a difference, which would have no digits
        student.mass_BS.scatter_(-1, self.ids_BK, known_BK)
        log_mass_B1 = positive(student.mass_B1).log()
        log_known_BK = student.scaled_BS.gather(-1, self.ids_BK) - log_mass_B1
        log_residual_B1 = residual_B1.clamp_min(tiny(residual_B1)).log() - log_mass_B1
        known_B1 = expectation(self.log_share_BK, log_known_BK).sum(-1, keepdim=True)
        return known_B1 + expectation(self.log_residual_B1, log_residual_B1)

    def subtract_(self, gradient_BS: Tensor, student: Rest, factor_B1: Tensor) -> None:
        """gradient -= factor * q_T, its residual spread as the student's; consumes `student.mass_BS`."""
        student.mass_BS.scatter_(-1, self.ids_BK, 0.0)
        residual_B1 = student.mass_BS.sum(-1, keepdim=True)
        residual_factor_B1 = -factor_B1 * self.log_residual_B1.exp() / positive(residual_B1)
        gradient_BS.addcmul_(student.mass_BS, residual_factor_B1)
        gradient_BS.scatter_add_(-1, self.ids_BK, -factor_B1 * self.log_share_BK.exp())
