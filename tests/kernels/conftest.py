"""What the tests of kernels share."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a kernel leaves unwritten, in its result or in its scratch, is a NaN, or 0xAA in every byte."""
    # PyTorch lists the functions that make tensors when it first needs them, and keeps the list: were it made from
    # here on, `torch.device("meta")` would not hold back the real `torch.empty` in any later test of this process.
    with torch.device("meta"):
        assert torch.empty(0).is_meta

    def poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def make_and_poison(*args: object, **kwargs: object) -> Tensor:
            tensor = make(*args, **kwargs)
            if tensor.is_floating_point():
                return tensor.fill_(torch.nan)
            tensor.view(torch.uint8).fill_(0xAA)
            return tensor

        return make_and_poison

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
