"""One thread for a model whose steps are short, all of them for any other."""

import time
from collections.abc import Iterator

import pytest
import torch

from grace.models import qwen3vl
from grace.runtime.decoder import Decoder
from grace.runtime.serve import threads
from grace.runtime.serve.threads import settle_threads


@pytest.fixture(autouse=True)
def _two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def decoder(tiny_student_dir) -> Decoder:
    return Decoder(qwen3vl.load_model(str(tiny_student_dir)), rows=2, context=16)


@pytest.mark.parametrize(("seconds", "settled"), [(0.0, 1), (0.05, 2)])
def test_the_length_of_a_step_decides(decoder, monkeypatch, seconds: float, settled: int) -> None:
    monkeypatch.setattr(threads, "SHORT_STEP", 0.04)  # this machine may be busy
    step = decoder.decode

    def slow(*arguments: object) -> torch.Tensor:
        assert torch.get_num_threads() == 1
        time.sleep(seconds)
        return step(*arguments)

    monkeypatch.setattr(decoder, "decode", slow)
    assert settle_threads(decoder) == torch.get_num_threads() == settled
    assert decoder.length(0) == 0


def test_who_set_the_threads_has_the_last_word(decoder, monkeypatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert settle_threads(decoder) == 2


def test_a_context_too_short_to_try_is_left_alone(decoder, monkeypatch) -> None:
    monkeypatch.setattr(decoder, "context", 4)
    assert settle_threads(decoder) == 2
