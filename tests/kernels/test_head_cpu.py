"""The compiled rounding of an output layer against the grid's, bit for bit."""

import pytest
import torch

from grace.kernels import compiled, head_cpu
from grace.runtime import head

pytestmark = [
    pytest.mark.skipif(compiled.obstacle() is not None, reason=str(compiled.obstacle())),
    pytest.mark.usefixtures("poisoned_memory"),
]


@pytest.mark.parametrize("shape", [(8, 128), (128, 256), (136, 128), (1000, 384)])
@pytest.mark.parametrize("size", [1e-12, 1e-3, 0.02, 1.0, 3e4, 1e8])
def test_it_is_the_grid_s(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], size: float) -> None:
    weight_VD = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * size).bfloat16()
    weight_VD[3] = 0
    weight_VD[4, ::5] *= 3  # codes in between, and ties
    weight_VD[5] = weight_VD[5, 0] * torch.arange(shape[1]).remainder(15).sub(7)
    found = head_cpu.rounded(weight_VD)
    monkeypatch.setattr(compiled, "obstacle", lambda: "not here")
    for one, expected in zip(found, head._packed(weight_VD), strict=True):
        assert one.dtype == expected.dtype and torch.equal(one, expected)


def test_a_layer_is_unpacked_to_what_was_rounded() -> None:
    weight_VD = torch.randn(40, 128, generator=torch.Generator().manual_seed(1)).bfloat16()
    layer = head.Head(weight_VD, "int4")
    unit = torch.eye(128).bfloat16()
    error_VD = layer(unit).float().T - weight_VD.float()
    assert error_VD.abs().max() <= weight_VD.float().abs().amax(-1).div(14).max() * 1.05


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_a_number_is_refused(value: float) -> None:
    weight_VD = torch.ones(16, 128, dtype=torch.bfloat16)
    weight_VD[9, 77] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        head_cpu.rounded(weight_VD)


def test_other_shapes_and_types_are_refused() -> None:
    for weight_VD in (torch.ones(12, 128).bfloat16(), torch.ones(16, 64).bfloat16()):
        with pytest.raises(ValueError, match="cannot be packed"):
            head_cpu.rounded(weight_VD)
    for weight_VD in (torch.ones(16, 128), torch.ones(128, 16).bfloat16().t()):
        with pytest.raises(ValueError, match="contiguous bfloat16"):
            head_cpu.rounded(weight_VD)
