"""What a request does to logits before a token is drawn, and what it wants to know of them.

Shape suffix: V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Alternatives:
    """Log-probabilities of one token and of the likeliest in its place, as (id, log-probability)."""

    token: int
    logprob: float
    likeliest: tuple[tuple[int, float], ...]


def alternatives(logits_V: Tensor, token: int, count: int) -> Alternatives:
    """By the model's own distribution: before temperature, penalties and biases."""
    logprobs_V = logits_V.float().log_softmax(-1)
    values, ids = logprobs_V.topk(min(count, len(logprobs_V)))
    return Alternatives(
        token, float(logprobs_V[token]), tuple(zip(ids.tolist(), values.tolist(), strict=True))
    )


class Adjustments:
    """OpenAI's penalties and biases: logit - presence * [count > 0] - frequency * count + bias.

    The counts are of generated tokens; the prompt's do not count.
    """

    def __init__(self, presence: float, frequency: float, bias: dict[int, float]):
        self._presence, self._frequency = presence, frequency
        self._bias, self._counts = bias, dict[int, int]()

    @property
    def needed(self) -> bool:
        """Whether there is anything to do."""
        return bool(self._presence or self._frequency or self._bias)

    def apply(self, logits_V: Tensor) -> Tensor:
        """Adjusted logits; the given ones stay as they are."""
        change = dict(self._bias)
        for token, count in self._counts.items():
            change[token] = change.get(token, 0.0) - self._presence - self._frequency * count
        if not change:
            return logits_V
        ids = torch.tensor([*change], device=logits_V.device)
        values = torch.tensor([*change.values()], device=logits_V.device, dtype=logits_V.dtype)
        return logits_V.index_add(0, ids, values)

    def count(self, token: int) -> None:
        """Notes a generated token."""
        self._counts[token] = self._counts.get(token, 0) + 1
