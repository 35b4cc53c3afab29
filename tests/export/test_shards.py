"""Weights in one file or several: what stock loaders find, and what is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from grace.export import progress as progress_module
from grace.export.pack import export_run
from grace.export.progress import progress
from grace.export.shards import INDEX, WEIGHTS, Weights, cut, write_weights
from grace.export.stream import Entry

TENSORS = {
    f"layer{n}.{part}": torch.full((4, 8), n).bfloat16() for n in range(5) for part in ("weight", "scale")
}


def entries() -> list[Entry]:
    return [Entry(name, t.dtype, tuple(t.shape), lambda t=t: t) for name, t in TENSORS.items()]


def test_modules_stay_together_and_the_index_is_whole(tmp_path):
    write_weights(tmp_path, entries(), {"format": "pt"}, "test", max_shard_bytes=300)
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in TENSORS.values())
    assert set(index["weight_map"].values()) == {f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)}
    found = {}
    for file in set(index["weight_map"].values()):
        tensors = load_file(tmp_path / file)
        assert all(index["weight_map"][name] == file for name in tensors)
        assert len({name.split(".")[0] for name in tensors}) * 2 == len(tensors)
        found |= tensors
    assert set(found) == set(TENSORS) and all(torch.equal(found[name], t) for name, t in TENSORS.items())
    weights = Weights(tmp_path)
    assert set(weights.shapes) == set(TENSORS)
    assert torch.equal(weights.read("layer3.scale"), TENSORS["layer3.scale"])
    assert torch.equal(torch.cat(list(weights.pieces("layer4.weight"))), TENSORS["layer4.weight"])


def test_one_file_without_a_bound_and_a_shard_each_with_a_tiny_one(tmp_path):
    write_weights(tmp_path, entries(), {}, "test")
    assert [path.name for path in tmp_path.iterdir()] == [WEIGHTS]
    assert [len(shard) for shard in cut(entries(), 1)] == [2] * 5
    assert [len(shard) for shard in cut(entries(), None)] == [10]


def sharded(folder) -> dict:
    write_weights(folder, entries(), {"format": "pt"}, "test", max_shard_bytes=300)
    return json.loads((folder / INDEX).read_text())["weight_map"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda m: m.update({"layer0.weight": "../model.safetensors"}), "no file beside it"),
        (lambda m: m.update({"layer0.weight": "/etc/passwd"}), "no file beside it"),
        (lambda m: m.update({"layer0.weight": "model-00003-of-00003.safetensors"}), "disagree"),
        (lambda m: m.pop("layer0.weight"), "disagree"),
        (lambda m: m.update({"more": "model-00003-of-00003.safetensors"}), "disagree"),
        (lambda m: m.clear(), "no weight_map"),
    ],
)
def test_an_index_that_does_not_fit_is_refused(tmp_path, damage, message):
    weight_map = sharded(tmp_path)
    damage(weight_map)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match=message):
        Weights(tmp_path)


def test_a_missing_shard_is_refused(tmp_path):
    sharded(tmp_path)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(OSError, match="00002"):
        Weights(tmp_path)


@pytest.mark.parametrize("name", ["awq", "qat"])
def test_a_sharded_export_is_the_same_model(qat_run, awq_dir, tmp_path, name):
    out = tmp_path / name
    bound = 700_000  # above the largest module in float32
    export_run(qat_run, out, (name,), max_shard_bytes=bound)
    shards = list(out.glob("model-*.safetensors"))
    assert not (out / WEIGHTS).exists() and len(shards) > 1
    assert all(path.stat().st_size < bound + 20_000 for path in shards)  # the header comes on top
    whole = Weights(awq_dir if name == "awq" else qat_run / "model")
    cut_up = Weights(out)
    assert set(whole.shapes) == set(cut_up.shapes)
    assert all(torch.equal(whole.read(tensor), cut_up.read(tensor)) for tensor in whole.shapes)


def test_a_sharded_qat_export_can_be_loaded_and_exported_again(qat_run, awq_dir, tmp_path):
    export_run(qat_run, tmp_path / "qat", ("qat",), max_shard_bytes=200_000)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "qat")
    base = load_file(qat_run / "model" / WEIGHTS)
    name = "model.language_model.layers.1.mlp.up_proj.weight"
    assert torch.equal(model.state_dict()[name], base[name])
    export_run(tmp_path / "qat", tmp_path / "awq")
    assert (tmp_path / "awq" / WEIGHTS).read_bytes() == (awq_dir / WEIGHTS).read_bytes()


def test_progress_speaks_up_only_when_it_takes_long(capsys, monkeypatch):
    with progress("awq", 100) as advance:
        advance(50)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(progress_module, "_SECONDS_BETWEEN_LINES", 0.0)
    with progress("awq", 2 * 10**9) as advance:
        advance(10**9)
    assert capsys.readouterr().err == "awq: 1.0 of 2.0 GB\n"


def test_a_terminal_gets_a_bar(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    with progress("packing", 100) as advance:
        advance(100)
    assert "packing" in capsys.readouterr().err


def test_a_single_file_is_preferred_to_an_index(tmp_path):
    sharded(tmp_path)
    save_file({"only": torch.zeros(1)}, tmp_path / WEIGHTS)
    assert set(Weights(tmp_path).shapes) == {"only"}
