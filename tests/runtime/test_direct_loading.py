"""The direct loader gives what the library's gives, and leaves to it whatever is not plainly right."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from grace.models.processor import load_processor
from grace.runtime import direct_loading
from grace.runtime.direct_loading import _ranges, load_packed
from grace.runtime.engine import load
from grace.runtime.int4_linear import int4_linears


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float16])
def test_the_same_model_as_the_library_loads(awq_dir: Path, dtype):
    direct = load_packed(awq_dir, dtype)
    assert direct is not None
    library = AutoModelForImageTextToText.from_pretrained(
        awq_dir, dtype=dtype or "auto", attn_implementation="sdpa"
    )
    ours, theirs = direct.state_dict(), library.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name
    buffers = dict(direct.named_buffers())
    assert buffers.keys() == dict(library.named_buffers()).keys()
    for name, tensor in library.named_buffers():
        assert torch.equal(buffers[name], tensor), name
    assert direct.lm_head.weight is direct.get_input_embeddings().weight
    assert direct.dtype == library.dtype and not direct.training
    assert direct.config.to_dict() == library.config.to_dict()
    assert direct.generation_config.to_dict() == library.generation_config.to_dict()
    assert direct.get_submodule("model.visual").config._attn_implementation == "sdpa"


def test_it_saves_as_the_library_saves(awq_dir: Path, tmp_path: Path):
    load_packed(awq_dir, None).save_pretrained(tmp_path / "again")
    before, after = (load_file(path / "model.safetensors") for path in (awq_dir, tmp_path / "again"))
    assert before.keys() == after.keys() and all(torch.equal(after[name], before[name]) for name in before)
    config = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["bits"], config["group_size"]) == ("awq", 4, 128)


def test_the_files_are_mapped_not_copied(awq_dir: Path):
    """All layers are views of one storage, of the file's size; and what is written to them stays in memory."""
    model, file = load_packed(awq_dir, None), awq_dir / "model.safetensors"
    before = file.read_bytes()
    for layer in int4_linears(model).values():
        assert layer.qweight.untyped_storage().nbytes() == len(before)
        layer.qweight.zero_()
    assert file.read_bytes() == before


def renamed(tensors: dict) -> dict:
    return {
        name.replace("model.language_model", "language_model.model"): tensor
        for name, tensor in tensors.items()
    }


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: {name: tensors[name] for name in [*tensors][1:]},
        lambda tensors: tensors | {"more": torch.zeros(1)},
        lambda tensors: {name: tensor.t().contiguous() if "qweight" in name else tensor for name, tensor in tensors.items()},
        lambda tensors: {name: tensor.float() if "scales" in name else tensor for name, tensor in tensors.items()},
        renamed,
    ],
)  # fmt: skip
def test_other_tensors_are_left_to_the_library(awq_dir: Path, tmp_path: Path, change):
    shutil.copytree(awq_dir, tmp_path / "awq")
    file = tmp_path / "awq" / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    assert load_packed(tmp_path / "awq", None) is None


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "awq_quantized_modules.json"])
def test_damaged_files_are_left_to_the_library(awq_dir: Path, tmp_path: Path, name: str):
    shutil.copytree(awq_dir, tmp_path / "awq")
    (tmp_path / "awq" / name).write_text("{")
    assert load_packed(tmp_path / "awq", None) is None


def test_what_is_read_ahead_is_the_decoder(awq_dir: Path):
    file = awq_dir / "model.safetensors"
    tensors = load_file(file)
    wanted = sum(tensor.nbytes for name, tensor in tensors.items() if not name.startswith("model.visual."))
    assert sum(end - start for start, end in _ranges(file)) == wanted


def test_the_engine_uses_it(awq_dir: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        AutoModelForImageTextToText, "from_pretrained", lambda *a, **k: pytest.fail("used the library")
    )
    assert load(awq_dir).generate([], "Say yes", 3).tokens and load_processor(awq_dir)


def test_what_is_cached_is_not_read_again(awq_dir: Path, monkeypatch: pytest.MonkeyPatch):
    read = []
    real = os.preadv

    def preadv(descriptor: int, buffers: list, offset: int, flags: int = 0) -> int:
        if not flags:
            read.append(sum(len(buffer) for buffer in buffers))
        return real(descriptor, buffers, offset, flags)

    monkeypatch.setattr(os, "preadv", preadv)
    file = awq_dir / "model.safetensors"
    for cached, wanted in ((True, 0), (False, sum(end - start for start, end in _ranges(file)))):
        monkeypatch.setattr(direct_loading, "_is_cached", lambda descriptor, at, cached=cached: cached)
        direct_loading._read_ahead([file])
        assert sum(read) == wanted
