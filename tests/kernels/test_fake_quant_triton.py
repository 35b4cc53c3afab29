"""The Triton quantizer against the torch one and the grid; on a CPU under Triton's interpreter.

The same bits of W_hat and of the weight's gradient, theta's gradient to rounding.
"""

import math
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from grace.quant import fake_quant, grid
from grace.quant.fake_quant import TorchKernels, fake_quantize

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
fake_quant_triton = pytest.importorskip("grace.kernels.fake_quant_triton")
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def normal(*shape: int, scale: float = 1.0, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def check(weight_OI: Tensor, theta_OG: Tensor, group_size: int, bits: int, dtype: torch.dtype) -> None:
    """Both directions of both implementations, NaN where the other has one."""
    upstream_OI = normal(*weight_OI.shape, seed=5, dtype=dtype)
    settings = (group_size, bits)
    expected = TorchKernels.forward(weight_OI, theta_OG, *settings, dtype)
    on_device = [t.to(DEVICE) for t in (weight_OI, theta_OG, upstream_OI)]
    output = fake_quant_triton.forward(*on_device[:2], *settings, dtype).cpu()
    assert output.dtype == dtype
    torch.testing.assert_close(output, expected, rtol=0, atol=0, equal_nan=True)

    grads = TorchKernels.backward(weight_OI, theta_OG, upstream_OI, *settings)
    ours = [grad.cpu() for grad in fake_quant_triton.backward(*on_device, *settings)]
    assert [grad.dtype for grad in ours] == [weight_OI.dtype, theta_OG.dtype]
    number = ~weight_OI.isnan()  # the gradient of a NaN is of no use to anyone
    torch.testing.assert_close(ours[0][number], grads[0][number], rtol=0, atol=0)
    tolerance_OG = 1e-6 * sizes(weight_OI, theta_OG, upstream_OI, *settings)
    agree_OG = (ours[1] - grads[1]).abs() <= tolerance_OG
    assert (agree_OG | (ours[1].isnan() & grads[1].isnan()) | (ours[1] == grads[1])).all()


def sizes(weight_OI: Tensor, theta_OG: Tensor, upstream_OI: Tensor, group_size: int, bits: int) -> Tensor:
    """Sum of the absolute terms of dL/dtheta: what its rounding is relative to."""
    low, high = grid.code_range(bits)
    weight_OGS, upstream_OGS = (grid.grouped(t, group_size).double() for t in (weight_OI, upstream_OI))
    scale_OG1 = grid.snapped_scale(theta_OG).double().unsqueeze(-1)
    rounded_OGS = (weight_OGS / scale_OG1).round()
    codes_OGS = rounded_OGS.clamp(low, high)
    inside_OGS = rounded_OGS == codes_OGS
    return (upstream_OGS * (codes_OGS * scale_OG1 - weight_OGS.where(inside_OGS, 0.0))).abs().sum(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize(
    ("outputs", "groups", "group_size"), [(5, 3, 32), (33, 1, 64), (7, 5, 128), (3, 2, 96), (2, 1, 3000)]
)
def test_both_directions(outputs, groups, group_size, bits, dtype) -> None:
    weight_OI = normal(outputs, groups * group_size, scale=0.02 * 2**bits)
    theta_OG = normal(outputs, groups, scale=0.5, seed=1) - 3
    check(weight_OI, theta_OG, group_size, bits, dtype)


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float16])
def test_narrow_weights(weight_dtype: torch.dtype) -> None:
    check(normal(4, 256, dtype=weight_dtype), normal(4, 2, seed=1) - 1, 128, 4, torch.float32)


def test_odd_layouts_and_nothing_at_all() -> None:
    check(normal(256, 6).T, normal(2, 6, seed=1).T - 1, 128, 4, torch.bfloat16)
    check(normal(0, 256), normal(0, 2), 128, 4, torch.bfloat16)
    weight_OI, theta_OG = normal(3, 128).to(DEVICE), torch.zeros(3, 1, device=DEVICE)
    ones_OI = torch.ones(1, 1, device=DEVICE)
    expanded = fake_quant_triton.backward(weight_OI, theta_OG, ones_OI.expand(3, 128), 128, 4)
    dense = fake_quant_triton.backward(weight_OI, theta_OG, ones_OI.repeat(3, 128), 128, 4)
    assert all(torch.equal(a, b) for a, b in zip(expanded, dense, strict=True))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_ties_and_their_neighbours(bits: int) -> None:
    """(k + 1/2) s and the floats beside it, for scales of every significand, codes against the grid's."""
    scales = torch.arange(128, 256)[:, None] * 2.0 ** torch.arange(-20, 8, 5)[None, :]
    scale_O1 = scales.reshape(-1, 1)
    halves_K = torch.arange(-(2 ** (bits - 1)) - 2, 2 ** (bits - 1) + 2) + 0.5
    ties_OK = scale_O1 * halves_K
    beside = [torch.nextafter(ties_OK, torch.full_like(ties_OK, end)) for end in (-torch.inf, torch.inf)]
    weight_OI, theta_O1 = torch.cat([ties_OK, *beside], 1), scale_O1.log()
    assert torch.equal(grid.snapped_scale(theta_O1), scale_O1)
    check(weight_OI, theta_O1, weight_OI.shape[1], bits, torch.float32)
    exported = grid.dequantize(
        *grid.quantize(weight_OI, theta_O1, weight_OI.shape[1], bits), weight_OI.shape[1]
    )
    output = fake_quant_triton.forward(
        weight_OI.to(DEVICE), theta_O1.to(DEVICE), weight_OI.shape[1], bits, torch.float32
    )
    assert torch.equal(output.cpu(), exported)


def test_scales_beside_the_midpoints_between_two_bfloat16() -> None:
    midpoints_K = (torch.arange(128, 256).double() + 0.5) * 2.0**-10
    around = midpoints_K.log().float()[:, None].repeat(1, 9).contiguous()
    for column in range(9):
        for _ in range(abs(column - 4)):
            end = torch.tensor(math.inf if column > 4 else -math.inf)
            around[:, column] = torch.nextafter(around[:, column], end)
    check(normal(128, 9 * 32, scale=0.3), around, 32, 4, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_extremes_and_what_is_no_number(dtype: torch.dtype) -> None:
    extremes = [0.0, -0.0, 1e-45, 1e-38, 2.0**22, 2.0**22 + 0.5, 2.0**23 + 1, 1e30, 3.4e38, math.inf]
    row = torch.tensor([sign * value for sign in (1, -1) for value in extremes] + [math.nan] + 10 * [0.3])
    all_ones = torch.tensor([2**31 - 1], dtype=torch.int32).view(torch.float32)  # a GPU's own NaN
    row = torch.cat([row, all_ones])
    thetas = torch.tensor([-math.inf, -100.0, -9.71, -3.0, 0.0, 10.4, 100.0, math.inf, math.nan])
    with_nan_OI = row.repeat(len(thetas), 1)
    check(with_nan_OI, thetas[:, None], 32, 4, dtype)
    check(with_nan_OI.nan_to_num(0.1, math.inf, -math.inf), thetas[:, None], 32, 4, dtype)


def test_an_upstream_gradient_that_is_no_number_is_not_hidden() -> None:
    weight_OI, theta_OG = normal(2, 256, scale=0.1).to(DEVICE), torch.full((2, 2), -3.0, device=DEVICE)
    upstream_OI = normal(2, 256, seed=1).to(DEVICE)
    upstream_OI[1, 130] = math.nan
    grad_weight_OI, grad_theta_OG = fake_quant_triton.backward(weight_OI, theta_OG, upstream_OI, 128, 4)
    assert grad_weight_OI.isnan().nonzero().tolist() == [[1, 130]]
    assert grad_theta_OG.isnan().nonzero().tolist() == [[1, 1]]


def test_through_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    results = {}
    for name, kernels in {"torch": TorchKernels(), "triton": fake_quant_triton}.items():
        monkeypatch.setitem(fake_quant._kernels, DEVICE, kernels)
        weight_OI = normal(6, 256, scale=0.1).to(DEVICE).requires_grad_()
        theta_OG = (normal(6, 2, scale=0.3, seed=1) - 3).to(DEVICE).requires_grad_()
        output_OI = fake_quantize(weight_OI, theta_OG, dtype=torch.bfloat16)
        output_OI.float().square().sum().backward()
        results[name] = [output_OI.detach(), weight_OI.grad, theta_OG.grad]
    for ours, theirs in zip(results["triton"], results["torch"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_a_large_weight_and_the_scales_of_both_devices() -> None:
    """Sizes that no interpreter gets through: the same codes on CPU and GPU."""
    weight_OI, theta_OG = normal(2048, 6144, scale=0.05), normal(2048, 48, scale=0.5, seed=1) - 4
    check(weight_OI, theta_OG, 128, 4, torch.bfloat16)


COMPILE = """
import re, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from grace.kernels import fake_quant_triton as kernels
pointers = {"_forward_kernel": ("*fp32", "*fp32", "*bf16"),
            "_backward_kernel": ("*fp32", "*fp32", "*bf16", "*fp32", "*fp32")}
for name, types in pointers.items():
    kernel = getattr(kernels, name)
    kinds = [*types, "i32", "fp32", "fp32", "constexpr", "constexpr", "constexpr"]
    source = ASTSource(fn=kernel, signature=dict(zip(kernel.arg_names, kinds, strict=True)),
                       constexprs={"GROUP": 128, "N": 16, "S": 128},
                       attrs={(i,): [["tt.divisibility", 16]] for i in range(len(types))})
    for capability in (80, 90):
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
        ptx = compiled.asm["ptx"]
        assert set(re.findall(r"div[.][a-z.]+[.]f32", ptx)) == {"div.rn.f32"}
        assert "ld.global.v4" in ptx and "st.global.v4" in ptx
        assert len(compiled.asm["cubin"]) > 0
"""


@pytest.mark.slow
def test_compiles_to_true_divisions_and_wide_accesses() -> None:
    """Without a GPU. The division decides which code a weight near a tie gets."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
