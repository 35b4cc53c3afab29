"""compressed-tensors directories, as that library and stock transformers read them."""

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from grace.checkpoint import read_qat
from grace.data.records import load_records
from grace.export import parity
from grace.export.pack import export_run
from grace.export.reference import Reference
from grace.export.source import open_source
from grace.quant.grid import dequantize

PARTS = ("weight_packed", "weight_scale", "weight_shape")


@pytest.fixture(scope="module")
def exported(run_of_bits: tuple[Path, int], tmp_path_factory: pytest.TempPathFactory):
    """(run, export directory, report) with 4 and with 8 bits."""
    folder = tmp_path_factory.mktemp("compressed")
    run, _ = run_of_bits
    return run, folder / "out", export_run(run, folder / "out", ("compressed-tensors",))


def test_the_library_decompresses_to_the_trained_weights(exported):
    run, out, _ = exported
    state, tensors = read_qat(run / "model"), load_file(out / "model.safetensors")
    block = json.loads((out / "config.json").read_text())["quantization_config"]
    (group,) = block["config_groups"].values()
    compressor: Any = BaseCompressor.get_value_from_registry(block["format"])
    scheme = QuantizationScheme.model_validate(group)
    for name, weight in state.modules.items():
        parts: dict[str, Any] = {part: tensors.pop(f"{name}.{part}") for part in PARTS}
        assert torch.equal(parts["weight_scale"], weight.scales_OG)
        expected = dequantize(weight.codes_OI, weight.scales_OG, state.group_size)
        wide = compressor.decompress({**parts, "weight_scale": parts["weight_scale"].float()}, scheme)
        assert torch.equal(wide["weight"], expected)  # fp32: exactly W_hat
        assert torch.equal(compressor.decompress(parts, scheme)["weight"], expected.bfloat16())
    assert not [name for name in tensors if name.endswith(PARTS)]


def test_stock_transformers_gives_the_trained_logits(exported, tiny_world_dir: Path):
    run, out, report = exported
    source = open_source(run)
    reference = Reference(source, load_records(tiny_world_dir / "validation.json"))
    loaded = AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    model, info = cast(Any, loaded)
    assert not any(info[fault] for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    answers = reference.greedy(model.eval())  # the first whole forward pass decompresses the layers
    exact = parity.compare_exact(reference.fp32.logits_TV, reference.logits(model))
    assert exact["relative"] < 1e-5
    greedy = parity.compare_greedy(reference.fp32.greedy, answers, exact["tolerance"])
    assert greedy["identical"] == greedy["records"]
    figures = report["formats"]["compressed-tensors"]["parity"]
    assert figures["codes_identical"] and figures["dense_identical"] and figures["exact"]["relative"] <= 1e-4


def test_config(exported):
    run, out, _ = exported
    config = json.loads((out / "config.json").read_text())
    bits = open_source(run).qat.bits
    weights = config["quantization_config"]["config_groups"]["group_0"]["weights"]
    assert (weights["num_bits"], weights["group_size"], weights["symmetric"]) == (bits, 128, True)
    assert config["quantization_config"]["ignore"] == ["lm_head", "re:.*lm_head$", "re:.*visual.*"]
    assert config["dtype"] == "bfloat16"
    text = (out / "README.md").read_text()
    assert "pip install compressed-tensors" in text and "vllm serve DIR" in text


def test_same_run_same_bytes(exported, tmp_path: Path):
    run, out, _ = exported
    export_run(run, tmp_path / "again", ("compressed-tensors",))
    assert {path.name for path in out.iterdir()} == {path.name for path in (tmp_path / "again").iterdir()}
    for path in out.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name


@pytest.mark.parametrize("part", [*PARTS, "norm"])
def test_the_gate_stops_a_wrong_file(
    qat_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
):
    """A fault in what was written, of each kind of tensor, and nothing is published."""
    from grace.export import compressed_tensors
    from grace.export.shards import Weights

    read = Weights.read

    def damaged(self: Weights, name: str) -> torch.Tensor:
        tensor = read(self, name)
        return tensor + tensor.new_ones(()) if name.endswith((part, f"{part}.weight")) else tensor

    monkeypatch.setattr(compressed_tensors.Weights, "read", damaged)
    with pytest.raises(RuntimeError, match="nothing was published"):
        export_run(qat_run, tmp_path / "out", ("compressed-tensors",))
    assert list(tmp_path.iterdir()) == []
