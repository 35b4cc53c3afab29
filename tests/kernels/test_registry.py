"""Kernels by name: what each cannot run is said before it runs, and `auto` says what it takes."""

import importlib.util
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from grace.kernels import marlin, registry
from grace.kernels.crossover import DEFAULT_TOKENS
from grace.kernels.registry import KERNELS, NAMES, Shape, choose, describe

SHAPE = Shape(256, 48, 128)
CPU, CUDA, META = (torch.device(kind) for kind in ("cpu", "cuda", "meta"))


def activations(tokens: int = 1, dtype: torch.dtype = torch.bfloat16, device: str = "cpu") -> Any:
    """Stands in for a tensor on a device that is not there."""
    return SimpleNamespace(device=torch.device(device), dtype=dtype, numel=lambda: tokens * SHAPE.in_features)


def test_names():
    assert NAMES == ("auto", "triton", "native", "aten", "dequant", "reference", "gptqmodel")


@pytest.mark.parametrize(
    ("shape", "x", "kernel", "reason"),
    [
        (SHAPE, activations(), "aten", "fused"),
        (SHAPE, activations(DEFAULT_TOKENS + 1), "dequant", "from 129 on the dense product is faster"),
        (SHAPE, activations(dtype=torch.float16), "dequant", "bfloat16 only"),
        (Shape(256, 24, 128), activations(), "dequant", "divisible by 16"),
        (SHAPE, activations(device="cuda"), "triton", "fused"),
        (SHAPE, activations(4096, torch.float16, "cuda"), "triton", "fused"),
        (SHAPE, activations(dtype=torch.float32, device="cuda"), "dequant", "activations are torch.float32"),
        (Shape(256, 48, 256), activations(device="cuda"), "dequant", "groups of"),
        (SHAPE, activations(device="mps"), "dequant", "run on a CUDA device"),
    ],
)
def test_auto_and_its_reasons(
    shape: Shape, x: Any, kernel: str, reason: str, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(registry.compiled, "obstacle", lambda: "gcc is not installed")
    choice = choose(shape, cast(torch.Tensor, x))
    assert choice.kernel == kernel and reason in choice.reason


def test_auto_takes_the_compiled_kernel_for_any_number_of_tokens(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(registry.compiled, "obstacle", lambda: None)
    for tokens in (1, 4096):
        assert choose(SHAPE, activations(tokens)).kernel == "native"
    assert choose(SHAPE, activations(dtype=torch.float32)).kernel == "dequant"
    assert choose(Shape(256, 48, 256), activations()).kernel == "aten"
    assert "compiled int4 kernel" in describe(SHAPE, "auto", CPU)
    assert "on the CPU, the weights are on cuda" in str(KERNELS["native"].layer_obstacle(SHAPE, CUDA))


def test_described_for_people(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(registry.compiled, "obstacle", lambda: "gcc is not installed")
    assert "since gcc is not installed" in describe(SHAPE, "auto", CPU)
    assert "ATen int4 up to" in describe(SHAPE, "auto", CPU)
    assert describe(Shape(256, 24, 128), "auto", CPU).startswith(
        "dequantize + dense (ATen's int4 matmul needs"
    )
    assert "Triton" in describe(SHAPE, "auto", CUDA)
    monkeypatch.setattr(registry.w4a16, "_INSTALLED", False)
    assert "pip install triton" in describe(SHAPE, "auto", CUDA)
    assert describe(SHAPE, "reference", CUDA) == "reference"


def test_classes_of_layers():
    described = [("a.0.q", "fused"), ("a.0.k", "dense"), ("a.1.q", "fused"), ("a.1.o", "fused")]
    assert registry.classes(described) == [("q, o", 3, "fused"), ("k", 1, "dense")]


def test_what_a_layer_cannot_run_is_known_before(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "on a CUDA device, the weights are on cpu" in str(KERNELS["triton"].layer_obstacle(SHAPE, CPU))
    assert KERNELS["triton"].layer_obstacle(SHAPE, META) is None
    assert "groups" in str(KERNELS["triton"].layer_obstacle(Shape(256, 48, 16), META))
    assert "on the CPU, the weights are on cuda" in str(KERNELS["aten"].layer_obstacle(SHAPE, CUDA))
    for name in ("dequant", "reference"):
        assert KERNELS[name].layer_obstacle(SHAPE, CUDA) is None


class FakeMarlin(torch.nn.Module):
    """gptqmodel's class as far as it is used: takes the AWQ tensors as parameters, repacks in place."""

    usable: tuple[bool, Exception | None] = (True, None)

    def __init__(self, **settings: Any):
        super().__init__()
        self.settings = settings

    @classmethod
    def validate_once(cls) -> tuple[bool, Exception | None]:
        return cls.usable

    @classmethod
    def validate_device(cls, device: torch.device) -> None:
        raise NotImplementedError("Marlin kernel only supports compute capability >= 8.0.")

    def post_init(self) -> None:
        self.get_parameter("qweight").data.zero_()


def test_marlin_is_not_there(monkeypatch: pytest.MonkeyPatch):
    if importlib.util.find_spec("gptqmodel") is None:
        assert "pip install gptqmodel==" in str(marlin.device_obstacle(CUDA))
    monkeypatch.setattr(marlin.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(marlin, "_layer_class", lambda: FakeMarlin)
    assert "weights are on cpu" in str(marlin.device_obstacle(CPU))
    assert "capability >= 8.0" in str(marlin.device_obstacle(CUDA))
    monkeypatch.setattr(FakeMarlin, "usable", (False, ImportError("no nvcc")))
    assert "no nvcc" in str(marlin.device_obstacle(CUDA))
    assert "groups" in str(marlin.shape_obstacle(256)) and marlin.shape_obstacle(64) is None
    assert "float32" in str(marlin.input_obstacle(torch.zeros(1))) and not marlin.input_obstacle(
        torch.zeros(1).half()
    )


def test_marlin_gets_copies(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(marlin, "_layer_class", lambda: FakeMarlin)
    stored = (
        torch.ones(256, 6, dtype=torch.int32),
        torch.ones(2, 6, dtype=torch.int32),
        torch.ones(2, 48).half(),
    )
    layer = marlin.prepare(*stored, 128, torch.bfloat16)
    assert layer.settings["in_features"] == 256 and layer.settings["out_features"] == 48
    assert layer.scales.dtype == torch.bfloat16 and layer.bias is None
    assert (layer.qweight == 0).all() and (stored[0] == 1).all()
