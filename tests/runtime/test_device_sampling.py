"""Tokens chosen on the device: the sampler's rules, and the probabilities that they leave."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grace.runtime.device_sampling import Draw, draw, drawn, packed
from grace.runtime.sampling import Sampler, Sampling

CPU = torch.device("cpu")


def frequencies(logits_V: torch.Tensor, one: Draw, count: int = 2000) -> torch.Tensor:
    """How often each token comes, over evenly spread numbers: their probabilities to 1 / count."""
    draws = [one._replace(uniform=(index + 0.5) / count) for index in range(count)]
    tokens = drawn(logits_V.expand(count, -1), packed(draws, CPU))
    return torch.bincount(tokens, minlength=len(logits_V)) / count


@pytest.mark.parametrize(
    ("one", "expected"),
    [
        (Draw(temperature=1.0), [0.1, 0.5, 0.15, 0.25]),
        (Draw(temperature=0.0, uniform=0.9), [0, 1, 0, 0]),
        (Draw(temperature=1e-40), [0, 1, 0, 0]),
        (Draw(temperature=5e-324, top_p=0.9), [0, 1, 0, 0]),
        (Draw(temperature=1.0, top_k=2), [0, 2 / 3, 0, 1 / 3]),
        (Draw(temperature=1.0, top_p=0.5), [0, 1, 0, 0]),
        (Draw(temperature=1.0, top_p=0.6), [0, 2 / 3, 0, 1 / 3]),
        (Draw(temperature=1.0, top_p=1e-9), [0, 1, 0, 0]),
        # Top-k first: of (2/3, 1/3), 0.6 needs the first only.
        (Draw(temperature=1.0, top_k=2, top_p=0.6), [0, 1, 0, 0]),
        (Draw(temperature=0.5), [0.01 / 0.345, 0.25 / 0.345, 0.0225 / 0.345, 0.0625 / 0.345]),
    ],
)
def test_probabilities(one: Draw, expected: list[float]):
    logits_V = torch.tensor([0.1, 0.5, 0.15, 0.25]).log() + 3
    torch.testing.assert_close(
        frequencies(logits_V, one), torch.tensor(expected, dtype=torch.float32), rtol=0, atol=1e-3
    )


@given(
    seed=st.integers(0, 2**20), temperature=st.sampled_from([0.3, 1.0, 2.0]), top_k=st.sampled_from([0, 1, 5, 99]),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 1.0]),
)  # fmt: skip
@settings(max_examples=20, deadline=None)
def test_what_can_come_is_what_the_sampler_draws(seed: int, temperature: float, top_k: int, top_p: float):
    logits_V = 3 * torch.randn(40, generator=torch.Generator().manual_seed(seed))
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    sampler = Sampler(sampling)
    shares = frequencies(logits_V, draw(sampling, 0.0))
    for token in {sampler.next(logits_V) for _ in range(20)}:
        assert shares[token] > 0 or (logits_V / temperature).softmax(-1)[token] < 1e-3


@pytest.mark.parametrize("uniform", [0.0, math.nextafter(1.0, 0.0)])
def test_the_ends_stay_inside_what_is_kept(uniform: float):
    logits_BV = torch.zeros(3, 1000)
    logits_BV[:, 500:] = -math.inf
    found = drawn(logits_BV, packed([Draw(1.0, 1.0, 0, uniform)] * 3, CPU))
    assert (found < 500).all()


def test_rows_are_independent():
    logits_BV = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    draws = [Draw(), Draw(1.0, 0.5, 0, 0.3), Draw(0.7, 1.0, 3, 0.9), Draw(2.0, 0.9, 9, 0.5)]
    together = drawn(logits_BV, packed(draws, CPU)).tolist()
    alone = [drawn(logits_BV[row : row + 1], packed([one], CPU)).item() for row, one in enumerate(draws)]
    assert together == alone


def test_a_penalty_is_not_dropped_in_silence():
    with pytest.raises(ValueError, match="repetition penalty"):
        draw(Sampling(repetition_penalty=1.1), 0.5)
