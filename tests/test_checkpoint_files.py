"""Tensor files laid out in memory and written past the page cache: the library reads them, whatever the file system takes."""

import errno
import fcntl
import os
from pathlib import Path

import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

import grace.checkpoint_files as module
from grace.checkpoint_files import DTYPES, FileInMemory, xxh3_of

TYPES = st.sampled_from(list(DTYPES))
SHAPES = st.lists(st.integers(0, 7), max_size=3)


def random(shape: list[int], dtype: torch.dtype) -> torch.Tensor:
    return torch.randint(0, 2, shape).to(dtype)


def written(path: Path, tensors: dict[str, torch.Tensor]) -> FileInMemory:
    file = FileInMemory()
    file.fill(tensors)
    assert file.write(path) == xxh3_of(path) == xxhash.xxh3_128(path.read_bytes()).hexdigest()
    return file


def assert_holds(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor), name


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(SHAPES, TYPES), max_size=6))
def test_the_library_reads_what_is_written(tmp_path_factory, shapes) -> None:
    path = tmp_path_factory.mktemp("files") / "t.safetensors"
    tensors = {f"näme.{i}": random(shape, dtype) for i, (shape, dtype) in enumerate(shapes)}
    written(path, tensors)
    assert_holds(path, tensors)
    with safe_open(path, framework="pt") as file:
        assert set(file.keys()) == set(tensors)


def test_memory_is_used_again_unless_shapes_change(tmp_path: Path) -> None:
    one = {"a": torch.randn(300, 7), "b": torch.arange(5)}
    file = written(tmp_path / "1", one)
    memory = file.memory
    two = {name: tensor + 1 for name, tensor in one.items()}
    file.fill(two)
    assert file.memory is memory
    file.write(tmp_path / "2")
    assert_holds(tmp_path / "1", one)
    assert_holds(tmp_path / "2", two)
    three = {"a": torch.randn(301, 7), "b": torch.arange(5)}
    file.fill(three)
    file.write(tmp_path / "3")
    assert file.memory is not memory
    assert_holds(tmp_path / "3", three)


def large() -> dict[str, torch.Tensor]:
    """More than one chunk, and no whole number of blocks."""
    return {"a": torch.randn(module.CHUNK // 4 + 12_345), "b": torch.tensor([1, 2, 3], dtype=torch.int8)}


def is_direct(descriptor: int) -> bool:
    return bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT)


@pytest.mark.parametrize("refused", ["nothing", "opening", "writing", "the rest of a chunk", "odd parts"])
def test_file_systems_that_take_less(tmp_path: Path, monkeypatch, refused: str) -> None:
    real_open, real_write, calls = os.open, os.write, []

    def opening(path, flags, *rest):
        if flags & os.O_DIRECT and refused == "opening":
            raise OSError(errno.EINVAL, "no direct writing")
        return real_open(path, flags, *rest)

    def writing(descriptor, data):
        calls.append(len(data))
        if refused == "writing" and is_direct(descriptor):
            raise OSError(errno.EINVAL, "not after all")
        if refused == "the rest of a chunk" and len(data) > 3 * module.BLOCK:
            data = data[: 3 * module.BLOCK + (len(data) // 2) // module.BLOCK * module.BLOCK]
        if refused == "odd parts" and len(data) > 1000:
            data = data[: len(data) // 2 + 1]
        return real_write(descriptor, data)

    monkeypatch.setattr(module.os, "open", opening)
    monkeypatch.setattr(module.os, "write", writing)
    tensors = large()
    written(tmp_path / "t", tensors)
    monkeypatch.undo()
    assert_holds(tmp_path / "t", tensors)
    assert len(calls) > 2 or refused == "opening"


def test_a_full_disk_is_an_error(tmp_path: Path, monkeypatch) -> None:
    def full(descriptor, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module.os, "write", full)
    file = FileInMemory()
    file.fill(large())
    with pytest.raises(OSError, match="No space left"):
        file.write(tmp_path / "t")


def test_a_write_that_stays_invalid_is_an_error(tmp_path: Path, monkeypatch) -> None:
    def invalid(descriptor, data):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(module.os, "write", invalid)
    file = FileInMemory()
    file.fill({"a": torch.ones(3)})
    with pytest.raises(OSError, match="Invalid"):
        file.write(tmp_path / "t")
