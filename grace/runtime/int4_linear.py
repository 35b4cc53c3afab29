"""A linear layer on AWQ tensors, with its kernel chosen explicitly.

The stored tensors (`qweight`, `qzeros`, `scales`) are never touched: what a kernel wants in another
layout is made once beside them and is not saved, so a model saved after it has run is the model that
was loaded.

Shape suffixes: M tokens, I input features, O output features, G groups along the input, W words (= O / 8).
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from grace.errors import UserError
from grace.kernels import aten, dequant, reference

KERNELS = ("auto", "aten", "dequant", "reference")

# `auto` multiplies up to this many tokens with ATen's fused kernel, more by dequantizing first: where the
# two meet in benchmarks/int4_cpu.py at the linear shapes of the 2B model, one core of an AVX-512 EPYC with
# bfloat16 arithmetic: 133 and 136 in two runs. The same processor held to AVX2, where the dense product is fp32: about 130.
ATEN_MAX_TOKENS = 128


class Int4Linear(nn.Module):
    """y = x W + b with W[i, o] = scales[i // g, o] * (q[i, o] - zeros[i // g, o]); inference only.

    Args:
        in_features, out_features: multiples of `group_size` and of 8.
        bias: whether the layer has one.
        group_size: inputs per scale.
        kernel: one of `KERNELS`. `auto` picks per call, by the rule in `chosen_kernel`; any other
            choice is used for every call, and raises where it cannot run.

    Raises:
        ValueError: a shape that the format cannot hold, or an unknown kernel.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        group_size: int = 128,
        kernel: str = "auto",
        device: Any = None,
    ):
        super().__init__()
        if in_features % group_size or out_features % 8:
            raise ValueError(
                f"AWQ needs in_features divisible by the group size and out_features by 8: "
                f"{in_features} -> {out_features} with groups of {group_size}"
            )
        self.in_features, self.out_features, self.group_size = in_features, out_features, group_size
        groups, words = in_features // group_size, out_features // 8
        self.qweight: Tensor
        self.qzeros: Tensor
        self.scales: Tensor
        self.register_buffer("qweight", torch.zeros(in_features, words, dtype=torch.int32, device=device))
        self.register_buffer("qzeros", torch.zeros(groups, words, dtype=torch.int32, device=device))
        self.register_buffer("scales", torch.zeros(groups, out_features, dtype=torch.float16, device=device))
        empty = torch.zeros(out_features, device=device) if bias else None
        self.bias = None if empty is None else nn.Parameter(empty, requires_grad=False)
        self._aten_weight: aten.AtenWeight | None = None
        self.set_kernel(kernel)

    def set_kernel(self, kernel: str) -> None:
        """Chooses the kernel of all later calls.

        Raises:
            ValueError: an unknown name, or a kernel that cannot hold a layer of this shape.
        """
        if kernel not in KERNELS:
            raise ValueError(f"unknown kernel {kernel!r}: choose one of {', '.join(KERNELS)}")
        obstacle = aten.shape_obstacle(self.out_features, self.group_size) if kernel == "aten" else None
        if obstacle:
            raise ValueError(obstacle)
        self.kernel = kernel

    def chosen_kernel(self, x: Tensor) -> str:
        """The kernel that `forward(x)` runs.

        For `auto`: ATen for up to `ATEN_MAX_TOKENS` bfloat16 tokens on the CPU where the layer's shape
        allows it, else dequantize and multiply.
        """
        if self.kernel != "auto":
            return self.kernel
        tokens = x.numel() // self.in_features
        fits = aten.shape_obstacle(self.out_features, self.group_size) is None
        return "aten" if fits and aten.input_obstacle(x) is None and tokens <= ATEN_MAX_TOKENS else "dequant"

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features], in the type of x.

        Raises:
            ValueError: the chosen kernel cannot run on these activations.
        """
        x_MI = x.reshape(-1, self.in_features)
        y_MO = self._matmul(x_MI, self.chosen_kernel(x_MI))
        if self.bias is not None:
            y_MO = y_MO + self.bias.to(y_MO.dtype)
        return y_MO.view(*x.shape[:-1], self.out_features)

    def _matmul(self, x_MI: Tensor, kernel: str) -> Tensor:
        if kernel == "aten":
            if self._aten_weight is None:
                self._aten_weight = aten.prepare(self.qweight, self.qzeros, self.scales, self.group_size)
            return aten.matmul(x_MI, self._aten_weight)
        stored = (self.qweight, self.qzeros, self.scales, self.group_size)
        if kernel == "dequant":
            return dequant.matmul(x_MI, *stored)
        return reference.matmul(x_MI, *stored).to(x_MI.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Int4Linear":
        """Moves the layer between devices; `model.bfloat16()` and the like leave the fp16 scales exact."""
        scales = self.scales
        super()._apply(fn, recurse)
        if self.scales.dtype != torch.float16:
            self.scales = scales.to(self.scales.device)
        self._aten_weight = None
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._aten_weight = None

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, "
            f"group_size={self.group_size}, kernel={self.kernel}"
        )


def int4_linears(model: nn.Module) -> dict[str, Int4Linear]:
    """The packed layers of a model by full name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Int4Linear)}


def set_kernel(model: nn.Module, kernel: str) -> None:
    """Chooses one kernel for every packed layer of a model.

    Raises:
        UserError: an unknown kernel, or one that cannot run some layer; no layer is changed.
    """
    layers = int4_linears(model)
    before = {name: layer.kernel for name, layer in layers.items()}
    for name, layer in layers.items():
        try:
            layer.set_kernel(kernel)
        except ValueError as error:
            for changed, kept in before.items():
                layers[changed].kernel = kept
            raise UserError(
                f"kernel {kernel!r} cannot run {name} ({error}): choose auto or dequant"
            ) from error


def describe_kernels(model: nn.Module) -> str:
    """One line for people: which kernels the packed layers use."""
    layers = int4_linears(model)
    if not layers:
        return "dense layers only"
    counts = Counter(_kernel_text(layer) for layer in layers.values())
    return "; ".join(f"{count} packed layers: {text}" for text, count in counts.items())


def _kernel_text(layer: Int4Linear) -> str:
    if layer.kernel != "auto":
        return layer.kernel
    obstacle = aten.shape_obstacle(layer.out_features, layer.group_size)
    if obstacle or layer.qweight.device.type != "cpu":
        return f"dequantize + dense ({obstacle or 'no fused kernel for ' + layer.qweight.device.type})"
    dense = "bfloat16" if dequant.cpu_multiplies_bfloat16() else "float32"
    return f"ATen int4 up to {ATEN_MAX_TOKENS} bfloat16 tokens, else dequantize + dense {dense}"
