"""The compiled passes of a layer against float64: one rounding each, the right places of the cache and no others."""

import pytest
import torch

from grace.kernels import compiled, layer_cpu

pytestmark = pytest.mark.skipif(compiled.obstacle() is not None, reason=str(compiled.obstacle()))
HALF_STEP = 2**-8  # of bfloat16, relative, at the most


def noise(*shape: int, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).bfloat16()


def normed(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt() * weight.double()


def close(result: torch.Tensor, exact: torch.Tensor, steps: float = 1.01) -> None:
    assert (result.double() - exact).abs().le(exact.abs() * HALF_STEP * steps + 1e-6).all()


@pytest.mark.parametrize("tokens", [0, 1, 7, 40])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
def test_add_norm(tokens: int, scale: float):
    x, delta, weight = noise(tokens, 96, scale=scale), noise(tokens, 96, seed=1), noise(96, seed=2)
    total = x + delta
    given = x.clone()
    close(layer_cpu.add_norm(given, delta, weight, 1e-6), normed(total, weight, 1e-6))
    assert torch.equal(given, total)  # rounded as torch rounds it
    close(layer_cpu.add_norm(given, None, weight, 1e-6), normed(total, weight, 1e-6))
    assert torch.equal(given, total)


def test_gate():
    both = torch.cat([torch.linspace(-120, 120, 4096), torch.linspace(-3, 3, 4096)]).view(16, 512).bfloat16()
    exact = torch.nn.functional.silu(both[:, :256].double()) * both[:, 256:].double()
    close(layer_cpu.gate(both), exact)
    both[0, 0], both[1, 300], both[2, 5] = float("nan"), float("inf"), float("-inf")
    result = layer_cpu.gate(both)
    assert result[0, 0].isnan() and result[1, 44].isinf() and result.isfinite().sum() >= result.numel() - 3


@pytest.mark.parametrize("tokens", [1, 3, 20])
def test_rotate(tokens: int):
    queries, keys, size, rows, context = 6, 2, 64, 3, 30
    qkv, weight = noise(tokens, (queries + 2 * keys) * size), noise(queries + keys, size, seed=1)
    angle = torch.rand(tokens, size // 2, generator=torch.Generator().manual_seed(2)) * 6
    cos, sin = (torch.cat(pair, 1).bfloat16() for pair in ((angle.cos(),) * 2, (-angle.sin(), angle.sin())))
    cache = [torch.full((rows, keys, context, size), 7.0).bfloat16() for _ in range(2)]
    rows_T = torch.arange(tokens) % rows
    places_T = torch.arange(tokens) + 5
    query = layer_cpu.rotate(qkv, weight, cos, sin, *cache, rows_T, places_T, 1e-6)
    heads = qkv.view(tokens, -1, size)
    turned = normed(heads[:, : queries + keys], weight, 1e-6)
    turned = turned * cos.double()[:, None] + turned.roll(size // 2, -1) * sin.double()[:, None]
    bound = HALF_STEP * turned.abs().amax(-1, keepdim=True).expand_as(turned)
    assert ((query.double() - turned[:, :queries]).abs() <= bound[:, :queries]).all()
    expected = [torch.full((rows, keys, context, size), 7.0).double() for _ in range(2)]
    expected[0][rows_T, :, places_T] = turned[:, queries:]
    expected[1][rows_T, :, places_T] = heads[:, queries + keys :].double()
    assert (cache[0].double() - expected[0]).abs().max() <= bound.max()
    assert torch.equal(cache[1].double(), expected[1])
    untouched = torch.ones(rows, context, dtype=torch.bool)
    untouched[rows_T, places_T] = False
    assert (cache[0].transpose(1, 2)[untouched] == 7).all()


def test_what_would_be_read_wrongly_is_refused():
    with pytest.raises(ValueError, match="contiguous bfloat16"):
        layer_cpu.gate(torch.zeros(2, 64))
    with pytest.raises(ValueError, match="contiguous bfloat16"):
        layer_cpu.gate(noise(64, 4).t())
    with pytest.raises(ValueError, match="multiple of 32"):
        layer_cpu.add_norm(noise(2, 48), None, noise(48), 1e-6)
