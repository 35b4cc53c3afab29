"""`grace export`: what is written, that it is what was trained, and what is refused."""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from small_qat_run import write_qat_run  # pyright: ignore[reportMissingImports] - tests/ is on the path

from grace.checkpoint import read_qat
from grace.data.records import load_records
from grace.errors import UserError
from grace.export import awq, parity
from grace.export.pack import export_run, run_export
from grace.export.reference import Reference
from grace.export.source import open_source, read_back

FILES = {
    "model.safetensors", "config.json", "generation_config.json", "processor_config.json", "tokenizer.json",
    "tokenizer_config.json", "chat_template.jinja", "awq_quantized_modules.json", "README.md", "grace_export.json",
}  # fmt: skip


@pytest.fixture(scope="module")
def exported(qat_run: Path, tmp_path_factory: pytest.TempPathFactory):
    out = tmp_path_factory.mktemp("exports") / "awq"
    return out, export_run(qat_run, out)


def test_the_directory_is_the_documented_one(exported, qat_run: Path):
    out, report = exported
    assert {path.name for path in out.iterdir()} == FILES
    for name in FILES - {
        *("model.safetensors", "config.json", "awq_quantized_modules.json", "README.md", "grace_export.json")
    }:
        assert (out / name).read_bytes() == (qat_run / "model" / name).read_bytes()
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"] == {
        "quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True,
        "modules_to_not_convert": ["visual", "model.visual", "lm_head"],
    }  # fmt: skip
    assert config["dtype"] == config["text_config"]["dtype"] == config["vision_config"]["dtype"] == "bfloat16"
    modules = json.loads((out / "awq_quantized_modules.json").read_text())
    assert modules == {"bits": 4, "group_size": 128, "modules": sorted(read_qat(qat_run / "model").modules)}
    json.dumps(report)


def test_tensors_are_the_trained_ones(exported, qat_run: Path):
    tensors = load_file(exported[0] / "model.safetensors")
    base = load_file(qat_run / "model" / "model.safetensors")
    state = read_qat(qat_run / "model")
    for name, weight in state.modules.items():
        parts = {part: tensors.pop(f"{name}.{part}") for part in ("qweight", "qzeros", "scales")}
        codes, scales = awq.unpack(**parts)
        assert torch.equal(codes, weight.codes_OI) and torch.equal(scales, weight.scales_OG)
        base.pop(f"{name}.weight")
    assert set(tensors) == set(base) and "lm_head.weight" not in tensors
    for name, tensor in tensors.items():
        assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, base[name].bfloat16())


def test_same_run_same_bytes(exported, qat_run: Path, tmp_path: Path):
    export_run(qat_run / "model", tmp_path / "again")
    for name in FILES:
        assert (tmp_path / "again" / name).read_bytes() == (exported[0] / name).read_bytes(), name


def test_parity_figures(exported):
    figures = exported[1]["formats"]["awq"]["parity"]
    assert figures["codes_identical"] and figures["positions"] > 20
    assert figures["exact"]["relative"] <= 1e-4
    deployed = figures["deployed"]
    assert deployed["kernel"] == "aten" and 0 < deployed["max_abs"] <= deployed["tolerance"]
    assert all(item["gap"] <= deployed["tolerance"] for item in deployed["top1_differences"])
    assert all(item["gap"] <= deployed["tolerance"] for item in figures["greedy"]["parted"])


def test_model_card(exported):
    text = (exported[0] / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    header = yaml.safe_load(front)
    assert header["base_model"] == "Qwen/Qwen3-VL-2B-Instruct"
    assert header["pipeline_tag"] == "image-text-to-text" and header["library_name"] == "transformers"
    assert header["license"] == "apache-2.0" and "awq" in header["tags"]
    for text in (
        "grace.runtime",
        "gptqmodel",
        "vllm serve",
        "validation.json",
        "0" * 64,
        "val/exact_match",
        "2601.22709",
    ):
        assert text in body
    assert str(exported[0]) not in body


def test_several_formats_and_the_lossless_copy(qat_run: Path, tmp_path: Path):
    report = export_run(qat_run, tmp_path / "out", ("qat", "awq"))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"qat", "awq"}
    for name in ("model.safetensors", "config.json", "grace_qat/state.safetensors", "grace_qat/info.json"):
        assert (tmp_path / "out" / "qat" / name).read_bytes() == (qat_run / "model" / name).read_bytes()
    assert report["formats"]["qat"]["parity"]["weights_identical"]
    assert report["formats"]["awq"]["path"] == str(tmp_path / "out" / "awq")


@pytest.mark.parametrize("tensor", ["qweight", "scales", "embed", "norm"])
def test_the_gate_stops_a_wrong_export(
    exported, qat_run: Path, tiny_world_dir: Path, tmp_path: Path, tensor: str
):
    """Each kind of damage that a bug could do, done to the written files."""
    shutil.copytree(exported[0], tmp_path / "awq")
    file = tmp_path / "awq" / "model.safetensors"
    tensors = load_file(file)
    if tensor in ("qweight", "scales"):
        name = next(name for name in sorted(tensors) if name.endswith(tensor))
        tensors[name].view(-1)[3] += 1 if tensor == "qweight" else tensors[name].view(-1)[3]
    else:
        name = next(name for name in sorted(tensors) if tensor in name and "language_model" in name)
        tensors[name] = tensors[name] * 1.02
    save_file(tensors, file, metadata={"format": "pt"})
    source = open_source(qat_run)
    reference = Reference(source, load_records(tiny_world_dir / "validation.json")[:4])
    with pytest.raises(RuntimeError, match="nothing was published"):
        parity.check_loaded(reference, read_back(tmp_path / "awq", "awq"), tmp_path / "awq")


def test_a_failed_gate_publishes_nothing(qat_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(parity, "EXACT_LIMIT", -1.0)
    with pytest.raises(RuntimeError, match="nothing was published"):
        export_run(qat_run, tmp_path / "out", ("qat", "awq"))
    assert list(tmp_path.iterdir()) == []


def test_eight_bits_export_as_qat_only(tmp_path: Path, tiny_student_dir: Path, tiny_world_dir: Path):
    run = write_qat_run(tmp_path / "w8", tiny_student_dir, tiny_world_dir, bits=8)
    with pytest.raises(UserError, match="4 bits only"):
        export_run(run, tmp_path / "awq")
    assert export_run(run, tmp_path / "qat", ("qat",))["formats"]["qat"]["bits"] == 8
    assert not (tmp_path / "awq").exists()


def test_smaller_groups(tmp_path: Path, tiny_student_dir: Path, tiny_world_dir: Path):
    run = write_qat_run(tmp_path / "g32", tiny_student_dir, tiny_world_dir, group_size=32)
    report = export_run(run, tmp_path / "awq")
    assert report["formats"]["awq"]["group_size"] == 32


def damaged_copy(qat_run: Path, tmp_path: Path) -> Path:
    shutil.copytree(qat_run, tmp_path / "run")
    return tmp_path / "run"


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: shutil.rmtree(run / "model"), "not finished"),
        (lambda run: shutil.rmtree(run / "model" / "grace_qat"), "full-precision"),
        (lambda run: shutil.rmtree(run), "not a directory"),
        (lambda run: (shutil.rmtree(run / "model"), (run / "recipe.yaml").unlink()), "neither a run"),
        (lambda run: truncate(run / "model" / "model.safetensors"), "damaged"),
        (lambda run: truncate(run / "model" / "grace_qat" / "state.safetensors"), "damaged"),
        (lambda run: (run / "model" / "grace_qat" / "info.json").write_text("{"), "damaged"),
        (lambda run: (run / "model" / "config.json").write_text("{"), "damaged"),
        (lambda run: (run / "model" / "tokenizer.json").unlink(), "processor"),
    ],
)
def test_unusable_sources_give_one_line(qat_run: Path, tmp_path: Path, damage, message: str):
    run = damaged_copy(qat_run, tmp_path)
    damage(run)
    with pytest.raises(UserError, match=message) as caught:
        export_run(run, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_an_output_in_use_is_left_alone(qat_run: Path, tmp_path: Path):
    (tmp_path / "keep.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        export_run(qat_run, tmp_path)
    assert (tmp_path / "keep.txt").read_text() == "mine"


@pytest.mark.parametrize("moment", ["awq.write", "model_card"])
def test_a_kill_in_mid_write_leaves_no_directory(qat_run: Path, tmp_path: Path, moment: str):
    """SIGKILL, nothing can tidy up: the name asked for is still free, and a second export succeeds."""
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom grace.export import pack\n"
        f"pack.{moment} = lambda *args: os.kill(os.getpid(), 9)\n"
        "pack.export_run(Path(sys.argv[1]), Path(sys.argv[2]))"
    )
    out = tmp_path / "out"
    killed = subprocess.run([sys.executable, "-c", code, str(qat_run), str(out)], capture_output=True)
    assert killed.returncode == -9 and not out.exists()
    assert all(path.name.startswith(".out.tmp-") for path in tmp_path.iterdir())
    export_run(qat_run, out)
    assert (out / "README.md").is_file() and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_unknown_format(qat_run: Path, tmp_path: Path):
    with pytest.raises(UserError, match="unknown format onnx"):
        export_run(qat_run, tmp_path / "out", ("onnx",))


def test_missing_parity_data_names_the_option(qat_run: Path, tmp_path: Path, tiny_world_dir: Path):
    run = damaged_copy(qat_run, tmp_path)
    info = run / "model" / "grace_qat" / "info.json"
    content = json.loads(info.read_text())
    content["recipe"]["data"]["validation_path"] = str(tmp_path / "gone.json")
    info.write_text(json.dumps(content))
    with pytest.raises(UserError, match="--parity-data"):
        export_run(run, tmp_path / "out")
    shutil.copyfile(
        tiny_world_dir / "validation.json", tmp_path / "gone.json"
    )  # the records, not their images
    with pytest.raises(UserError, match="image .* is missing: pass --parity-data"):
        export_run(run, tmp_path / "out")
    assert export_run(run, tmp_path / "out", image_root=tiny_world_dir)["formats"]["awq"]["parity"]["records"]


def test_command_prints_one_json_object(qat_run: Path, tmp_path: Path, tiny_world_dir: Path, capsys):
    args = argparse.Namespace(
        run=str(qat_run), out=str(tmp_path / "out"), format=["awq"], json=True,
        parity_data=str(tiny_world_dir / "test.json"), max_shard_size=None, base_model=None, results=None,
    )  # fmt: skip
    assert run_export(args) == 0
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert report["formats"]["awq"]["path"] == str(tmp_path / "out")
    assert "parity awq" in printed.err and "tolerance" in printed.err
