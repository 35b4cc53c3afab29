"""The 32-bit words of compressed-tensors and MLX, against a scalar reading of the layout."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grace.export.words import pack_words, unpack_words


def random_codes(outputs: int, inputs: int, bits: int, seed: int = 0) -> torch.Tensor:
    half = 2 ** (bits - 1)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-half, half, (outputs, inputs), generator=generator, dtype=torch.int8)


@pytest.mark.parametrize("bits", [4, 8])
def test_bit_order_by_a_scalar_loop(bits: int):
    codes, per_word = random_codes(3, 64, bits), 32 // bits
    words = pack_words(codes, bits)
    assert words.dtype == torch.int32 and words.shape == (3, 64 // per_word)
    for o in range(3):
        for i in range(64):
            word = int(words[o, i // per_word]) % 2**32
            value = word >> (bits * (i % per_word)) & (2**bits - 1)
            assert value - 2 ** (bits - 1) == int(codes[o, i])


@given(
    outputs=st.integers(1, 40),
    words=st.integers(1, 20),
    bits=st.sampled_from([4, 8]),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_round_trip_is_exact(outputs: int, words: int, bits: int, seed: int):
    codes = random_codes(outputs, words * 32 // bits, bits, seed)
    assert torch.equal(unpack_words(pack_words(codes, bits), bits), codes)
    held = codes.t().contiguous().t()
    assert torch.equal(pack_words(held, bits), pack_words(codes, bits))


def test_large_matrices_go_in_blocks():
    codes = random_codes(1030, 2048, 4)
    words = pack_words(codes, 4)
    assert torch.equal(torch.cat([pack_words(codes[:7], 4), pack_words(codes[7:], 4)]), words)
    assert torch.equal(unpack_words(words, 4), codes)


@pytest.mark.parametrize(
    ("codes", "bits", "message"),
    [
        (torch.zeros(2, 32, dtype=torch.int8), 3, "4 or 8 bits"),
        (torch.zeros(2, 32), 4, "int8"),
        (torch.zeros(2, 33, dtype=torch.int8), 4, "whole words"),
        (torch.full((2, 32), 8, dtype=torch.int8), 4, r"span \[8, 8\]"),
        (torch.full((2, 32), -9, dtype=torch.int8), 4, "span"),
    ],
)
def test_what_words_cannot_hold_is_refused(codes: torch.Tensor, bits: int, message: str):
    with pytest.raises(ValueError, match=message):
        pack_words(codes, bits)
    with pytest.raises(ValueError, match="int32 words"):
        unpack_words(codes, bits)
