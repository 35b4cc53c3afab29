"""`Int4Linear`: right numbers on every path, the kernel that was asked for, and stored tensors left alone."""

import copy

import pytest
import torch
from torch import nn

from grace.errors import UserError
from grace.export import awq
from grace.kernels import aten, compiled, dequant, reference
from grace.kernels.crossover import DEFAULT_TOKENS
from grace.runtime.int4_linear import (
    Int4Linear,
    describe_kernels,
    int4_linears,
    set_kernel,
)


def packed_layer(
    out_features: int = 48, in_features: int = 256, bias: bool = False, kernel: str = "auto"
) -> Int4Linear:
    generator = torch.Generator().manual_seed(3)
    codes_OI = torch.randint(-8, 8, (out_features, in_features), generator=generator, dtype=torch.int8)
    scales_OG = (torch.rand(out_features, in_features // 128, generator=generator) * 0.05 + 0.01).bfloat16()
    layer = Int4Linear(in_features, out_features, bias, kernel=kernel)
    state = awq.pack(codes_OI, scales_OG)
    if bias:
        state["bias"] = torch.randn(out_features, generator=generator)
    layer.load_state_dict(state)
    return layer


def expected(layer: Int4Linear, x: torch.Tensor) -> torch.Tensor:
    y_MO = reference.matmul(
        x.reshape(-1, layer.in_features), layer.qweight, layer.qzeros, layer.scales, layer.group_size
    )
    if layer.bias is not None:
        y_MO = y_MO + layer.bias.double()
    return y_MO.view(*x.shape[:-1], layer.out_features)


def assert_close(result: torch.Tensor, oracle: torch.Tensor, tolerance: float) -> None:
    assert result.shape == oracle.shape
    assert ((result.double() - oracle).abs().max() / oracle.abs().max()).item() < tolerance


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("kernel", "dtype", "tolerance"),
    [
        ("aten", torch.bfloat16, 2**-7),
        ("dequant", torch.bfloat16, 2**-7),
        ("dequant", torch.float32, 1e-5),
        ("reference", torch.float32, 1e-6),
        ("triton", torch.bfloat16, 2**-7),
        ("auto", torch.bfloat16, 2**-7),
        ("auto", torch.float16, 2e-3),
    ],
)
def test_kernels_match_the_oracle(kernel: str, dtype: torch.dtype, tolerance: float, bias: bool):
    layer = packed_layer(bias=bias, kernel=kernel)
    for shape in [(256,), (1, 256), (3, 256), (2, 5, 256), (DEFAULT_TOKENS + 1, 256), (0, 256)]:
        x = torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        result = layer(x)
        assert result.dtype == dtype
        if result.numel():
            assert_close(result, expected(layer, x), tolerance)
        else:
            assert result.shape == (0, 48)


def test_auto_goes_by_type_and_number_of_tokens(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compiled, "obstacle", lambda: "gcc is not installed")
    layer = packed_layer()
    few, many = (
        torch.zeros(tokens, 256, dtype=torch.bfloat16) for tokens in (DEFAULT_TOKENS, DEFAULT_TOKENS + 1)
    )
    assert layer.choice(few).kernel == "aten" and layer.choice(many).kernel == "dequant"
    assert layer.choice(few.view(2, -1, 256)).kernel == "aten"
    assert layer.choice(few.float()).kernel == layer.choice(few.half()).kernel == "dequant"
    assert packed_layer(out_features=24).choice(few).kernel == "dequant"  # not a multiple of 16


def test_the_chosen_kernel_is_the_one_that_runs(monkeypatch: pytest.MonkeyPatch):
    ran = []
    for name, module in {"aten": aten, "dequant": dequant, "reference": reference}.items():

        def spy(*args, real=module.matmul, name=name, **kwargs):
            ran.append(name)
            return real(*args, **kwargs)

        monkeypatch.setattr(module, "matmul", spy)
    x = torch.zeros(2, 256, dtype=torch.bfloat16)
    for kernel in ("aten", "dequant", "reference"):
        packed_layer(kernel=kernel)(x)
    assert ran == ["aten", "dequant", "reference"]


def test_a_kernel_that_fails_raises(monkeypatch: pytest.MonkeyPatch):
    def broken(*args: object) -> None:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(compiled, "obstacle", lambda: "gcc is not installed")
    monkeypatch.setattr(aten, "matmul", broken)
    for kernel in ("auto", "aten"):
        with pytest.raises(RuntimeError, match="no such instruction"):
            packed_layer(kernel=kernel)(torch.zeros(1, 256, dtype=torch.bfloat16))


def test_a_kernel_that_cannot_run_raises():
    with pytest.raises(ValueError, match="bfloat16"):
        packed_layer(kernel="aten")(torch.zeros(1, 256))
    with pytest.raises(ValueError, match="divisible by 16"):
        packed_layer(out_features=24, kernel="aten")
    with pytest.raises(ValueError, match="unknown kernel 'marlin'"):
        Int4Linear(256, 16, kernel="marlin")
    for shape in [(200, 16), (256, 12)]:
        with pytest.raises(ValueError, match="AWQ needs"):
            Int4Linear(*shape)


def test_kernels_of_other_devices_are_refused_with_what_to_do(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    model = nn.Sequential(packed_layer())
    for kernel, message in {
        "triton": "run on a CUDA device",
        "gptqmodel": "pip install gptqmodel|CUDA device",
    }.items():
        with pytest.raises(
            UserError, match=f"kernel '{kernel}' cannot run 0 .*({message}).*choose auto or dequant"
        ):
            set_kernel(model, kernel)
    assert int4_linears(model)["0"].kernel == "auto"


def test_running_changes_nothing_that_is_stored():
    layer = packed_layer(bias=True)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    for tokens in (1, 100):
        layer(torch.randn(tokens, 256).bfloat16())
    after = layer.state_dict()
    assert set(after) == {"qweight", "qzeros", "scales", "bias"}
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_new_weights_replace_the_prepared_ones():
    layer, x = packed_layer(kernel="aten"), torch.randn(1, 256).bfloat16()
    first = layer(x)
    state = layer.state_dict()
    layer.load_state_dict(state | {"scales": state["scales"] * 2})
    assert_close(layer(x), 2 * first.double(), 1e-2)


@pytest.mark.parametrize(
    "convert", [lambda m: m.bfloat16(), lambda m: m.half(), lambda m: m.double(), copy.deepcopy]
)
def test_conversions_leave_the_packed_tensors_exact(convert):
    layer, x = packed_layer(bias=True), torch.randn(2, 256).bfloat16()
    oracle = expected(layer, x)
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer(x)
    converted = convert(nn.Sequential(layer))[0]
    for name in ("qweight", "qzeros", "scales"):
        assert torch.equal(getattr(converted, name), state[name])
        assert getattr(converted, name).dtype == state[name].dtype
    assert_close(converted(x), oracle, 2**-6)


def test_one_kernel_for_a_model_or_none(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compiled, "obstacle", lambda: "gcc is not installed")
    model = nn.Sequential(packed_layer(), nn.Linear(48, 48), packed_layer(out_features=24))
    assert set(int4_linears(model)) == {"0", "2"}
    with pytest.raises(UserError, match="cannot run 2 .*divisible by 16"):
        set_kernel(model, "aten")
    assert [layer.kernel for layer in int4_linears(model).values()] == ["auto", "auto"]
    set_kernel(model, "dequant")
    assert describe_kernels(model) == "2 packed layers: dequant"
    set_kernel(model, "auto")
    assert f"ATen int4 up to {DEFAULT_TOKENS}" in describe_kernels(model)
    assert (
        "1 packed layers (2): dequantize + dense (ATen's int4 matmul needs out_features divisible by 16"
        in (describe_kernels(model))
    )
    assert describe_kernels(nn.Linear(1, 1)) == "dense layers only"
