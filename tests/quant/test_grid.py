"""The grid against a numpy float64 oracle: scales, codes, and what they multiply back to."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from grace.quant import grid
from grace.quant.grid import dequantize, init_theta, quantize, snap

LARGE = torch.finfo(torch.float32).max


def snap_oracle(scale: np.ndarray) -> np.ndarray:
    """Eight significant bits, half to even, inside [2^-14, 2^15]."""
    mantissa, exponent = np.frexp(np.clip(np.asarray(scale, dtype=np.float64), 2.0**-14, 2.0**15))
    return np.ldexp(np.rint(mantissa * 256) / 256, exponent)


def quantize_oracle(
    weight: Tensor, theta: Tensor, group_size: int, bits: int
) -> tuple[np.ndarray, np.ndarray]:
    scale_OG = snap_oracle(np.exp(theta.double().numpy()))
    per_weight_OI = np.repeat(scale_OG, group_size, axis=1)
    codes_OI = np.clip(
        np.rint(weight.double().numpy() / per_weight_OI), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    )
    return codes_OI, scale_OG


def init_oracle(weight: Tensor, group_size: int, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Best snapped scale of every group, and the squared errors [ratio, O, G] of all of them."""
    groups = weight.double().numpy().reshape(weight.shape[0], -1, group_size)
    high = 2 ** (bits - 1) - 1
    base = np.abs(groups).max(-1) / high
    scales = np.stack([snap_oracle(base * ratio) for ratio in np.linspace(0.3, 1.2, 20)])
    codes = np.clip(np.rint(groups / scales[..., None]), -high - 1, high)
    errors = ((codes * scales[..., None] - groups) ** 2).sum(-1)
    best = np.take_along_axis(scales, errors.argmin(0)[None], axis=0)[0]
    return best, errors


def normal(*shape: int, scale: float = 0.05, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


@given(st.floats(0, 1e6, allow_subnormal=True))
def test_snap_is_bfloat16_inside_the_range_that_float16_holds_too(scale: float) -> None:
    snapped = snap(torch.tensor([scale]))
    assert snapped.item() == snap_oracle(np.float32(scale)).item()
    assert torch.equal(snapped.to(torch.float16).float(), snapped)
    assert torch.equal(snapped.to(torch.bfloat16).float(), snapped)


@given(st.floats(-200, 200, width=32))
def test_theta_stands_for_the_snapped_exponential(theta: float) -> None:
    with np.errstate(over="ignore"):
        expected = snap_oracle(np.exp(np.float64(theta)))
    assert grid.snapped_scale(torch.tensor([[theta]])).item() == expected.item()


@settings(max_examples=60, deadline=None)
@given(
    outputs=st.integers(0, 5),
    groups=st.integers(1, 4),
    group_size=st.sampled_from([1, 3, 16, 128]),
    bits=st.integers(2, 8),
    log_scale=st.floats(-12, 12),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    seed=st.integers(0, 99),
)
def test_codes_and_scales_are_the_oracles(outputs, groups, group_size, bits, log_scale, dtype, seed) -> None:
    theta_OG = normal(outputs, groups, scale=1.0, seed=seed + 1) + log_scale
    weight_OI = normal(outputs, groups * group_size, scale=4 * math.exp(min(log_scale, 7)), seed=seed).to(
        dtype
    )
    codes_OI, scales_OG = quantize(weight_OI, theta_OG, group_size, bits)
    expected_codes, expected_scales = quantize_oracle(weight_OI, theta_OG, group_size, bits)
    assert codes_OI.dtype == torch.int8 and scales_OG.dtype == torch.bfloat16
    assert np.array_equal(codes_OI.numpy(), expected_codes)
    assert np.array_equal(scales_OG.double().numpy(), expected_scales)
    restored_OI = dequantize(codes_OI, scales_OG, group_size)
    assert restored_OI.dtype == torch.float32
    assert np.array_equal(
        restored_OI.double().numpy(), expected_codes * expected_scales.repeat(group_size, 1)
    )


@pytest.mark.parametrize("scale", [2.0**-14, 2.0**-4, 1.0, 1.9921875, 2.0**15])
def test_ties_go_to_the_even_code(scale: float) -> None:
    halves = torch.arange(-10, 10) + 0.5
    weight_OI, theta_OG = (halves * scale)[None], torch.tensor([[math.log(scale)]])
    codes_OI, _ = quantize(weight_OI, theta_OG, group_size=20)
    assert codes_OI[0].tolist() == [-8, -8, -8, -6, -6, -4, -4, -2, -2, 0, 0, 2, 2, 4, 4, 6, 6, 7, 7, 7]


@pytest.mark.parametrize("step", [-1, 1])
def test_one_bit_beside_a_tie_decides(step: int) -> None:
    scale = 1.9921875
    ties = (torch.arange(-8, 7) + 0.5) * scale
    beside_OI = torch.nextafter(ties, torch.full_like(ties, step * torch.inf))[None]
    codes_OI, _ = quantize(beside_OI, torch.tensor([[math.log(scale)]]), group_size=15)
    assert codes_OI[0].tolist() == [k + (step > 0) for k in range(-8, 7)]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    ("shape", "group_size"), [((3, 384), 128), ((1, 128), 128), ((7, 60), 12), ((4, 5), 1)]
)
def test_initial_scale_has_the_least_squared_error(shape, group_size, dtype, bits) -> None:
    weight_OI = normal(*shape, dtype=dtype, seed=bits)
    theta_OG = init_theta(weight_OI, group_size, bits)
    best, errors = init_oracle(weight_OI, group_size, bits)
    assert theta_OG.dtype == torch.float32 and theta_OG.shape == best.shape
    scales = grid.snapped_scale(theta_OG).double().numpy()
    # log and exp bring the chosen scale back exactly, and no candidate does better.
    assert np.mean(scales == best) > 0.99
    groups = weight_OI.double().numpy().reshape(*best.shape, group_size)
    codes, _ = quantize_oracle(weight_OI, theta_OG, group_size, bits)
    reached = ((codes.reshape(groups.shape) * scales[..., None] - groups) ** 2).sum(-1)
    assert np.all(reached <= errors.min(0) * (1 + 1e-5) + 1e-20)


@pytest.mark.parametrize(
    ("value", "scale"),
    [(0.0, 2.0**-14), (1e-30, 2.0**-14), (LARGE, 2.0**15), (-LARGE, 2.0**15)],
    ids=["zero", "tiny", "huge", "hugely negative"],
)
def test_groups_beyond_the_range_get_its_end(value: float, scale: float) -> None:
    weight_OI = torch.full((2, 128), value)
    theta_OG = init_theta(weight_OI)
    codes_OI, scales_OG = quantize(weight_OI, theta_OG)
    assert torch.isfinite(theta_OG).all()
    assert torch.equal(scales_OG.float(), torch.full((2, 1), scale))
    expected = 0 if abs(value) < 1 else (7 if value > 0 else -8)
    assert torch.equal(codes_OI, torch.full((2, 128), expected, dtype=torch.int8))


def test_layout_in_memory_does_not_matter() -> None:
    weight_IO = normal(256, 6)
    theta_OG = init_theta(weight_IO.T)
    assert torch.equal(theta_OG, init_theta(weight_IO.T.contiguous()))
    strided_OI = torch.zeros(12, 512)
    strided_OI[::2, ::2] = weight_IO.T
    codes_OI, scales_OG = quantize(strided_OI[::2, ::2], theta_OG)
    expected = quantize(weight_IO.T.contiguous(), theta_OG)
    assert torch.equal(codes_OI, expected[0]) and torch.equal(scales_OG, expected[1])
    assert torch.equal(dequantize(codes_OI.T.contiguous().T, scales_OG), dequantize(codes_OI, scales_OG))


def test_the_block_size_of_the_work_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    weight_OI = normal(37, 256)
    theta_OG = init_theta(weight_OI)
    whole = quantize(weight_OI, theta_OG)
    monkeypatch.setattr(grid, "_CPU_BLOCK", 1000)
    assert torch.equal(init_theta(weight_OI), theta_OG)
    assert all(torch.equal(a, b) for a, b in zip(quantize(weight_OI, theta_OG), whole, strict=True))


def test_empty_weight_is_quantized_to_nothing() -> None:
    weight_OI = torch.zeros(0, 256)
    theta_OG = init_theta(weight_OI)
    codes_OI, scales_OG = quantize(weight_OI, theta_OG)
    assert theta_OG.shape == scales_OG.shape == (0, 2) and codes_OI.shape == (0, 256)


def test_quantizing_what_was_dequantized_changes_nothing() -> None:
    weight_OI = normal(9, 384)
    theta_OG = init_theta(weight_OI)
    codes_OI, scales_OG = quantize(weight_OI, theta_OG)
    again_OI, _ = quantize(dequantize(codes_OI, scales_OG), scales_OG.float().log())
    assert torch.equal(again_OI, codes_OI)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_no_numbers_are_refused(value: float) -> None:
    weight_OI, theta_OG = normal(2, 128), torch.zeros(2, 1)
    bad_OI = weight_OI.clone()
    bad_OI[1, 3] = value
    with pytest.raises(ValueError, match="weight .* 1 NaN or infinite"):
        init_theta(bad_OI)
    with pytest.raises(ValueError, match="weight .* 1 NaN or infinite"):
        quantize(bad_OI, theta_OG)
    with pytest.raises(ValueError, match="theta .* 2 NaN or infinite"):
        quantize(weight_OI, torch.full((2, 1), value))


@pytest.mark.parametrize("bits", [0, 1, 9])
def test_bits_out_of_range_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match="bits must lie in 2..8"):
        init_theta(normal(2, 128), bits=bits)


def test_shapes_that_do_not_fit_are_refused() -> None:
    for shape, group_size in [((2, 100), 128), ((2, 128), 0), ((128,), 128), ((1, 2, 128), 128)]:
        with pytest.raises(ValueError, match="cannot be cut into groups"):
            init_theta(torch.zeros(shape), group_size)
    with pytest.raises(ValueError, match=r"theta of shape \(2, 2\) does not fit"):
        quantize(torch.zeros(2, 128), torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"scales of shape \(1, 1\) does not fit"):
        dequantize(torch.zeros(2, 128, dtype=torch.int8), torch.ones(1, 1))
