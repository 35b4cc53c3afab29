"""The W4 kernels by name, and which of them `auto` takes.

A kernel that is named is used for every call and raises where it cannot run; nothing falls back. `auto` decides by the
layer's shape and the activations' device, type and number, and says why.

Shape suffixes: M tokens, I input features, O output features, G groups along the input, W words (= O / 8).
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grace.kernels import aten, compiled, crossover, dequant, marlin, native, reference, w4a16

Obstacle = str | None


class Shape(NamedTuple):
    """A linear layer's."""

    in_features: int
    out_features: int
    group_size: int


class Stored(NamedTuple):
    """A layer's AWQ tensors, as they are stored."""

    qweight_IW: Tensor
    qzeros_GW: Tensor
    scales_GO: Tensor
    group_size: int


class Choice(NamedTuple):
    """A kernel, and why it."""

    kernel: str
    reason: str


@dataclass(frozen=True)
class Kernel:
    """One way to multiply. An obstacle is a text saying why it cannot, or None.

    Attributes:
        shape_obstacle, device_obstacle: of a layer; the second also says what has to be installed.
        input_obstacle: of the activations.
        matmul: x [M, I], what `prepare` made, and a bias [O] or None to x W + b [M, O] in the type of x.
        prepare: the run-time layout of a layer for activations of a type, made once; None: the stored one.
    """

    shape_obstacle: Callable[[Shape], Obstacle]
    device_obstacle: Callable[[torch.device], Obstacle]
    input_obstacle: Callable[[Tensor], Obstacle]
    matmul: Callable[[Tensor, Any, Tensor | None], Tensor]
    prepare: Callable[[Stored, torch.dtype], Any] | None = None

    def layer_obstacle(self, shape: Shape, device: torch.device) -> Obstacle:
        """Of a layer, as far as it is known before a call: tensors on `meta` may go anywhere yet."""
        found = self.shape_obstacle(shape)
        return found if found or device.type == "meta" else self.device_obstacle(device)


def _none(_: Any) -> None:
    return None


def _plus(y_MO: Tensor, bias_O: Tensor | None) -> Tensor:
    return y_MO if bias_O is None else y_MO + bias_O.to(y_MO.dtype)


def _reference(x_MI: Tensor, stored: Stored, bias_O: Tensor | None) -> Tensor:
    return _plus(reference.matmul(x_MI, *stored).to(x_MI.dtype), bias_O)


def _cpu_only(device: torch.device) -> Obstacle:
    return (
        None
        if device.type == "cpu"
        else f"ATen's int4 matmul here runs on the CPU, the weights are on {device.type}"
    )


def _compiled(device: torch.device) -> Obstacle:
    if device.type != "cpu":
        return f"the compiled kernel runs on the CPU, the weights are on {device.type}"
    return compiled.obstacle()


KERNELS: Mapping[str, Kernel] = {
    "triton": Kernel(
        lambda shape: w4a16.shape_obstacle(*shape),
        w4a16.device_obstacle,
        w4a16.input_obstacle,
        lambda x_MI, stored, bias_O: w4a16.matmul(x_MI, *stored, bias_O),
    ),
    "native": Kernel(
        lambda shape: native.shape_obstacle(*shape),
        _compiled,
        native.input_obstacle,
        lambda x_MI, weight, bias_O: _plus(native.matmul(x_MI, weight), bias_O),
        lambda stored, dtype: native.prepare([native.Awq(*stored[:3])], stored.group_size),
    ),
    "aten": Kernel(
        lambda shape: aten.shape_obstacle(shape.out_features, shape.group_size),
        _cpu_only,
        aten.input_obstacle,
        lambda x_MI, weight, bias_O: _plus(aten.matmul(x_MI, weight), bias_O),
        lambda stored, dtype: aten.prepare(*stored),
    ),
    "dequant": Kernel(
        _none, _none, _none, lambda x_MI, stored, bias_O: _plus(dequant.matmul(x_MI, *stored), bias_O)
    ),
    "reference": Kernel(_none, _none, _none, _reference),
    "gptqmodel": Kernel(
        lambda shape: marlin.shape_obstacle(shape.group_size),
        marlin.device_obstacle,
        marlin.input_obstacle,
        lambda x_MI, layer, bias_O: _plus(layer(x_MI), bias_O),
        lambda stored, dtype: marlin.prepare(*stored, dtype),
    ),
}  # fmt: skip
NAMES = ("auto", *KERNELS)


def choose(shape: Shape, x: Tensor) -> Choice:
    """What `auto` runs for these activations: the fused kernel of their device, else dequantize + dense.

    On the CPU that is the compiled kernel, which takes any number of tokens; where it cannot run ATen's, up to where
    that meets the dense product (`crossover`).
    """
    if x.device.type == "cpu":
        return _choose_on_cpu(shape, x)
    kernel = KERNELS["triton"]
    obstacle = kernel.layer_obstacle(shape, x.device) or kernel.input_obstacle(x)
    return Choice("dequant", obstacle) if obstacle else Choice("triton", "the fused kernel of this device")


def _choose_on_cpu(shape: Shape, x: Tensor) -> Choice:
    compiled = KERNELS["native"]
    if not (compiled.input_obstacle(x) or compiled.layer_obstacle(shape, x.device)):
        return Choice("native", "compiled for this processor")
    kernel = KERNELS["aten"]
    obstacle = kernel.layer_obstacle(shape, x.device) or kernel.input_obstacle(x)
    if obstacle:
        return Choice("dequant", obstacle)
    tokens = x.numel() // shape.in_features
    limit = crossover.aten_tokens(*shape)
    if tokens > limit:
        return Choice("dequant", f"{tokens} tokens, from {limit + 1} on the dense product is faster")
    return Choice("aten", "the fused kernel of this device")


def describe(shape: Shape, kernel: str, device: torch.device) -> str:
    """What a layer on a device runs, for people, with the reason where `auto` cannot run it fused."""
    if kernel != "auto":
        return kernel
    if device.type == "cuda":
        obstacle = KERNELS["triton"].layer_obstacle(shape, device)
        return f"dequantize + dense ({obstacle})" if obstacle else "Triton W4A16 (16-bit activations on CUDA)"
    compiled = KERNELS["native"].layer_obstacle(shape, device)
    if device.type == "cpu" and not compiled:
        return "compiled int4 kernel (bfloat16 activations)"
    obstacle = KERNELS["aten"].layer_obstacle(shape, device)
    if obstacle or device.type != "cpu":
        return f"dequantize + dense ({obstacle or f'no fused kernel for {device.type}'})"
    dense = "bfloat16" if dequant.cpu_multiplies_bfloat16() else "float32"
    return f"ATen int4 up to {crossover.aten_tokens(*shape)} bfloat16 tokens, else dequantize + dense {dense} (since {compiled})"


def classes(described: Iterable[tuple[str, str]]) -> list[tuple[str, int, str]]:
    """Layers grouped by what they run.

    Args:
        described: full name and text of each layer.

    Returns:
        (names without their place in the model, how many layers, the text) of each group.
    """
    found: dict[str, list[str]] = {}
    for name, text in described:
        found.setdefault(text, []).append(name.rpartition(".")[2])
    return [(", ".join(dict.fromkeys(names)), len(names), text) for text, names in found.items()]
