"""A linear layer on AWQ tensors, with its kernel chosen explicitly.

The stored tensors (`qweight`, `qzeros`, `scales`) are never touched: what a kernel wants in another
layout is made once beside them and is not saved, so a model saved after it has run is the model that
was loaded.

Shape suffixes: M tokens, I input features, O output features, G groups along the input, W words (= O / 8).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from grace.errors import UserError
from grace.kernels import registry
from grace.kernels.registry import Choice, Shape, Stored

KERNELS = registry.NAMES
__all__ = [
    "KERNELS",
    "Int4Linear",
    "describe_kernels",
    "int4_linears",
    "set_kernel",
]


class Int4Linear(nn.Module):
    """y = x W + b with W[i, o] = scales[i // g, o] * (q[i, o] - zeros[i // g, o]); inference only.

    Args:
        in_features, out_features: multiples of `group_size` and of 8.
        bias: whether the layer has one.
        group_size: inputs per scale.
        kernel: one of `KERNELS`. `auto` picks per call, by the rule in `grace.kernels.registry.choose`; any
            other choice is used for every call, and raises where it cannot run.

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
        self.shape = Shape(in_features, out_features, group_size)
        self._prepared: dict[tuple[str, torch.dtype], Any] = {}
        self.set_kernel(kernel)

    def set_kernel(self, kernel: str) -> None:
        """Chooses the kernel of all later calls.

        Raises:
            ValueError: an unknown name, or a kernel that cannot run this layer where it is.
        """
        if kernel not in KERNELS:
            raise ValueError(f"unknown kernel {kernel!r}: choose one of {', '.join(KERNELS)}")
        if kernel != "auto":
            obstacle = registry.KERNELS[kernel].layer_obstacle(self.shape, self.qweight.device)
            if obstacle:
                raise ValueError(obstacle)
        self.kernel = kernel

    def choice(self, x: Tensor) -> Choice:
        """The kernel that `forward(x)` runs, and why."""
        return (
            registry.choose(self.shape, x)
            if self.kernel == "auto"
            else Choice(self.kernel, "it was asked for")
        )

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features], in the type of x.

        Raises:
            ValueError: the chosen kernel cannot run on these activations.
        """
        x_MI = x.reshape(-1, self.in_features)
        y_MO = self._matmul(x_MI, self.choice(x_MI).kernel)
        return y_MO.view(*x.shape[:-1], self.out_features)

    def _matmul(self, x_MI: Tensor, name: str) -> Tensor:
        kernel = registry.KERNELS[name]
        if self.kernel != "auto":
            obstacle = kernel.layer_obstacle(self.shape, x_MI.device) or kernel.input_obstacle(x_MI)
            if obstacle:
                raise ValueError(obstacle)
        weight: Any = Stored(self.qweight, self.qzeros, self.scales, self.group_size)
        if kernel.prepare:
            key = (name, x_MI.dtype)
            if key not in self._prepared:
                self._prepared[key] = kernel.prepare(weight, x_MI.dtype)
            weight = self._prepared[key]
        return kernel.matmul(x_MI, weight, self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Int4Linear":
        """Moves the layer between devices; `model.bfloat16()` and the like leave the fp16 scales exact."""
        scales = self.scales
        super()._apply(fn, recurse)
        if self.scales.dtype != torch.float16:
            self.scales = scales.to(self.scales.device)
        self._prepared.clear()
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Tensors of their own, also where they are columns of a wider layer (`grace.runtime.joined`)."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in ("qweight", "qzeros", "scales"):
            destination[prefix + name] = destination[prefix + name].contiguous()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._prepared.clear()

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
    """One line for people: which kernels the packed layers use, and which of them where they differ."""
    classes = registry.classes(
        (name, registry.describe(layer.shape, layer.kernel, layer.qweight.device))
        for name, layer in int4_linears(model).items()
    )
    if not classes:
        return "dense layers only"
    if len(classes) == 1:
        return f"{classes[0][1]} packed layers: {classes[0][2]}"
    return "; ".join(f"{count} packed layers ({names}): {text}" for names, count, text in classes)
