"""Exact match and cross-entropy of answers, from one teacher-forced forward pass.

Greedy decoding reproduces an answer if and only if, given the true prefix, the arg-max is the
right token at every position of the answer, its end marker included. So a single forward pass
gives the exact-match score of greedy decoding without decoding.

Shape suffixes: B batch, L sequence, T supervised tokens, V vocabulary.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from grace.data.batch import Batch
from grace.distill.teacher import IGNORE_INDEX, supervised
from grace.models import qwen3vl


@dataclass(frozen=True)
class TurnScore:
    """One assistant turn: whether greedy decoding gives it, and its summed cross-entropy in nats."""

    record_id: str
    exact: bool
    ce_sum: float
    tokens: int


def turn_index(labels_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers the supervised turns of a batch in reading order.

    Returns:
        turn_T: the turn each supervised token belongs to; row_N: the batch row of each turn.
    """
    supervised_BL = labels_BL[:, 1:] != IGNORE_INDEX
    before_BL = F.pad(supervised_BL, (1, 0))[:, :-1]
    starts_BL = supervised_BL & ~before_BL
    turn_BL = starts_BL.flatten().cumsum(0).view_as(starts_BL) - 1
    rows = torch.arange(labels_BL.shape[0], device=labels_BL.device)[:, None].expand_as(starts_BL)
    return turn_BL[supervised_BL], rows[starts_BL]


@torch.no_grad()
def evaluate(model: Any, batches: Iterable[Batch], device: torch.device | str = "cpu") -> list[TurnScore]:
    """Scores every assistant turn, given the true text before it.

    Args:
        model: a Qwen3-VL model of any kind: full precision, fake-quant or packed.
    """
    scores: list[TurnScore] = []
    for batch in batches:
        batch = batch.to(device)
        hidden_TD, targets_T = supervised(qwen3vl.hidden_states(model, batch).final_BLD, batch.labels_BL)
        logits_TV = model.lm_head(hidden_TD).float()
        ce_T = F.cross_entropy(logits_TV, targets_T, reduction="none").double()
        hit_T = (logits_TV.argmax(-1) == targets_T).double()
        turn_T, row_N = turn_index(batch.labels_BL)
        empty_N = torch.zeros(len(row_N), dtype=torch.float64, device=ce_T.device)
        ce_N = empty_N.index_add(0, turn_T, ce_T)
        tokens_N = empty_N.index_add(0, turn_T, torch.ones_like(ce_T))
        hits_N = empty_N.index_add(0, turn_T, hit_T)
        for row, ce, tokens, hits in zip(
            row_N.tolist(), ce_N.tolist(), tokens_N.tolist(), hits_N.tolist(), strict=True
        ):
            scores.append(TurnScore(batch.record_ids[row], hits == tokens, ce, int(tokens)))
    return scores


def summarize(scores: Sequence[TurnScore]) -> dict[str, float]:
    """Exact match with its binomial standard error, and cross-entropy per token in nats."""
    if not scores:
        return {"exact_match": math.nan, "exact_match_se": math.nan, "ce": math.nan, "turns": 0}
    rate = sum(score.exact for score in scores) / len(scores)
    tokens = sum(score.tokens for score in scores)
    return {
        "exact_match": rate,
        "exact_match_se": math.sqrt(rate * (1 - rate) / len(scores)),
        "ce": sum(score.ce_sum for score in scores) / max(tokens, 1),
        "turns": len(scores),
    }


def by_type(scores: Sequence[TurnScore]) -> Mapping[str, dict[str, float]]:
    """`summarize` per question type, the last part of ids like `test-000123-sum`."""
    groups: dict[str, list[TurnScore]] = {}
    for score in scores:
        groups.setdefault(score.record_id.rsplit("-", 1)[-1], []).append(score)
    return {name: summarize(group) for name, group in sorted(groups.items())}
