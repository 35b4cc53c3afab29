"""`export/llm_compressor.py` up to the point where llm-compressor takes over; a stand-in takes its place."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from safetensors.torch import load_file

SCRIPT = Path(__file__).parents[2] / "export" / "llm_compressor.py"


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("llm_compressor", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def environment(script: ModuleType, tmp_path: Path) -> Path:
    """What looks like the environment; its Python keeps the samples that it is given, or fails on request."""
    folder = tmp_path / "environment"
    (folder / "bin").mkdir(parents=True)
    (folder / ".installed").write_text(json.dumps(script.PACKAGES))
    (folder / "bin" / "python").write_text(
        "#!/bin/bash\n[[ -e $(dirname $0)/fail ]] && exit 3\n"
        'echo "$2 $3" > "$6/called"; cp "$5" "$6/samples.safetensors"\n'
    )
    (folder / "bin" / "python").chmod(0o755)
    return folder


def run(script: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["llm_compressor.py", *map(str, arguments)])
    return script.main()


def test_records_with_pictures_reach_the_other_side_as_tensors(
    script,
    environment: Path,
    tiny_student_dir: Path,
    tiny_world_dir: Path,
    tmp_path: Path,
    monkeypatch,
    capfd,
):
    data = tiny_world_dir / "qat_train.json"
    options = ("--data", data, "--out", tmp_path / "out", "--records", "5", "--folder", environment)
    assert run(script, monkeypatch, tiny_student_dir, "--method", "gptq", *options) == 0
    assert (tmp_path / "out" / "called").read_text() == "--inside gptq\n"
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (
        tiny_student_dir / "tokenizer.json"
    ).read_bytes()
    samples = load_file(tmp_path / "out" / "samples.safetensors")
    assert {name.split(".")[0] for name in samples} == set("01234")
    for index in range(5):
        assert samples[f"{index}.pixel_values"].ndim == 2 and samples[f"{index}.input_ids"].shape[0] == 1
    assert "5 calibration records" in capfd.readouterr().err


def test_a_failure_over_there_leaves_nothing(
    script,
    environment: Path,
    tiny_student_dir: Path,
    tiny_world_dir: Path,
    tmp_path: Path,
    monkeypatch,
    capfd,
):
    (environment / "bin" / "fail").touch()
    options = ("--data", tiny_world_dir / "test.json", "--out", tmp_path / "out", "--folder", environment)
    assert run(script, monkeypatch, tiny_student_dir, "--method", "awq", *options) == 1
    assert "python failed (3)" in capfd.readouterr().err and not (tmp_path / "out").exists()


def test_what_cannot_be_quantized_or_read_is_one_line(
    script, environment: Path, tiny_student_dir: Path, tmp_path: Path, monkeypatch, capfd
):
    (tmp_path / "text.json").write_text(
        json.dumps(
            [{"id": "a", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}]
        )
    )
    for model, data, message in (
        (tmp_path / "nowhere", "text.json", "no Qwen3-VL directory"),
        (tiny_student_dir, "nowhere.json", "nowhere.json"),
        (tiny_student_dir, "text.json", "no records with pictures"),
    ):
        options = ("--data", tmp_path / data, "--out", tmp_path / "out", "--folder", environment)
        assert run(script, monkeypatch, model, "--method", "awq", *options) == 2
        error = capfd.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and message in error
        assert not (tmp_path / "out").exists()
