"""Random AWQ layers, for the tests of the W4A16 kernels."""

import torch
from torch import Tensor

from grace.kernels import reference

Stored = tuple[Tensor, Tensor, Tensor]


def words(rows: int, columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31, (rows, columns // 8), generator=generator).to(torch.int32)


def layer(inputs: int, outputs: int, group_size: int, seed: int = 0) -> Stored:
    """qweight, qzeros and scales; every zero point between 0 and 15."""
    groups = inputs // group_size
    generator = torch.Generator().manual_seed(seed)
    scales_GO = (torch.rand(groups, outputs, generator=generator) * 0.02 + 0.001).half()
    return words(inputs, outputs, seed), words(groups, outputs, seed + 1), scales_GO


def normal(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(y_TO: Tensor, x_TI: Tensor, stored: Stored, group_size: int, bias_O: Tensor | None = None) -> None:
    """`y_TO` against float64: one rounding to its type, and sums in fp32."""
    x = x_TI.cpu().double()
    weight_IO = reference.dequantize(stored[0].cpu(), stored[1].cpu(), stored[2].cpu(), group_size)
    expected = x @ weight_IO
    size = (x.abs() @ weight_IO.abs()).max() if x.numel() else 0.0
    if bias_O is not None:
        expected = expected + bias_O.cpu().double()
    assert y_TO.dtype == x_TI.dtype and y_TO.shape == expected.shape
    bound = expected.abs() * torch.finfo(y_TO.dtype).eps / 2 * 1.01 + 1e-5 * size + 1e-7
    assert ((y_TO.cpu().double() - expected).abs() <= bound).all()
