"""Forward and gradients of the quantizer against numpy float64, written out from DESIGN section 4.

With r = round(W / s) and q = clip(r): dL/dW = dL/dW_hat where q = r, else 0; dL/ds sums
dL/dW_hat * (q - W / s) where q = r and dL/dW_hat * q elsewhere; dL/dtheta = s * dL/ds.
"""

import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from grace.quant import fake_quant, grid
from grace.quant.fake_quant import QuantLinear, TorchKernels, fake_quantize, use_kernels
from grace.quant.grid import dequantize, init_theta, quantize


def oracle(
    weight: Tensor, theta: Tensor, upstream: Tensor, group_size: int, bits: int
) -> dict[str, np.ndarray]:
    """W_hat, dL/dW, dL/dtheta, and the sum of the absolute terms of dL/dtheta."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    cut = (weight.shape[0], weight.shape[1] // group_size, group_size)
    w_OGS, g_OGS = (t.detach().double().numpy().reshape(cut) for t in (weight, upstream))
    with np.errstate(over="ignore"):
        s_OG1 = np.clip(np.exp(theta.detach().double().numpy()), 2.0**-14, 2.0**15)[..., None]
    mantissa, exponent = np.frexp(s_OG1)
    s_OG1 = np.ldexp(np.rint(mantissa * 256) / 256, exponent)  # eight significant bits
    rounded = np.rint(w_OGS / s_OG1)
    q = np.clip(rounded, low, high)
    inside = q == rounded
    terms = g_OGS * np.where(inside, q - w_OGS / s_OG1, q) * s_OG1
    return {
        "value": (s_OG1 * q).reshape(weight.shape),
        "weight": (g_OGS * inside).reshape(weight.shape),
        "theta": terms.sum(-1),
        "theta_size": np.abs(terms).sum(-1),
    }


def check(weight: Tensor, theta: Tensor, group_size: int, bits: int, upstream: Tensor | None = None) -> None:
    weight, theta = weight.detach().requires_grad_(), theta.detach().requires_grad_()
    if upstream is None:
        upstream = torch.randn(weight.shape, generator=torch.Generator().manual_seed(7))
    output = fake_quantize(weight, theta, group_size, bits)
    output.backward(upstream.to(output.dtype))
    expected = oracle(weight, theta, upstream, group_size, bits)
    wide = weight.dtype == torch.float64
    assert output.dtype == (torch.float64 if wide else torch.float32)
    assert np.array_equal(output.detach().double().numpy(), expected["value"])
    assert weight.grad is not None and theta.grad is not None
    assert (weight.grad.dtype, theta.grad.dtype) == (weight.dtype, theta.dtype)
    # The upstream gradient goes through untouched, or not at all (rounded once to a narrow weight's dtype).
    assert torch.equal(weight.grad, torch.from_numpy(expected["weight"]).to(weight.dtype))
    size = expected["theta_size"]
    tolerance = (1e-12 if wide and theta.dtype == torch.float64 else 1e-6) * size + 1e-37
    assert np.all(np.abs(theta.grad.double().numpy() - expected["theta"]) <= tolerance)


def normal(*shape: int, scale: float = 0.05, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


@settings(max_examples=80, deadline=None)
@given(
    outputs=st.integers(0, 6),
    groups=st.integers(1, 3),
    group_size=st.sampled_from([1, 5, 32, 128]),
    bits=st.integers(2, 8),
    log_scale=st.floats(-14, 14),
    spread=st.sampled_from([0.1, 3.0, 30.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    seed=st.integers(0, 99),
)
def test_forward_and_gradients(outputs, groups, group_size, bits, log_scale, spread, dtype, seed) -> None:
    weight_OI = normal(
        outputs, groups * group_size, scale=spread * math.exp(log_scale), seed=seed, dtype=dtype
    )
    theta_OG = normal(outputs, groups, scale=0.3, seed=seed + 1) + log_scale
    check(weight_OI, theta_OG, group_size, bits)


@pytest.mark.parametrize(
    ("ratio", "code", "weight_grad", "scale_grad"),
    [
        (7.25, 7, 1.0, -0.25),  # rounds to 7: inside, though W / s > 7
        (7.5, 7, 0.0, 7.0),  # ties to 8: outside
        (8.0, 7, 0.0, 7.0),
        (-8.0, -8, 1.0, 0.0),
        (-8.5, -8, 1.0, 0.5),  # ties to -8: inside
        (-8.75, -8, 0.0, -8.0),
        (0.5, 0, 1.0, -0.5),
        (1.5, 2, 1.0, 0.5),
        (0.0, 0, 1.0, 0.0),
    ],
)
def test_edges_of_the_range(ratio: float, code: int, weight_grad: float, scale_grad: float) -> None:
    scale = 0.25
    weight_OI = torch.full((1, 1), ratio * scale, requires_grad=True)
    theta_OG = torch.full((1, 1), math.log(scale), requires_grad=True)
    output_OI = fake_quantize(weight_OI, theta_OG, group_size=1)
    output_OI.backward(torch.full((1, 1), 3.0))
    assert weight_OI.grad is not None and theta_OG.grad is not None
    assert output_OI.item() == code * scale
    assert weight_OI.grad.item() == 3.0 * weight_grad
    assert theta_OG.grad.item() == pytest.approx(3.0 * scale_grad * scale)


@pytest.mark.parametrize(
    "theta", [-100.0, -9.71, 10.4, 100.0], ids=["far below", "below", "above", "far above"]
)
@pytest.mark.parametrize("scale", [1e-30, 1e-4, 1.0, 1e5, 1e30])
def test_clamped_scales_keep_their_gradient(theta: float, scale: float) -> None:
    check(normal(3, 256, scale=scale), torch.full((3, 2), theta), 128, 4)


def test_zero_groups_have_finite_gradients() -> None:
    weight_OI = torch.zeros(2, 256)
    weight_OI[0, :128] = normal(128)
    check(weight_OI, init_theta(weight_OI), 128, 4)


def test_float64_all_through() -> None:
    weight_OI = normal(4, 384, dtype=torch.float64)
    check(weight_OI, init_theta(weight_OI).double() + 0.01, 128, 4)


def test_layout_in_memory_does_not_matter() -> None:
    weight_IO = normal(256, 6)
    theta_OG = init_theta(weight_IO.T).T.contiguous().T
    check(weight_IO.T, theta_OG, 128, 4, upstream=torch.ones(1, 1).expand(6, 256))  # as from .sum()
    check(weight_IO.T, theta_OG, 128, 4, upstream=normal(256, 6, seed=3).T)


def test_the_block_size_of_the_work_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid, "_CPU_BLOCK", 1000)
    weight_OI = normal(37, 256)
    check(weight_OI, init_theta(weight_OI) - 0.3, 128, 4)


@pytest.mark.parametrize("trained", ["weight", "theta"])
def test_either_input_can_be_frozen(trained: str) -> None:
    weight_OI, theta_OG = normal(2, 128), torch.zeros(2, 1) - 3
    inputs = {"weight": weight_OI, "theta": theta_OG}
    inputs[trained].requires_grad_()
    fake_quantize(weight_OI, theta_OG).sum().backward()
    assert [name for name, tensor in inputs.items() if tensor.grad is not None] == [trained]


def test_values_are_those_of_the_exported_codes() -> None:
    weight_OI = normal(16, 384)
    theta_OG = init_theta(weight_OI) + normal(16, 3, scale=0.2, seed=1)
    assert torch.equal(fake_quantize(weight_OI, theta_OG), dequantize(*quantize(weight_OI, theta_OG)))


NARROW = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", NARROW)
def test_a_narrow_result_is_the_exact_one_rounded_once(dtype: torch.dtype, bits: int) -> None:
    weight_OI, theta_OG = normal(37, 384, scale=0.02 * 2**bits), normal(37, 3, scale=0.3, seed=1) - 3
    exact_OI = dequantize(*quantize(weight_OI, theta_OG, bits=bits))
    for weight in (weight_OI, weight_OI.double()):
        output_OI = fake_quantize(weight, theta_OG, bits=bits, dtype=dtype)
        assert output_OI.dtype == dtype and torch.equal(output_OI, exact_OI.to(dtype))


@pytest.mark.parametrize("dtype", NARROW)
def test_a_narrow_upstream_gradient_is_used_as_it_comes(dtype: torch.dtype) -> None:
    weight_OI = normal(37, 384).requires_grad_()
    theta_OG = (init_theta(weight_OI) - 0.2).requires_grad_()
    upstream_OI = normal(37, 384, scale=1.0, seed=2, dtype=dtype)
    fake_quantize(weight_OI, theta_OG, dtype=dtype).backward(upstream_OI)
    narrow = weight_OI.grad, theta_OG.grad
    weight_OI.grad = theta_OG.grad = None
    fake_quantize(weight_OI, theta_OG).backward(upstream_OI.float())
    for ours, theirs in zip(narrow, (weight_OI.grad, theta_OG.grad), strict=True):
        assert ours is not None and theirs is not None and torch.equal(ours, theirs)


class LargeResults(TorchDispatchMode):
    """Notes the dtype of every result of at least `size` elements."""

    def __init__(self, size: int):
        super().__init__()
        self.size, self.dtypes = size, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.numel() >= self.size and not func.is_view:
            self.dtypes.append(result.dtype)
        return result


def test_nothing_is_kept_but_the_inputs_and_no_float32_weight_is_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(grid, "_CPU_BLOCK", 1024)
    weight_OI = normal(64, 512).requires_grad_()
    theta_OG = init_theta(weight_OI).requires_grad_()
    saved: list[Tensor] = []
    noting = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t)
    with noting, LargeResults(weight_OI.numel()) as forward:
        output_OI = fake_quantize(weight_OI, theta_OG, dtype=torch.bfloat16)
    with LargeResults(weight_OI.numel()) as backward:
        grads = torch.autograd.grad(output_OI, [weight_OI, theta_OG], torch.ones_like(output_OI))
    assert [t.data_ptr() for t in saved] == [weight_OI.data_ptr(), theta_OG.data_ptr()]
    assert set(forward.dtypes) == {torch.bfloat16}
    assert (
        backward.dtypes.count(torch.float32) == 1 and grads[0].dtype == torch.float32
    )  # the gradient itself


def test_kernels_of_a_device_are_used_when_they_were_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    class Counting(TorchKernels):
        def forward(self, *args: Any) -> Tensor:
            calls.append("forward")
            return TorchKernels.forward(*args)

        def backward(self, *args: Any) -> tuple[Tensor, Tensor]:
            calls.append("backward")
            return TorchKernels.backward(*args)

    monkeypatch.setattr(fake_quant, "_kernels", {})
    use_kernels("cpu", Counting())
    weight_OI = normal(2, 128).requires_grad_()
    fake_quantize(weight_OI.double(), torch.zeros(2, 1)).sum().backward()
    assert calls == []
    fake_quantize(weight_OI, torch.zeros(2, 1)).sum().backward()
    assert calls == ["forward", "backward"]


def test_importing_the_quantizer_needs_no_triton() -> None:
    code = "import sys, grace.quant.fake_quant; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_nan_reaches_the_output() -> None:
    weight_OI = normal(2, 128)
    weight_OI[1, 5] = torch.nan
    output_OI = fake_quantize(weight_OI, torch.zeros(2, 1))
    assert torch.isnan(output_OI).nonzero().tolist() == [[1, 5]]


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        fake_quantize(torch.zeros(2, 256), torch.zeros(2, 1))
    with pytest.raises(ValueError, match="bits must lie in"):
        fake_quantize(torch.zeros(2, 128), torch.zeros(2, 1), bits=1)
    with pytest.raises(ValueError, match="floating dtype, not to torch.int8"):
        fake_quantize(torch.zeros(2, 128), torch.zeros(2, 1), dtype=torch.int8)


# ---------------------------------------------------------------- the layer


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_from_a_linear(bias: bool, dtype: torch.dtype) -> None:
    linear = nn.Linear(256, 24, bias=bias, dtype=dtype).eval()
    layer = QuantLinear.from_linear(linear, bits=4, group_size=128, name="q")
    assert torch.equal(layer.weight, linear.weight.float()) and layer.weight.dtype == torch.float32
    assert torch.equal(layer.theta, init_theta(linear.weight)) and layer.theta.requires_grad
    assert layer.bias is linear.bias and not layer.training
    x = normal(3, 5, 256, scale=1.0, seed=2)
    weight_OI = dequantize(*layer.codes_and_scales())
    expected = x.double() @ weight_OI.double().T + (linear.bias.double() if bias else 0)
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-6)
    assert layer(x.bfloat16()).dtype == torch.bfloat16


def test_layer_trains_its_weight_scales_and_bias() -> None:
    layer = QuantLinear(128, 8, name="q")
    x = normal(4, 128, scale=1.0)
    layer(x).square().sum().backward()
    with torch.no_grad():
        upstream_OI = 2 * layer(x).T @ x  # d/dW of sum |x W^T + b|^2
    expected = oracle(layer.weight, layer.theta, upstream_OI, 128, 4)
    assert layer.weight.grad is not None and layer.theta.grad is not None and layer.bias.grad is not None
    np.testing.assert_allclose(layer.weight.grad.numpy(), expected["weight"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        layer.theta.grad.numpy(), expected["theta"], rtol=1e-4, atol=1e-5 * expected["theta_size"].max()
    )
    torch.testing.assert_close(layer.bias.grad, 2 * layer(x).detach().sum(0))


@pytest.mark.parametrize("input_dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_layer_multiplies_in_the_dtype_of_an_autocast(
    input_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What autocast makes of a float32 W_hat, without there being one."""
    monkeypatch.setattr(grid, "_CPU_BLOCK", 256)
    layer = QuantLinear(256, 24, name="q")
    x = normal(5, 256, scale=1.0, seed=2, dtype=input_dtype).requires_grad_()

    def cast_by_autocast() -> Tensor:
        weight_OI = fake_quantize(layer.weight, layer.theta)
        if input_dtype == torch.float64:  # autocast leaves these alone
            return F.linear(x, weight_OI.double(), layer.bias.double())
        return F.linear(x, weight_OI, layer.bias)

    with torch.autocast("cpu", torch.bfloat16), LargeResults(layer.weight.numel()) as made:
        layer(x)
    assert set(made.dtypes) == {torch.float64 if input_dtype == torch.float64 else torch.bfloat16}

    results = []
    for forward in (lambda: layer(x), cast_by_autocast):
        with torch.autocast("cpu", torch.bfloat16):
            output = forward()
        leaves = [x, layer.weight, layer.theta, layer.bias]
        grads = torch.autograd.grad(output.float().square().sum(), leaves)
        results.append([output, *grads])
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


def test_layer_without_memory_has_shapes() -> None:
    layer = QuantLinear(256, 24, device="meta")
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(torch.empty(3, 256, device="meta", dtype=torch.bfloat16))
    output.sum().backward()
    assert output.shape == (3, 24) and output.dtype == torch.bfloat16
    assert layer.theta.grad is not None and layer.theta.grad.shape == (24, 2)


class Plain(nn.Module):
    """The layer as the equations have it: autograd through whole float32 tensors, one STE per line."""

    def __init__(self, layer: QuantLinear):
        super().__init__()
        self.weight, self.theta = (nn.Parameter(p.detach().clone()) for p in (layer.weight, layer.theta))

    def forward(self, x: Tensor) -> Tensor:
        scale_OG = self.theta.exp()
        scale_OG = (scale_OG + (grid.snapped_scale(self.theta) - scale_OG).detach()).unsqueeze(-1)
        ratio_OGS = grid.grouped(self.weight, 128) / scale_OG
        rounded_OGS = ratio_OGS + (ratio_OGS.round() - ratio_OGS).detach()
        return F.linear(x, (rounded_OGS.clamp(-8, 7) * scale_OG).reshape(self.weight.shape))


def test_steps_equal_the_plain_paths_with_accumulation_checkpoints_and_evaluation() -> None:
    """Three AdamW steps of three micro-batches each; latents, scales and losses to fp32 rounding."""
    torch.manual_seed(0)
    ours = nn.Sequential(*(QuantLinear(256, 256, bias=False, name=str(i)) for i in range(2)))
    plain = nn.Sequential(*(Plain(layer) for layer in ours))
    for module in (*ours, *plain):
        module.theta.data -= 0.5  # so that much is clipped
    plain_optimizer, our_optimizer = (
        torch.optim.AdamW(m.parameters(), lr=1e-3, eps=1e-4) for m in (plain, ours)
    )
    for step in range(3):
        for micro_batch in range(3):
            x = normal(16, 256, scale=1.0, seed=10 * step + micro_batch)
            target = plain(x).tanh().square().mean()
            target.backward()
            hidden = x.requires_grad_()
            for layer in ours:
                hidden = checkpoint(layer, hidden, use_reentrant=False)
            loss = hidden.tanh().square().mean()
            with torch.no_grad():  # evaluation between forward and backward
                evaluated = ours.eval()(x)
            ours.train()
            loss.backward()
            torch.testing.assert_close(loss, target, rtol=1e-5, atol=1e-7)
            torch.testing.assert_close(evaluated, hidden)
        for optimizer in (plain_optimizer, our_optimizer):
            optimizer.step()
            optimizer.zero_grad()
        for our, theirs in zip(ours.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(our, theirs, rtol=1e-5, atol=1e-6)


def test_layer_that_cannot_be_quantized_is_named() -> None:
    for make in (
        lambda: QuantLinear(100, 8, name="model.layers.3.q_proj"),
        lambda: QuantLinear.from_linear(nn.Linear(100, 8), name="model.layers.3.q_proj"),
    ):
        with pytest.raises(ValueError, match=r"model\.layers\.3\.q_proj: 100 inputs .* groups of 128"):
            make()
    linear = nn.Linear(128, 8)
    linear.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="^q: weight"):
        QuantLinear.from_linear(linear, name="q")
    layer = QuantLinear(128, 8, name="q")
    layer.theta.data[0] = torch.inf
    with pytest.raises(ValueError, match="^q: theta"):
        layer.codes_and_scales()
