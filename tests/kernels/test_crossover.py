"""Where ATen meets the dense product: timed once per shape, kept in a file, and read from it."""

import json
import os
from pathlib import Path

import pytest
import torch

from grace.kernels import crossover
from grace.kernels.crossover import DEFAULT_TOKENS, aten_tokens, meeting_point

SHAPE = (1024, 1024, 128)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("GRACE_CACHE", str(tmp_path / "cache"))
    aten_tokens.cache_clear()
    yield
    aten_tokens.cache_clear()


def test_where_two_times_meet():
    assert meeting_point([0.5, 0.5, 2.0]) == 90  # half-way between 64 and 128, in logarithms
    assert meeting_point([1.2]) == 16
    assert meeting_point([0.2, 0.3, 0.4, 0.5, 0.6]) == 512


def test_timed_once_and_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    calls = []
    monkeypatch.setattr(crossover, "measured", lambda *shape: calls.append(shape) or 77)
    assert aten_tokens(128, 128, 128) == DEFAULT_TOKENS  # too small to time
    assert aten_tokens(*SHAPE) == aten_tokens(*SHAPE) == 77
    aten_tokens.cache_clear()  # as another process would
    assert aten_tokens(*SHAPE) == 77 and calls == [SHAPE]
    (file,) = (tmp_path / "cache").iterdir()
    assert torch.__version__ in file.name and f"{torch.get_num_threads()}-threads" in file.name
    assert json.loads(file.read_text()) == {"1024x1024/128": 77}
    assert aten_tokens(1024, 2048, 128) == 77 and len(json.loads(file.read_text())) == 2
    for damage in ("{", '{"1024x1024/128": "many"}', "[]"):
        file.write_text(damage)
        aten_tokens.cache_clear()
        assert aten_tokens(*SHAPE) == 77
    assert len(calls) == 5


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_nowhere_to_keep_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(crossover, "measured", lambda *shape: 77)
    tmp_path.chmod(0o500)
    assert aten_tokens(*SHAPE) == 77


def test_timing_gives_a_number_of_tokens():
    assert 1 <= crossover.measured(256, 64, 128) <= 512
