"""Q4_0 and Q8_0 blocks, against a scalar reading and the gguf package's dequantizer."""

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grace.export.gguf_blocks import pack_blocks, unpack_codes, unpack_scales
from grace.quant.grid import dequantize

KINDS = {4: gguf.GGMLQuantizationType.Q4_0, 8: gguf.GGMLQuantizationType.Q8_0}


def random_linear(outputs: int, groups: int, group_size: int, bits: int, seed: int = 0):
    half, generator = 2 ** (bits - 1), torch.Generator().manual_seed(seed)
    codes = torch.randint(-half, half, (outputs, groups * group_size), generator=generator, dtype=torch.int8)
    exponents = torch.randint(-14, 15, (outputs, groups), generator=generator)
    mantissas = torch.randint(128, 256, (outputs, groups), generator=generator) / 128
    return codes, (mantissas * 2.0**exponents).bfloat16()


@pytest.mark.parametrize("bits", [4, 8])
def test_bytes_by_a_scalar_loop(bits: int):
    codes, scales = random_linear(3, 2, 64, bits)
    rows = pack_blocks(codes, scales, bits).numpy()
    size = {4: 18, 8: 34}[bits]
    assert rows.shape == (3, 4 * size)
    for o in range(3):
        for b in range(4):
            block = rows[o, b * size : (b + 1) * size].tobytes()
            assert float(np.frombuffer(block[:2], np.float16)[0]) == float(scales[o, b // 2])
            for i in range(32):
                if bits == 4:
                    byte = block[2 + i % 16]
                    value = (byte & 15 if i < 16 else byte >> 4) - 8
                else:
                    value = int.from_bytes(block[2 + i : 3 + i], signed=True)
                assert value == int(codes[o, 32 * b + i])


@given(
    outputs=st.integers(1, 9),
    groups=st.integers(1, 4),
    group_size=st.sampled_from([32, 64, 128]),
    bits=st.sampled_from([4, 8]),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_exact_both_ways_and_for_the_gguf_package(outputs, groups, group_size, bits, seed):
    codes, scales = random_linear(outputs, groups, group_size, bits, seed)
    packed = pack_blocks(codes, scales, bits)
    assert torch.equal(unpack_codes(packed, bits), codes)
    assert torch.equal(unpack_scales(packed, bits, group_size).float(), scales.float())
    wide = gguf.quants.dequantize(packed.numpy(), KINDS[bits])
    assert np.array_equal(wide, dequantize(codes, scales, group_size).numpy())


def test_large_matrices_go_in_steps():
    codes, scales = random_linear(1030, 16, 128, 4)
    packed = pack_blocks(codes, scales, 4)
    assert torch.equal(
        torch.cat([pack_blocks(codes[:5], scales[:5], 4), pack_blocks(codes[5:], scales[5:], 4)]), packed
    )


@pytest.mark.parametrize(
    ("change", "bits", "message"),
    [
        (lambda c, s: (c, s), 5, "4 or 8 bits"),
        (lambda c, s: (c.int(), s), 4, "int8"),
        (lambda c, s: (c, s.float()), 4, "bfloat16"),
        (lambda c, s: (c, s[:1]), 4, "bfloat16"),
        (lambda c, s: (c, s.repeat_interleave(8, 1)), 4, "whole blocks of 32"),
        (lambda c, s: (torch.full_like(c, 8), s), 4, "span"),
        (lambda c, s: (c, torch.full_like(s, 2.0**17)), 4, "fp16"),
        (lambda c, s: (c, torch.full_like(s, 2.0**-20 * 1.5078125)), 4, "exact in fp16"),
        (lambda c, s: (c, torch.full_like(s, float("inf"))), 4, "finite"),
    ],
)
def test_what_blocks_cannot_hold_is_refused(change, bits: int, message: str):
    codes, scales = change(*random_linear(4, 2, 128, 4))
    with pytest.raises(ValueError, match=message):
        pack_blocks(codes, scales, bits)


def test_foreign_blocks_are_refused():
    codes, scales = random_linear(4, 2, 128, 4)
    packed = pack_blocks(codes, scales, 4)
    with pytest.raises(ValueError, match="not rows"):
        unpack_codes(packed[:, 1:], 4)
    other = packed.clone()
    other[0, 1] ^= 1  # the scale of one block of the first group
    with pytest.raises(ValueError, match="scales of a group's blocks differ"):
        unpack_scales(other, 4, 128)
