"""What is measured of quantized weights equals what the codes and scales say."""

import math

import pytest
import torch
from torch import nn

from grace.quant.fake_quant import QuantLinear
from grace.quant.grid import dequantize, quantize, rounded_ratio, snapped_scale
from grace.quant.health import QuantHealth


def layer(rows: int, columns: int, seed: int = 0, bits: int = 4) -> QuantLinear:
    torch.manual_seed(seed)
    return QuantLinear.from_linear(nn.Linear(columns, rows, bias=False), bits, 32, f"layer{seed}")


def move(one: QuantLinear, seed: int = 7) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        one.weight.add_(0.3 * one.weight.std() * torch.randn_like(one.weight))
        one.theta.add_(0.1 * torch.randn_like(one.theta))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_numbers_are_those_of_codes_and_scales(bits):
    one = layer(24, 64, bits=bits)
    theta_0 = one.theta.detach().clone()
    before, _ = quantize(one.weight, one.theta, 32, bits)
    watched = QuantHealth({"one": one})
    move(one)
    found = watched.health(watched.sums()).layers["one"]
    codes, scales = quantize(one.weight, one.theta, 32, bits)
    weight = one.weight.detach().double()
    noise = (weight - dequantize(codes, scales, 32).double()).square().sum()
    ratio = rounded_ratio(one.weight.detach().view(24, 2, 32), snapped_scale(one.theta))
    outside = (ratio < -(2 ** (bits - 1))) | (ratio > 2 ** (bits - 1) - 1)
    assert found.snr_db == pytest.approx(10 * math.log10(weight.square().sum() / noise), rel=1e-6)
    assert found.clipped == outside.double().mean().item()
    assert bits == 8 or found.clipped > 0
    assert found.flipped == (codes != before).double().mean().item() > 0
    assert found.scale_drift == pytest.approx((one.theta - theta_0).abs().mean().item(), rel=1e-5)


def test_flips_are_counted_from_the_last_measurement():
    one = layer(8, 64)
    watched = QuantHealth({"one": one})
    move(one)
    assert watched.health(watched.sums()).layers["one"].flipped > 0
    again = watched.health(watched.sums()).layers["one"]
    assert again.flipped == 0 and again.scale_drift > 0  # drift is counted from the start


def test_interrupted_run_counts_the_same_flips():
    one = layer(8, 64)
    watched = QuantHealth({"one": one})
    move(one, seed=1)
    watched.sums()
    state = {name: codes.clone() for name, codes in watched.state().items()}
    move(one, seed=2)
    resumed = QuantHealth({"one": one})
    resumed.load_state(state)
    assert (
        resumed.health(resumed.sums()).layers["one"].flipped
        == watched.health(watched.sums()).layers["one"].flipped
        > 0
    )


def test_state_of_other_layers_or_shapes_is_passed_over():
    watched = QuantHealth({"one": layer(8, 64)})
    watched.load_state(
        {"two": torch.zeros(8, 2, 32, dtype=torch.int8), "one": torch.zeros(4, 2, 32, dtype=torch.int8)}
    )
    assert watched.health(watched.sums()).layers["one"].flipped == 0


def test_layers_together_are_weighted_by_their_size():
    layers = {"small": layer(4, 32), "large": layer(64, 64, seed=1)}
    watched = QuantHealth(layers)
    for one in layers.values():
        move(one)
    found = watched.health(watched.sums())
    sizes = {name: one.weight.numel() for name, one in layers.items()}
    expected = sum(found.layers[name].clipped * size for name, size in sizes.items()) / sum(sizes.values())
    assert found.together is not None and found.together.clipped == pytest.approx(expected, rel=1e-9)
    low, high = sorted(one.snr_db for one in found.layers.values())
    assert low <= found.together.snr_db <= high


def test_large_layers_are_sampled_and_come_close():
    one = layer(512, 128)
    whole, part = QuantHealth({"one": one}), QuantHealth({"one": one}, sampled=16384)
    assert part.codes["one"].numel() == 16384
    move(one)
    full, sampled = (watched.health(watched.sums()).layers["one"] for watched in (whole, part))
    assert sampled.snr_db == pytest.approx(full.snr_db, abs=0.2)
    assert sampled.clipped == pytest.approx(full.clipped, abs=0.01)
    assert sampled.flipped == pytest.approx(full.flipped, abs=0.02)
    assert sampled.scale_drift == pytest.approx(full.scale_drift, rel=0.05)


def test_halves_of_a_sharded_layer_add_up_to_it():
    one = layer(32, 64)
    halves = []
    for rows in (slice(0, 16), slice(16, 32)):
        half = layer(16, 64)
        half.weight.data, half.theta.data = one.weight.data[rows].clone(), one.theta.data[rows].clone()
        halves.append(half)
    whole, parts = QuantHealth({"one": one}), [QuantHealth({"one": half}) for half in halves]
    with torch.no_grad():
        for target in (one, *halves):
            target.theta.add_(0.2)
    joined = parts[0].health(parts[0].sums() + parts[1].sums()).layers["one"]
    alone = whole.health(whole.sums()).layers["one"]
    assert vars(joined) == pytest.approx(vars(alone), rel=1e-6)


def test_layer_of_which_nothing_is_here():
    one = layer(8, 64)
    one.weight, one.theta = nn.Parameter(torch.empty(0)), nn.Parameter(torch.empty(0))
    watched = QuantHealth({"one": one})
    found = watched.health(watched.sums())
    assert found.together is None and found.layers == {}


def test_weights_on_the_grid_have_no_noise():
    one = layer(8, 64)
    one.weight.data = dequantize(*one.codes_and_scales(), 32)
    watched = QuantHealth({"one": one})
    assert watched.health(watched.sums()).layers["one"].snr_db == math.inf
