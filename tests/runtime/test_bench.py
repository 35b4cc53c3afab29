"""`grace bench`: the figures are there and belong to the models that were named; what cannot be measured is said."""

import argparse
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

from grace.errors import UserError
from grace.models import qwen3vl
from grace.runtime import bench, synthetic
from grace.runtime.bench import run_bench
from grace.runtime.bench_worker import Setup, Worker
from grace.runtime.loading import load_model
from grace.runtime.synthetic import SyntheticModel
from grace.runtime.twin import dense_bytes, write_twin


def arguments(**changes) -> argparse.Namespace:
    values = {
        "directory": None, "synthetic": None, "batch": [2], "prefill": [8, 24], "decode_at": [8], "new_tokens": 3,
        "repeats": 1, "quick": False, "threads": 1, "kernel": "auto", "head": "bf16", "device": None,
        "tmp": None, "plot": None, "json": True,
    }  # fmt: skip
    return argparse.Namespace(**(values | changes))


@pytest.mark.slow
def test_a_run(awq_dir: Path, tmp_path: Path, capsys):
    assert (
        run_bench(arguments(directory=awq_dir, tmp=tmp_path, head="int4", plot=tmp_path / "bench.svg")) == 0
    )
    out, err = capsys.readouterr()
    result = json.loads(out)
    for name in ("decode_ratio", "prefill_ratio", "load_ratio", "weight_bytes_ratio", "copy_gb_s"):
        assert result[name] > 0
    assert [(row["batch"], row["context"]) for row in result["decode"]] == [(2, 8)]
    assert result["prefill_ratio"] == result["prefill"][1]["ratio"] and result["prefill"][1]["tokens"] == 24
    assert result["decode"][0]["int4_tokens_per_s"] > 0 and "decode, batch 2, at 8" in err and "copy" in err
    assert result["int4"]["side"] == "engine" and result["bf16"]["side"] == "library"
    assert "dense" in result["bf16"]["kernel"] and "28 packed layers" in result["int4"]["kernel"]
    assert (tmp_path / "bench.svg").stat().st_size > 1000
    assert [path.name for path in tmp_path.iterdir()] == ["bench.svg"]  # the twin is gone


def test_both_sides_measure_the_same_work(awq_dir: Path, tmp_path: Path):
    write_twin(awq_dir, tmp_path / "twin")
    threads = torch.get_num_threads()
    for side, directory in (("engine", awq_dir), ("library", tmp_path / "twin")):
        worker = Worker(Setup(directory, side))
        assert worker.load(cold=True) > 0 and worker.load(cold=False) > 0
        assert worker.prefill(12) > 0 and worker.decode(2, 8, 3) > 0
        about = worker.about()
        assert about["side"] == side and about["threads"] == threads
        sizes = [path.stat().st_size for path in directory.glob("*.safetensors")]
        assert about["language_bytes"] + about["vision_bytes"] == pytest.approx(sum(sizes), rel=0.05)
    assert dense_bytes(awq_dir) == pytest.approx(sum(sizes), rel=0.05)


def test_an_answer_that_would_end_goes_on(awq_dir: Path, tmp_path: Path):
    write_twin(awq_dir, tmp_path / "twin")
    file = tmp_path / "twin" / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": list(range(512))}))
    worker = Worker(Setup(tmp_path / "twin", "library"))
    worker.load(cold=False)
    assert worker.decode(1, 8, 4) > 0


def test_the_twin_is_the_packed_model_dequantized(awq_dir: Path, tmp_path: Path):
    write_twin(awq_dir, tmp_path / "twin")
    packed, twin = load_model(awq_dir, torch.float32), load_model(tmp_path / "twin", torch.float32)
    ids = torch.arange(5)[None]
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": torch.zeros_like(ids),
    }
    with torch.inference_mode():
        one, other = packed(**inputs).logits, twin(**inputs).logits
    assert (one - other).abs().max() <= 0.02 * one.abs().max()  # rounded to bfloat16, once
    assert twin.lm_head.weight is twin.get_input_embeddings().weight


@pytest.fixture
def tiny_synthetic(tiny_student_dir: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(synthetic.NAMES, "qwen3-vl-2b", str(tiny_student_dir))
    return "qwen3-vl-2b"


def test_synthetic_models_load_everywhere(tiny_synthetic: str, tmp_path: Path):
    model = SyntheticModel(tiny_synthetic)
    model.write(tmp_path / "int4", tmp_path / "bf16")
    packed, dense = load_model(tmp_path / "int4"), load_model(tmp_path / "bf16")
    layers = qwen3vl.decoder_linears(dense)
    assert set(layers) == set(model.packed)
    for packed_bytes, directory in ((True, "int4"), (False, "bf16")):
        sizes = [path.stat().st_size for path in (tmp_path / directory).glob("*.safetensors")]
        assert model.weight_bytes(packed_bytes) == pytest.approx(sum(sizes), rel=0.05)
    name = model.packed[0]
    x = torch.randn(3, layers[name].in_features, generator=torch.Generator().manual_seed(0))
    expected = dense.get_submodule(name)(x.bfloat16()).float()
    assert (packed.get_submodule(name)(x) - expected).abs().max() <= 0.02 * expected.abs().max()
    assert isinstance(AutoModelForImageTextToText.from_pretrained(tmp_path / "bf16"), type(dense))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "one of DIR and --synthetic"),
        ({"directory": Path("x"), "synthetic": "qwen3-vl-2b"}, "one of DIR and --synthetic"),
        ({"directory": Path("/nowhere")}, "not a directory"),
        ({"synthetic": "qwen3-vl-2b", "tmp": Path("/nowhere")}, "choose another --tmp"),
        ({"synthetic": "qwen3-vl-2b", "plot": Path("x.pdf")}, "ends in .png or .svg"),
        ({"synthetic": "qwen3-vl-2b", "plot": Path("/nowhere/x.png")}, "no folder that can be written to"),
    ],
)
def test_what_cannot_be_measured(change: dict, message: str):
    with pytest.raises(UserError, match=message):
        run_bench(arguments(**change))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"), [({"device": "cuda:77"}, "--device cuda:77"), ({"prefill": [10**6]}, "context")]
)
def test_what_the_measuring_process_refuses(change: dict, message: str, awq_dir: Path, tmp_path: Path):
    with pytest.raises(UserError, match=message):
        run_bench(arguments(directory=awq_dir, tmp=tmp_path, **change))


def test_models_that_are_not_packed(tiny_student_dir: Path):
    with pytest.raises(UserError, match="not an AWQ directory"):
        run_bench(arguments(directory=tiny_student_dir))


def test_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(UserError, match="GB free"):
        bench._require_room(tmp_path, 1 << 50)
    monkeypatch.setattr(bench.shutil, "disk_usage", lambda path: argparse.Namespace(free=1 << 60))
    with pytest.raises(UserError, match="choose a smaller model"):
        bench._require_room(tmp_path, 1 << 50)
