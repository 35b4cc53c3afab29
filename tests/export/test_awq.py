"""The bit layout, against a scalar reading of DESIGN section 6."""

import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grace.export import awq


def random_codes(out_features: int, in_features: int, group_size: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-8, 8, (out_features, in_features), generator=generator, dtype=torch.int8)
    exponents = torch.randint(-14, 15, (out_features, in_features // group_size), generator=generator)
    mantissas = torch.randint(128, 256, exponents.shape, generator=generator) / 128
    return codes, (mantissas * 2.0**exponents).bfloat16()


def test_nibble_order_by_a_scalar_loop():
    codes, scales = random_codes(24, 64, 32)
    packed = awq.pack(codes, scales, 32)
    assert packed["qweight"].dtype == packed["qzeros"].dtype == torch.int32
    assert packed["qweight"].shape == (64, 3) and packed["qzeros"].shape == (2, 3)
    assert packed["scales"].dtype == torch.float16 and packed["scales"].shape == (2, 24)
    for i in range(64):
        for c in range(3):
            word = int(packed["qweight"][i, c]) % 2**32
            zeros = int(packed["qzeros"][i // 32, c]) % 2**32
            for nibble, column in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
                q, zero = word // 16**nibble % 16, zeros // 16**nibble % 16
                assert zero == 8 and q - zero == int(codes[8 * c + column, i])
                assert float(packed["scales"][i // 32, 8 * c + column]) == float(
                    scales[8 * c + column, i // 32]
                )


@given(
    words=st.integers(1, 6),
    groups=st.integers(1, 4),
    group_size=st.sampled_from([8, 32, 128]),
    seed=st.integers(0, 999),
)
@settings(max_examples=60, deadline=None)
def test_round_trip_is_exact(words: int, groups: int, group_size: int, seed: int):
    codes, scales = random_codes(8 * words, groups * group_size, group_size, seed)
    packed = awq.pack(codes, scales, group_size)
    for restored in (
        awq.unpack(**packed, group_size=group_size),
        awq.unpack(packed["qweight"], packed["qzeros"], packed["scales"], group_size),
        awq.unpack(packed, group_size=group_size),
    ):
        assert torch.equal(restored[0], codes) and restored[0].dtype == torch.int8
        assert torch.equal(restored[1], scales) and restored[1].dtype == torch.bfloat16


def test_transposed_and_sliced_inputs():
    codes, scales = random_codes(32, 128, 128)
    held = codes.t().contiguous().t()
    wide = torch.cat([codes, codes], 1)[:, :128]
    expected = awq.pack(codes, scales)["qweight"]
    assert torch.equal(awq.pack(held, scales)["qweight"], expected)
    assert torch.equal(awq.pack(wide, scales)["qweight"], expected)


def test_extreme_scales_survive():
    scales = torch.tensor([2.0**-14, 2.0**15, 1.9921875 * 2.0**-14, 0.99609375 * 2.0**15] * 2).bfloat16()[
        :, None
    ]
    codes = torch.full((8, 128), -8, dtype=torch.int8)
    assert torch.equal(awq.unpack(awq.pack(codes, scales))[1], scales)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c, s: (c.int(), s), "int8"),
        (lambda c, s: (c[0], s), "int8"),
        (lambda c, s: (c[:12], s[:12]), "divisible by 8"),
        (lambda c, s: (c[:, :100], s), "group size"),
        (lambda c, s: (c, s[:, :1]), "scales must be bfloat16"),
        (lambda c, s: (c, s.float()), "scales must be bfloat16"),
        (lambda c, s: (torch.full_like(c, 8), s), "4 bits only"),
        (lambda c, s: (torch.full_like(c, -9), s), "4 bits only"),
        (lambda c, s: (c, torch.full_like(s, 2.0**-20 * 1.5078125)), "exact in fp16"),
        (lambda c, s: (c, torch.full_like(s, 2.0**17)), "fp16"),
        (lambda c, s: (c, torch.full_like(s, float("nan"))), "finite"),
    ],
)
def test_what_the_format_cannot_hold_is_refused(change, message: str):
    codes, scales = random_codes(16, 256, 128)
    with pytest.raises(ValueError, match=message):
        awq.pack(*change(codes, scales))


def test_foreign_tensors_are_refused_by_unpack():
    packed = awq.pack(*random_codes(16, 256, 128))
    with pytest.raises(ValueError, match="zero points"):
        awq.unpack(packed["qweight"], packed["qzeros"] + 1, packed["scales"])
    with pytest.raises(ValueError, match="not exact in bfloat16"):
        awq.unpack(packed["qweight"], packed["qzeros"], torch.full_like(packed["scales"], 1.0009765625))
    with pytest.raises(ValueError, match="group size"):
        awq.unpack(**packed, group_size=96)
    with pytest.raises(ValueError, match="qzeros must be"):
        awq.unpack(packed["qweight"], packed["qzeros"][:1], packed["scales"])
    with pytest.raises(ValueError, match="scales must be fp16"):
        awq.unpack(packed["qweight"], packed["qzeros"], packed["scales"].float())
    with pytest.raises(ValueError, match="qweight must be int32"):
        awq.unpack(packed["qweight"].long(), packed["qzeros"], packed["scales"])


def test_packing_is_vectorised():
    """A layer of the 2B model: far from the bound, but a Python loop over words would miss it by miles."""
    codes, scales = random_codes(2048, 2048, 128)
    start = time.perf_counter()
    awq.pack(codes, scales)
    assert time.perf_counter() - start < 2.0
