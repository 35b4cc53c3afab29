"""Fake quantization with learned group scales, and the linear layer that trains through it.

DESIGN section 4 (arXiv:2601.22709), after LSQ (Esser et al. 2020). With x = W / s:

    dL/dW     = dL/dW_hat                                  where round(x) lies in [qmin, qmax], else 0
    dL/ds     = sum over the group of dL/dW_hat * (q - x)  inside, dL/dW_hat * (qmin or qmax) outside
    dL/dtheta = dL/ds * s                                  straight through `snap`

Shape suffixes: O output features, I input features, G groups along the input, S one group's elements.
"""

from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from grace.quant import grid


class _FakeQuantize(torch.autograd.Function):
    """Saves its inputs only: codes and masks are cheaper to recompute than to keep."""

    @staticmethod
    def forward(ctx: Any, weight_OI: Tensor, theta_OG: Tensor, group_size: int, bits: int) -> Tensor:
        ctx.save_for_backward(weight_OI, theta_OG)
        ctx.group_size, ctx.bits = group_size, bits
        low, high = grid.code_range(bits)
        source_OGS = grid.grouped(weight_OI, group_size)
        dtype = grid.compute_dtype(weight_OI)
        scale_OG = grid.snapped_scale(theta_OG).to(dtype)
        output_OGS = torch.empty(source_OGS.shape, dtype=dtype, device=weight_OI.device)
        for rows in grid.row_blocks(source_OGS):
            block_OGS, scale = source_OGS[rows].to(dtype), scale_OG[rows]
            codes_OGS = grid.rounded_ratio(block_OGS, scale, out_OGS=output_OGS[rows]).clamp_(low, high)
            codes_OGS.mul_(scale.unsqueeze(-1))
        return output_OGS.reshape(weight_OI.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_OI: Tensor) -> tuple[Tensor, Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        weight_OI, theta_OG = ctx.saved_tensors
        low, high = grid.code_range(ctx.bits)
        source_OGS = grid.grouped(weight_OI, ctx.group_size)
        upstream_OGS = grid.grouped(grad_OI, ctx.group_size)
        dtype = grid.compute_dtype(weight_OI)
        scale_OG = grid.snapped_scale(theta_OG).to(dtype)
        grad_weight_OGS = torch.empty(source_OGS.shape, dtype=weight_OI.dtype, device=weight_OI.device)
        grad_theta_OG = torch.empty(theta_OG.shape, dtype=theta_OG.dtype, device=weight_OI.device)
        for rows in grid.row_blocks(source_OGS):
            block_OGS, scale, upstream = source_OGS[rows].to(dtype), scale_OG[rows], upstream_OGS[rows]
            rounded_OGS = grid.rounded_ratio(block_OGS, scale)
            codes_OGS = rounded_OGS.clamp(low, high)
            inside_OGS = (rounded_OGS == codes_OGS).to(dtype)
            torch.mul(upstream, inside_OGS, out=grad_weight_OGS[rows])
            # ds * s = g * (s q - W) inside and g * s q outside. Differences of the exact product s q
            # lose nothing, whereas q - W / s would carry the rounding of the division.
            step_OGS = codes_OGS.mul_(scale.unsqueeze(-1)).addcmul_(block_OGS, inside_OGS, value=-1)
            grad_theta_OG[rows] = torch.linalg.vecdot(step_OGS, upstream.to(dtype))
        return grad_weight_OGS.reshape(weight_OI.shape), grad_theta_OG, None, None


def fake_quantize(weight_OI: Tensor, theta_OG: Tensor, group_size: int = 128, bits: int = 4) -> Tensor:
    """W_hat = s * q with straight-through gradients to the weight and to theta.

    Values equal `dequantize(*quantize(...))` bit for bit. Nothing is checked that would need the
    values on the host: a NaN goes through and shows in the loss.

    Args:
        weight_OI: latent weight, any floating dtype.
        theta_OG: natural log of the scales, one per group of `group_size` inputs.

    Returns:
        [O, I] float32 (float64 for a float64 weight).

    Raises:
        ValueError: shapes do not fit, or `bits` outside 2..8.
    """
    grid.code_range(bits)
    grid.check_scales(weight_OI, theta_OG, group_size)
    return cast(Tensor, _FakeQuantize.apply(weight_OI, theta_OG, group_size, bits))


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
        weight_OI = fake_quantize(self.weight, self.theta, self.group_size, self.bits).to(input.dtype)
        bias_O = None if self.bias is None else self.bias.to(input.dtype)
        return F.linear(input, weight_OI, bias_O)

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


def _check_divides(in_features: int, group_size: int, name: str) -> None:
    if group_size < 1 or in_features % group_size:
        raise ValueError(f"{name}: {in_features} inputs cannot be cut into groups of {group_size}")
