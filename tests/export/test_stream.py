import pytest
import torch
from safetensors.torch import load_file, save_file

from grace.checked_files import DamagedFile
from grace.export import stream
from grace.export.stream import Entry, TensorFile, write_safetensors


def entries(tensors):
    return [Entry(name, t.dtype, tuple(t.shape), lambda t=t: t) for name, t in tensors.items()]


TENSORS = {
    "b": torch.arange(6, dtype=torch.int32).view(2, 3),
    "a": torch.randn(3, 5).bfloat16(),
    "c": torch.randn(2, 2).half().t(),
    "scalar": torch.tensor(3.5),
    "empty": torch.zeros(0, 4),
    "flag": torch.tensor([True, False]),
}


def test_readable_by_the_library_and_equal(tmp_path):
    write_safetensors(tmp_path / "x.safetensors", entries(TENSORS), {"format": "pt"})
    back = load_file(tmp_path / "x.safetensors")
    assert set(back) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert back[name].dtype == tensor.dtype and torch.equal(back[name], tensor)


def test_same_bytes_whatever_the_order(tmp_path):
    write_safetensors(tmp_path / "x", entries(TENSORS), {"format": "pt"})
    write_safetensors(tmp_path / "y", entries(TENSORS)[::-1], {"format": "pt"})
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()
    save_file(
        {name: t.contiguous() for name, t in TENSORS.items()}, tmp_path / "z", metadata={"format": "pt"}
    )
    assert (tmp_path / "x").stat().st_size == (tmp_path / "z").stat().st_size


def test_broken_promises_are_caught(tmp_path):
    wrong = Entry("a", torch.float32, (2,), lambda: torch.zeros(3))
    with pytest.raises(ValueError, match="not as announced"):
        write_safetensors(tmp_path / "x", [wrong], {})
    with pytest.raises(ValueError, match="duplicate"):
        write_safetensors(tmp_path / "x", entries({"a": torch.zeros(1)}) * 2, {})
    with pytest.raises(ValueError, match="not as announced"):
        write_safetensors(
            tmp_path / "x", [Entry("a", torch.float32, (2,), lambda: iter([torch.zeros(1)]))], {}
        )


def test_reading_back_whole_and_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "_PIECE_BYTES", 16)
    write_safetensors(tmp_path / "x", entries(TENSORS), {"format": "pt"})
    file = TensorFile(tmp_path / "x")
    assert set(file.shapes) == set(TENSORS)
    for name, tensor in TENSORS.items():
        pieces = list(file.pieces(name))
        assert torch.equal(file.read(name), tensor) and file.dtypes[name] == tensor.dtype
        assert torch.equal(torch.cat(pieces) if tensor.ndim else pieces[0], tensor)
    assert len(list(file.pieces("a"))) == 3
    whole = (tmp_path / "x").read_bytes()
    for cut in (0, 5, 40, len(whole) - 1):
        (tmp_path / "x").write_bytes(whole[:cut])
        with pytest.raises(DamagedFile):
            TensorFile(tmp_path / "x")
