"""What a cached teacher knows of each supervised token: its gate, the target and the k likeliest others.

Log-probabilities are those of the whole shared vocabulary, so nothing is renormalised by what is kept. They are taken from
log-odds (`grace.distill.gdkd`): a target that is nearly certain keeps the digits of what is left to the others.

Shape suffixes: T tokens, S shared vocabulary, K tokens kept, R these and the residual, 2 the temperatures
(1, that of the loss).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from grace.distill.rows_top_k import TopKRows


@dataclass(frozen=True)
class TopK:
    """The teacher's side of some tokens without its logits.

    Attributes:
        gate_T: confidence gate.
        target_T2: log-probability of the target.
        residual_T2: log of what neither the target nor the K others have; -inf where K is all of them.
        ids_TK: int32, the likeliest tokens but the target, likeliest first.
        log_prob_TK: their log-probabilities at temperature 1.
        shift_T: log_prob_TK / temperature + shift_T are those at the temperature of the loss.
        temperature: that of the loss.
        vocabulary: S.
    """

    gate_T: Tensor
    target_T2: Tensor
    residual_T2: Tensor
    ids_TK: Tensor
    log_prob_TK: Tensor
    shift_T: Tensor
    temperature: float
    vocabulary: int

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def to(self, device: torch.device | str) -> "TopK":
        """The same on `device`."""
        return replace(self, **{name: value.to(device) for name, value in self.tensors().items()})

    def split(self, counts: Sequence[int]) -> list["TopK"]:
        """The tokens of several records: the first `counts[0]`, the next `counts[1]`, ..."""
        parts = {name: value.split(list(counts)) for name, value in self.tensors().items()}
        return [replace(self, **{name: parts[name][i] for name in parts}) for i in range(len(counts))]

    def tempered_TK(self) -> Tensor:
        """Log-probabilities of the K tokens at the temperature of the loss."""
        return self.log_prob_TK / self.temperature + self.shift_T.unsqueeze(-1)

    def keep(self, k: int) -> "TopK":
        """Only the first k, the others added to the residual."""
        if k >= self.ids_TK.shape[1]:
            return self
        dropped_T2 = torch.stack(
            [logs[:, k:].logsumexp(-1) for logs in (self.log_prob_TK, self.tempered_TK())], -1
        )
        return replace(
            self, ids_TK=self.ids_TK[:, :k], log_prob_TK=self.log_prob_TK[:, :k],
            residual_T2=torch.logaddexp(self.residual_T2, dropped_T2),
        )  # fmt: skip

    def rows(self) -> TopKRows:
        """The teacher's rest at the temperature of the loss, as `grace.distill.rows` takes it."""
        target_T, residual_T = self.target_T2[:, 1], self.residual_T2[:, 1]
        odds_T = target_T - torch.log(-torch.expm1(target_T))
        log_share_TR = torch.cat([self.tempered_TK(), residual_T.unsqueeze(-1)], -1).log_softmax(-1)
        log_share_TR = torch.where(
            log_share_TR.isnan(), -torch.inf, log_share_TR
        )  # the target alone: there is no rest
        return TopKRows(odds_T.unsqueeze(-1), self.ids_TK.long(), log_share_TR[:, :-1], log_share_TR[:, -1:])


def concatenate(parts: Sequence[TopK]) -> TopK:
    """The tokens of several, one after the other. All have the same K, temperature and vocabulary."""
    names = parts[0].tensors()
    return replace(parts[0], **{name: torch.cat([part.tensors()[name] for part in parts]) for name in names})
