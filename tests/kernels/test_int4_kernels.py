"""Every W4 kernel against the oracle, and the oracle against a scalar loop."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grace.kernels import aten, awq_layout, dequant, reference


def random_layer(out_features: int, in_features: int, group_size: int, symmetric: bool, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)

    def words(rows: int) -> torch.Tensor:
        return torch.randint(-(2**31), 2**31, (rows, out_features // 8), generator=generator).to(torch.int32)

    groups = in_features // group_size
    qzeros = (
        torch.full((groups, out_features // 8), 0x88888888 - 2**32, dtype=torch.int32)
        if symmetric
        else words(groups)
    )
    scales = (torch.rand(groups, out_features, generator=generator) * 0.02 + 0.001).bfloat16().half()
    return words(in_features), qzeros, scales, group_size


def activations(tokens: int, in_features: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(tokens, in_features, generator=torch.Generator().manual_seed(tokens)).to(dtype)


def error(result: torch.Tensor, expected: torch.Tensor) -> float:
    return ((result.double() - expected).abs().max() / expected.abs().max()).item()


def test_the_oracle_is_the_format_description_read_aloud():
    qweight, qzeros, scales, group_size = random_layer(16, 64, 32, symmetric=False)
    weight_IO = reference.dequantize(qweight, qzeros, scales, group_size)
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    for i in range(64):
        for word in range(2):
            for nibble in range(8):
                column = 8 * word + order[nibble]
                q = (int(qweight[i, word]) & 0xFFFFFFFF) >> (4 * nibble) & 15
                zero = (int(qzeros[i // 32, word]) & 0xFFFFFFFF) >> (4 * nibble) & 15
                assert weight_IO[i, column].item() == float(scales[i // 32, column]) * (q - zero)


@given(rows=st.integers(1, 5), words=st.integers(1, 4), seed=st.integers(0, 2**31))
@settings(max_examples=50, deadline=None)
def test_layout_round_trip(rows: int, words: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    values_CR = torch.randint(0, 16, (8 * words, rows), generator=generator, dtype=torch.uint8)
    packed_RW = awq_layout.pack_transposed(values_CR)
    assert packed_RW.dtype == torch.int32 and packed_RW.shape == (rows, words)
    assert torch.equal(awq_layout.unpack_transposed(packed_RW), values_CR)
    assert torch.equal(reference.nibbles(packed_RW), values_CR.t().long())


SHAPES = [(16, 32, 32), (48, 96, 32), (272, 384, 128), (64, 64, 64), (144, 192, 64), (32, 512, 256)]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tokens", [1, 2, 3, 17])
def test_aten_matches_the_oracle(tokens: int, shape: tuple[int, int, int], symmetric: bool):
    layer = random_layer(*shape, symmetric)
    x = activations(tokens, shape[1], torch.bfloat16)
    result = aten.matmul(x, aten.prepare(*layer))
    assert result.dtype == torch.bfloat16 and result.shape == (tokens, shape[0])
    assert error(result, reference.matmul(x, *layer)) < 2**-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("shape", [*SHAPES, (8, 32, 32), (24, 96, 32), (40, 48, 16)])
def test_dequant_matches_the_oracle(shape: tuple[int, int, int], symmetric: bool, dtype: torch.dtype):
    layer = random_layer(*shape, symmetric)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2**-7}[dtype]
    for tokens in (1, 5, 33):
        x = activations(tokens, shape[1], dtype)
        result = dequant.matmul(x, *layer)
        assert result.dtype == dtype
        assert error(result, reference.matmul(x, *layer)) < tolerance


def test_no_tokens_give_no_rows():
    layer = random_layer(32, 64, 32, True)
    x = activations(0, 64, torch.bfloat16)
    assert aten.matmul(x, aten.prepare(*layer)).shape == (0, 32)
    assert dequant.matmul(x, *layer).shape == (0, 32)


def test_every_output_is_written(request: pytest.FixtureRequest):
    layer = random_layer(48, 96, 32, False)
    x = activations(3, 96, torch.float32)
    expected = reference.matmul(x, *layer)
    request.getfixturevalue("poisoned_memory")
    assert error(dequant.matmul(x, *layer), expected) < 1e-5
    values = torch.arange(48, dtype=torch.uint8).remainder(16).view(16, 3)
    assert torch.equal(awq_layout.unpack_transposed(awq_layout.pack_transposed(values)), values)


def test_non_contiguous_activations():
    layer = random_layer(32, 64, 32, False)
    x = activations(64, 6, torch.bfloat16).t()
    expected = reference.matmul(x, *layer)
    assert error(aten.matmul(x, aten.prepare(*layer)), expected) < 2**-7
    assert error(dequant.matmul(x, *layer), expected) < 2**-7


def test_aten_says_what_it_cannot_run():
    with pytest.raises(ValueError, match="divisible by 16"):
        aten.prepare(*random_layer(24, 64, 32, True))
    with pytest.raises(ValueError, match="groups of"):
        aten.prepare(*random_layer(16, 64, 16, True))
    weight = aten.prepare(*random_layer(16, 64, 32, True))
    with pytest.raises(ValueError, match="bfloat16 only"):
        aten.matmul(activations(1, 64, torch.float32), weight)


def test_own_scales_lose_nothing_in_aten():
    """Symmetric zero points and bfloat16 scales: one-hot activations read the weights back exactly."""
    layer = random_layer(32, 64, 32, True)
    rows = aten.matmul(torch.eye(64, dtype=torch.bfloat16), aten.prepare(*layer))
    assert torch.equal(rows, reference.dequantize(*layer, dtype=torch.float32).bfloat16())
