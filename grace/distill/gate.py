"""How far a token is believed: the teacher's confidence as a weight of its distillation loss.

    g = exp(-k h),    h = H(P_T) / log V            P_T at temperature 1, natural logs; k = 1 as published

DESIGN section 4 (arXiv:2601.22709). With `top_k` = K, h is the entropy of the teacher's K likeliest tokens among
themselves, over log K: among many tokens that nobody would say, h as published stays near 0 even where the teacher
wavers between two.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class GateShape:
    """The published gate by default.

    Attributes:
        sharpness: k; 0 makes every gate 1.
        top_k: K; None takes the whole vocabulary.
    """

    sharpness: float = 1.0
    top_k: int | None = None

    def kept(self, vocabulary: int) -> int:
        """Tokens that the entropy is taken over."""
        return vocabulary if self.top_k is None else min(self.top_k, vocabulary)

    def most(self, vocabulary: int) -> float:
        """The largest entropy there is, in nats; a vocabulary of one token counts as two."""
        return math.log(max(2, self.kept(vocabulary)))

    def of_entropy(self, entropy: Tensor, vocabulary: int) -> Tensor:
        """Gates of entropies (nats) over the tokens kept; any shape."""
        return torch.exp(-self.sharpness * entropy / self.most(vocabulary))


PUBLISHED = GateShape()
