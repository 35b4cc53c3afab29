"""From logits to tokens on the device, for many answers at once: no value comes back but the tokens.

Shape suffixes: B rows, V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from grace.runtime.sampling import COLDEST, Sampling


class Draw(NamedTuple):
    """How one token of one answer is chosen.

    Attributes:
        temperature: 0 takes the likeliest token.
        top_p, top_k: as in `Sampling`.
        uniform: a number in [0, 1) that decides which.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    uniform: float = 0.0


def draw(sampling: Sampling, uniform: float) -> Draw:
    """The draw of a request's next token.

    Raises:
        ValueError: a repetition penalty, which needs the answer so far.
    """
    if sampling.repetition_penalty != 1:
        raise ValueError("a repetition penalty is applied by `Sampler`, not on the device")
    return Draw(sampling.temperature, sampling.top_p, sampling.top_k, uniform)


def packed(draws: list[Draw], device: torch.device) -> Tensor:
    """Draws as a tensor [4, B]."""
    return torch.tensor(draws, dtype=torch.float64).T.contiguous().to(device)


def drawn(logits_BV: Tensor, draws_4B: Tensor) -> Tensor:
    """The chosen tokens, int64 [B].

    The order of the vocabulary by probability, cut off after `top_k` tokens and after the first at which the
    probability of those before reaches `top_p`; of what is left, the token at which the mass passes `uniform`.
    """
    temperature_B, top_p_B, top_k_B, uniform_B = draws_4B
    greedy_B = temperature_B == 0
    scale_B = torch.where(greedy_B, 1.0, temperature_B).float().clamp(min=COLDEST)
    below_BV = logits_BV.float() - logits_BV.float().amax(-1, keepdim=True)
    best_BV, ids_BV = (below_BV / scale_B[:, None]).sort(-1, descending=True)
    p_BV = best_BV.double().softmax(-1)
    place_V = torch.arange(logits_BV.shape[1], device=logits_BV.device)
    # Top-k first; the nucleus is a share of what it leaves, as in `Sampler`.
    in_top_k_BV = (place_V < top_k_B[:, None]) | (top_k_B[:, None] == 0)
    kept_BV = p_BV * in_top_k_BV
    before_BV = kept_BV.cumsum(-1) - kept_BV
    kept_BV = kept_BV * (before_BV < top_p_B[:, None] * kept_BV.sum(-1, keepdim=True))
    mass_BV = kept_BV.cumsum(-1)
    # Counted up to the last token kept, so that rounding in the sums cannot lead past it.
    last_B = (kept_BV > 0).sum(-1) - 1
    chosen_B = (mass_BV <= (uniform_B * mass_BV[:, -1])[:, None]).sum(-1).minimum(last_B)
    chosen_B = torch.where(greedy_B, 0, chosen_B)
    return ids_BV.gather(-1, chosen_B[:, None])[:, 0]
