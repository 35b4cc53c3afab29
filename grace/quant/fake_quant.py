"""Fake quantization with learned group scales, and the linear layer that trains through it.

DESIGN section 4 (arXiv:2601.22709), after LSQ (Esser et al. 2020). With x = W / s:

    dL/dW     = dL/dW_hat                                  where round(x) lies in [qmin, qmax], else 0
    dL/ds     = sum over the group of dL/dW_hat * (q - x)  inside, dL/dW_hat * (qmin or qmax) outside
    dL/dtheta = dL/ds * s                                  straight through `snap`

Every forward pass forms W_hat anew, in the dtype of the matmul. That replaces autocast's cast of the same
weight and costs about as much, so nothing is kept from one micro-batch to the next and nothing can go
stale (benchmarks/qat_overhead.py has the arithmetic and the measurements).

Shape suffixes: O output features, I input features, G groups along the input, S one group's elements.
"""

from collections.abc import Callable
from typing import Any, ClassVar, Protocol, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from grace.quant import grid

# (grad, value, low, high) -> grad where low < value < high, else 0: one pass, where a mask and
# `torch.where` are two that take six times as long on a CPU.
_inside = torch.ops.aten.hardtanh_backward.grad_input


class Kernels(Protocol):
    """The quantizer's two directions on one kind of device; `grace.kernels.fake_quant_triton` is one."""

    def forward(
        self, weight_OI: Tensor, theta_OG: Tensor, group_size: int, bits: int, dtype: torch.dtype
    ) -> Tensor:
        """W_hat [O, I] in `dtype`: the exact s * q, rounded once."""
        ...

    def backward(
        self, weight_OI: Tensor, theta_OG: Tensor, grad_OI: Tensor, group_size: int, bits: int
    ) -> tuple[Tensor, Tensor]:
        """dL/dW [O, I] and dL/dtheta [O, G], in the dtypes of weight and theta."""
        ...


class TorchKernels:
    """The definition, in torch operations; on a CPU slice by slice, so that passes stay in its caches.

    Attributes:
        scale: what a log-scale stands for, float32; a trial of other scales overrides it.
    """

    scale: ClassVar[Callable[[Tensor], Tensor]] = staticmethod(grid.snapped_scale)

    @classmethod
    def forward(
        cls, weight_OI: Tensor, theta_OG: Tensor, group_size: int, bits: int, dtype: torch.dtype
    ) -> Tensor:
        """See `Kernels`. The only temporary is one slice of codes."""
        low, high = grid.code_range(bits)
        source_OGS, wide = grid.grouped(weight_OI, group_size), grid.compute_dtype(weight_OI)
        scale_OG = cls.scale(theta_OG).to(wide)
        output_OGS = torch.empty(source_OGS.shape, dtype=dtype, device=weight_OI.device)
        (scratch_OGS,) = _scratch(source_OGS, wide, 1)
        for rows in grid.row_blocks(source_OGS):
            block_OGS, scale = source_OGS[rows].to(wide), scale_OG[rows]
            codes_OGS = grid.rounded_ratio(block_OGS, scale, out_OGS=scratch_OGS[: len(block_OGS)])
            torch.mul(codes_OGS.clamp_(low, high), scale.unsqueeze(-1), out=output_OGS[rows])
        return output_OGS.reshape(weight_OI.shape)

    @classmethod
    def backward(
        cls, weight_OI: Tensor, theta_OG: Tensor, grad_OI: Tensor, group_size: int, bits: int
    ) -> tuple[Tensor, Tensor]:
        """See `Kernels`. The only temporaries are three slices."""
        low, high = grid.code_range(bits)
        source_OGS, wide = grid.grouped(weight_OI, group_size), grid.compute_dtype(weight_OI)
        upstream_OGS = grid.grouped(grad_OI, group_size)
        scale_OG = cls.scale(theta_OG).to(wide)
        grad_weight_OGS = torch.empty(source_OGS.shape, dtype=weight_OI.dtype, device=weight_OI.device)
        grad_theta_OG = torch.empty(theta_OG.shape, dtype=theta_OG.dtype, device=weight_OI.device)
        scratch = _scratch(source_OGS, wide, 3)
        for rows in grid.row_blocks(source_OGS):
            block_OGS, scale = source_OGS[rows].to(wide), scale_OG[rows]
            upstream, codes_OGS, step_OGS = (part[: len(block_OGS)] for part in scratch)
            upstream.copy_(upstream_OGS[rows])
            grid.rounded_ratio(block_OGS, scale, out_OGS=codes_OGS)
            _inside(upstream, codes_OGS, low - 0.5, high + 0.5, grad_input=grad_weight_OGS[rows])
            _inside(block_OGS, codes_OGS, low - 0.5, high + 0.5, grad_input=step_OGS)
            # ds * s = g * (s q - W) inside and g * s q outside. Differences of the exact product s q
            # lose nothing, whereas q - W / s would carry the rounding of the division.
            step_OGS.addcmul_(codes_OGS.clamp_(low, high), scale.unsqueeze(-1), value=-1).mul_(upstream)
            grad_theta_OG[rows] = step_OGS.sum(-1).neg_()
        return grad_weight_OGS.reshape(weight_OI.shape), grad_theta_OG


def _scratch(source_OGS: Tensor, dtype: torch.dtype, count: int) -> list[Tensor]:
    """Buffers for one slice of work each."""
    rows = next(grid.row_blocks(source_OGS), slice(0, 0))
    shape = source_OGS[rows].shape
    return [torch.empty(shape, dtype=dtype, device=source_OGS.device) for _ in range(count)]


_kernels: dict[str, Kernels] = {}


def use_kernels(device_type: str, kernels: Kernels) -> None:
    """Quantizes weights on `device_type` with `kernels` from now on, instead of torch operations.

    Whoever assembles a run chooses, since leaves of the package do not import each other:
    `use_kernels("cuda", grace.kernels.fake_quant_triton)`. Float64 weights keep to torch operations.
    """
    _kernels[device_type] = kernels


def kernels_for(weight: Tensor) -> Kernels:
    """What quantizes this weight."""
    if weight.dtype == torch.float64:
        return TorchKernels()
    return _kernels.get(weight.device.type, TorchKernels())


class _FakeQuantize(torch.autograd.Function):
    """Saves its inputs only: codes and masks are cheaper to recompute than to keep."""

    @staticmethod
    def forward(
        ctx: Any, weight_OI: Tensor, theta_OG: Tensor, group_size: int, bits: int, dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(weight_OI, theta_OG)
        ctx.group_size, ctx.bits = group_size, bits
        return kernels_for(weight_OI).forward(weight_OI, theta_OG, group_size, bits, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_OI: Tensor) -> tuple[Tensor, Tensor, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        weight_OI, theta_OG = ctx.saved_tensors
        grads = kernels_for(weight_OI).backward(weight_OI, theta_OG, grad_OI, ctx.group_size, ctx.bits)
        return *grads, None, None, None


def fake_quantize(
    weight_OI: Tensor,
    theta_OG: Tensor,
    group_size: int = 128,
    bits: int = 4,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """W_hat = s * q with straight-through gradients to the weight and to theta.

    Values equal `dequantize(*quantize(...))` exactly, rounded once where `dtype` is a narrow one.
    Nothing is checked that would need the values on the host: a NaN goes through and shows in the loss.

    Args:
        weight_OI: latent weight, any floating dtype.
        theta_OG: natural log of the scales, one per group of `group_size` inputs.
        dtype: of the result, written directly; by default float32 (float64 for a float64 weight).
            The gradient that comes back has it too; what is made of it is computed in float32.

    Returns:
        [O, I] in `dtype`.

    Raises:
        ValueError: shapes do not fit, `bits` outside 2..8, or `dtype` is no floating dtype.
    """
    grid.code_range(bits)
    grid.check_scales(weight_OI, theta_OG, group_size)
    dtype = dtype or grid.compute_dtype(weight_OI)
    if not dtype.is_floating_point:
        raise ValueError(f"weights are quantized to a floating dtype, not to {dtype}")
    return cast(Tensor, _FakeQuantize.apply(weight_OI, theta_OG, group_size, bits, dtype))


class QuantLinear(nn.Linear):
    """A linear layer that computes with W_hat = fake_quantize(weight, theta).

    Attributes:
        weight: latent weight [O, I], float32.
        theta: natural log of the group scales [O, I / group_size], float32.
        bias: [O] or None, kept in full precision.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        bits: int = 4,
        group_size: int = 128,
        name: str = "linear",
        device: torch.device | str | None = None,
    ):
        _check_divides(in_features, group_size, name)
        super().__init__(in_features, out_features, bias, device=device, dtype=torch.float32)
        self.bits, self.group_size, self.name = bits, group_size, name
        self.theta = nn.Parameter(grid.init_theta(self.weight, group_size, bits))

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, bits: int = 4, group_size: int = 128, name: str = "linear"
    ) -> Self:
        """The quantized twin of `linear`: its weight as float32 latent, its bias, scales fitted to it.

        A weight that is float32 already is shared, not copied.

        Raises:
            ValueError: `group_size` does not divide the inputs (names the layer), `bits` outside 2..8,
                or a weight is NaN or infinite.
        """
        _check_divides(linear.in_features, group_size, name)
        grid.code_range(bits)
        layer = cls(
            linear.in_features, linear.out_features, linear.bias is not None,
            bits=bits, group_size=group_size, name=name, device="meta",
        )  # fmt: skip
        try:
            theta_OG = grid.init_theta(linear.weight, group_size, bits)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        weight = linear.weight
        layer.weight = nn.Parameter(weight.detach().float(), requires_grad=weight.requires_grad)
        layer.theta = nn.Parameter(theta_OG)
        if linear.bias is not None:
            layer.bias = linear.bias
        return layer.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        """x [..., I] -> [..., O], in the dtype of x (or of an enclosing autocast)."""
        dtype = _matmul_dtype(input)
        weight_OI = fake_quantize(self.weight, self.theta, self.group_size, self.bits, dtype=dtype)
        return F.linear(input, weight_OI, None if self.bias is None else self.bias.to(dtype))

    @torch.no_grad()
    def codes_and_scales(self) -> tuple[Tensor, Tensor]:
        """What `forward` uses: codes [O, I] int8 and scales [O, G] bfloat16.

        Raises:
            ValueError: a latent weight or a log-scale is NaN or infinite; names the layer.
        """
        try:
            return grid.quantize(self.weight, self.theta, self.group_size, self.bits)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from error

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bits={self.bits}, group_size={self.group_size}"


def _matmul_dtype(input: Tensor) -> torch.dtype:
    """The dtype in which a linear layer multiplies `input` here; autocast leaves float64 alone."""
    device_type = input.device.type
    available = torch.amp.is_autocast_available(device_type)  # not on meta, where asking on raises
    if available and torch.is_autocast_enabled(device_type) and input.dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    return input.dtype


def _check_divides(in_features: int, group_size: int, name: str) -> None:
    if group_size < 1 or in_features % group_size:
        raise ValueError(f"{name}: {in_features} inputs cannot be cut into groups of {group_size}")
