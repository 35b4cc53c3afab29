"""What all formats have in common: one run, every directory, and no directory taken for another."""

import importlib.util
import json
import re
import shutil
from pathlib import Path

import gguf
import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_qat_run import write_qat_run  # pyright: ignore[reportMissingImports] - tests/ is on the path
from transformers import AutoConfig, AutoProcessor

from grace.errors import UserError
from grace.export.directory import deployed_config
from grace.export.fit import BITS
from grace.export.pack import FORMATS, export_run
from grace.models.processor import load_processor
from grace.runtime.generate import checkpoint_kind, load
from grace.runtime.inspect import inspect_checkpoint

PACKED = [name for name in FORMATS if name != "qat"]


@pytest.fixture(scope="module")
def exported(qat_run: Path, tmp_path_factory: pytest.TempPathFactory):
    """(directory with one sub-directory per format, report)."""
    out = tmp_path_factory.mktemp("all") / "out"
    return out, export_run(qat_run, out, FORMATS)


def test_every_format_passes_the_gate_in_its_own_directory(exported):
    out, report = exported
    assert {path.name for path in out.iterdir()} == set(FORMATS) == set(report["formats"])
    for name, written in report["formats"].items():
        assert written["path"] == str(out / name) and written["bits"] == 4 and written["modules"] == 28
        figures = written["parity"]
        assert figures["codes_identical"]
        if name != "qat":
            assert figures["dense_identical"] and figures["exact"]["relative"] <= 1e-4
            assert figures["exact_greedy"]["identical"] == figures["exact_greedy"]["records"] == 4
    json.dumps(report)


@pytest.mark.parametrize("name", FORMATS)
def test_model_cards(exported, name: str):
    text = (exported[0] / name / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    header = yaml.safe_load(front)
    assert header["pipeline_tag"] == "image-text-to-text" and header["license"] == "apache-2.0"
    assert header["base_model"] == "Qwen/Qwen3-VL-2B-Instruct" and name in header["tags"]
    assert "## How to load" in body and "bit for bit" in body and str(exported[0]) not in body
    expected = {
        "awq": "vllm serve",
        "gguf": "llama-mtmd-cli -m DIR/model-Q4_0.gguf",
        "mlx": "mlx_vlm.generate",
        "qat": "grace export",
    }
    assert expected.get(name, "sglang") in body


@pytest.mark.parametrize("name", ["awq", "compressed-tensors", "qat"])
def test_the_card_s_python_runs(exported, name: str, monkeypatch: pytest.MonkeyPatch, capsys):
    """The snippets of the other formats are for runtimes of their own: tests/interop/."""
    directory = exported[0] / name
    blocks = re.findall(r"```python\n(.*?)```", (directory / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    if importlib.util.find_spec("torchvision") is None:  # the library's own processor cannot do without
        monkeypatch.setattr(AutoProcessor, "from_pretrained", load_processor)
    found: dict = {}
    for code in blocks:
        exec(code.replace('"DIR"', repr(str(directory))), found)
    assert isinstance(found["answer"], str) and capsys.readouterr().out == found["answer"] + "\n"
    assert found["output"].shape[1] > found["inputs"]["input_ids"].shape[1]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("compressed-tensors", "quantized with compressed-tensors"),
        ("mlx", "quantized with MLX"),
        ("gguf", "llama.cpp"),
    ],
)
def test_what_grace_cannot_run_is_named(exported, name: str, message: str):
    for use in (checkpoint_kind, load, inspect_checkpoint):
        with pytest.raises(UserError, match=message) as caught:
            use(exported[0] / name)
        assert "\n" not in str(caught.value)


def test_the_qat_export_can_be_exported(exported, tmp_path: Path):
    export_run(exported[0] / "qat", tmp_path / "mlx", ("mlx",))
    again, first = (folder / "model.safetensors" for folder in (tmp_path / "mlx", exported[0] / "mlx"))
    assert again.read_bytes() == first.read_bytes()


def test_eight_bits_go_where_they_fit(tmp_path: Path, tiny_student_dir: Path, tiny_world_dir: Path):
    run = write_qat_run(tmp_path / "w8", tiny_student_dir, tiny_world_dir, bits=8)
    message = "AWQ holds 4 bits only and this run has 8: .*compressed-tensors or gguf or mlx or qat"
    with pytest.raises(UserError, match=message):
        export_run(run, tmp_path / "out", FORMATS)
    assert not (tmp_path / "out").exists()
    report = export_run(run, tmp_path / "out", tuple(name for name in FORMATS if 8 in BITS.get(name, (8,))))
    assert {name: written["bits"] for name, written in report["formats"].items()} == dict.fromkeys(
        ("compressed-tensors", "gguf", "mlx", "qat"), 8
    )


def test_odd_bits_are_refused(tmp_path: Path, tiny_student_dir: Path, tiny_world_dir: Path):
    run = write_qat_run(tmp_path / "w3", tiny_student_dir, tiny_world_dir, bits=3)
    for name in PACKED:
        with pytest.raises(UserError, match="bits only and this run has 3: export it with --format qat"):
            export_run(run, tmp_path / "out", (name,))


@pytest.mark.parametrize("name", ["awq", "compressed-tensors", "mlx"])
def test_configs_speak_to_engines_of_both_transformers(exported, qat_run: Path, name: str):
    text = json.loads((exported[0] / name / "config.json").read_text())["text_config"]
    assert text["rope_theta"] == text["rope_parameters"]["rope_theta"] == 10000.0
    assert text["rope_scaling"]["mrope_section"] == text["rope_parameters"]["mrope_section"] == [12, 10, 10]
    assert text["tie_word_embeddings"] is True
    ours, theirs = (AutoConfig.from_pretrained(path) for path in (exported[0] / "awq", qat_run / "model"))
    assert ours.text_config.rope_parameters == theirs.text_config.rope_parameters


def test_older_settings_are_left_as_they_are():
    config = {
        "text_config": {"rope_theta": 5e6, "rope_scaling": {"mrope_section": [24, 20, 20]}},
        "torch_dtype": "float32",
    }
    text = deployed_config(config)["text_config"]
    assert (
        text["rope_theta"] == 5e6 and "rope_parameters" not in text and text["tie_word_embeddings"] is False
    )
    assert deployed_config(config)["torch_dtype"] == "bfloat16"
    assert "tie_word_embeddings" not in config["text_config"]


def test_a_sharded_export_runs_and_is_inspected(exported, qat_run: Path, tmp_path: Path):
    export_run(qat_run, tmp_path / "cut", max_shard_bytes=500_000)
    whole, cut = (inspect_checkpoint(path) for path in (exported[0] / "awq", tmp_path / "cut"))
    assert cut["layers"] == whole["layers"]
    answers = [
        load(path).generate([], "What is this?", 4).tokens for path in (exported[0] / "awq", tmp_path / "cut")
    ]
    assert answers[0] == answers[1]


def test_metadata_of_the_safetensors_files(exported):
    for name, kind in (("awq", "pt"), ("compressed-tensors", "pt"), ("mlx", "mlx")):
        with safe_open(exported[0] / name / "model.safetensors", framework="pt") as file:
            assert file.metadata() == {"format": kind}


def test_a_head_of_its_own_stays_dense_everywhere(qat_run: Path, tmp_path: Path):
    """The larger models do not tie head and embeddings."""
    shutil.copytree(qat_run, tmp_path / "run")
    model = tmp_path / "run" / "model"
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    tensors = load_file(model / "model.safetensors")
    head = tensors["model.language_model.embed_tokens.weight"].flip(0).contiguous()
    save_file({**tensors, "lm_head.weight": head}, model / "model.safetensors", metadata={"format": "pt"})
    report = export_run(tmp_path / "run", tmp_path / "out", FORMATS)
    assert all(report["formats"][name]["parity"]["dense_identical"] for name in PACKED)
    names = {
        "awq": "lm_head.weight",
        "compressed-tensors": "lm_head.weight",
        "mlx": "language_model.lm_head.weight",
    }
    for name, stored in names.items():
        weights = load_file(tmp_path / "out" / name / "model.safetensors")
        assert torch.equal(weights[stored], head.bfloat16())
    tensors = {
        tensor.name for tensor in gguf.GGUFReader(tmp_path / "out" / "gguf" / "model-Q4_0.gguf").tensors
    }
    assert {"output.weight", "token_embd.weight"} <= tensors
