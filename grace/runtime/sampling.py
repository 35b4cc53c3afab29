"""From logits to a token.

Shape suffix: V vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grace.errors import UserError

MAX_SEED = 2**63 - 1
MAX_PENALTY = 1e6  # and one over it: logits stay finite
COLDEST = float(
    torch.finfo(torch.float32).tiny
)  # below it a temperature is this: the likeliest token, but for ties
_FIRST = 1024  # likeliest tokens looked at before the whole vocabulary is sorted for a nucleus


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, and where an answer ends.

    Attributes:
        max_new_tokens: at most so many.
        temperature: 0 takes the likeliest token.
        top_p: sample from the smallest set of tokens with this probability.
        top_k: sample from so many likeliest tokens; 0 is all.
        repetition_penalty: divides positive logits of tokens that have occurred, prompt included, and multiplies
            negative ones (arXiv:1909.05858); from 1e-6 to 1e6.
        seed: makes sampling repeatable.
        stop: texts that end the answer, and are not part of it.

    Raises:
        UserError: a value out of range.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"--max-new-tokens {self.max_new_tokens} is out of range: at least 1")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(f"--temperature {self.temperature} is out of range: 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p {self.top_p} is out of range: above 0, at most 1")
        if self.top_k < 0:
            raise UserError(f"--top-k {self.top_k} is out of range: 0 (all tokens) or more")
        if not 1 / MAX_PENALTY <= self.repetition_penalty <= MAX_PENALTY:
            raise UserError(f"--repetition-penalty {self.repetition_penalty} is out of range: 1e-6 to 1e6")
        if self.seed is not None and not 0 <= self.seed <= MAX_SEED:
            raise UserError(f"--seed {self.seed} is out of range: 0 to {MAX_SEED}")
        if not all(self.stop):
            raise UserError("--stop is empty: give a text that ends the answer")


PRESETS = {
    "deterministic": Sampling(max_new_tokens=256),
    "open-ended": Sampling(max_new_tokens=512, temperature=0.7, top_p=0.9),
}
"""The two settings of the published model card."""


class Sampler:
    """Chooses the tokens of one answer.

    It has a random generator of its own, so that answers decoded side by side do not influence each other.

    Args:
        prompt: ids of the prompt, which the repetition penalty counts.
    """

    def __init__(self, sampling: Sampling, prompt: Sequence[int] = (), device: torch.device | str = "cpu"):
        self.sampling = sampling
        self._generator = torch.Generator(device)
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)
        self._seen = dict.fromkeys(prompt) if sampling.repetition_penalty != 1 else None

    def next(self, logits_V: Tensor) -> int:
        """The next token's id."""
        if self._seen is not None:
            logits_V = self._penalised(logits_V.float())
        token = self._drawn(logits_V.float()) if self.sampling.temperature > 0 else int(logits_V.argmax())
        if self._seen is not None:
            self._seen[token] = None
        return token

    def _penalised(self, logits_V: Tensor) -> Tensor:
        seen = torch.tensor([*(self._seen or ())], dtype=torch.int64, device=logits_V.device)
        found = logits_V[seen]
        penalty = self.sampling.repetition_penalty
        return logits_V.index_copy(0, seen, torch.where(found > 0, found / penalty, found * penalty))

    def _drawn(self, logits_V: Tensor) -> int:
        logits_V = (logits_V - logits_V.max()) / max(self.sampling.temperature, COLDEST)
        count = len(logits_V)
        ids = None
        if 0 < self.sampling.top_k < count:
            logits_V, ids = logits_V.topk(self.sampling.top_k)
        if self.sampling.top_p < 1:
            logits_V, kept = _nucleus(logits_V, self.sampling.top_p)
            ids = kept if ids is None else ids[kept]
        place = torch.multinomial(logits_V.softmax(-1), 1, generator=self._generator)
        return int(place if ids is None else ids[place])


def _nucleus(logits_V: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """Logits and places of the fewest likeliest tokens whose probability reaches `top_p`."""
    total = logits_V.logsumexp(-1)
    for count in (min(_FIRST, len(logits_V)), len(logits_V)):
        best, places = logits_V.topk(count)
        mass = (best - total).exp().cumsum(-1)
        if count == len(logits_V) or mass[-1] >= top_p:
            break
    size = min(int((mass < top_p).sum()) + 1, count)
    return best[:size], places[:size]
