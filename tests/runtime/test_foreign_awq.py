"""AWQ directories by others in GRACE's runtime: the layers they mean, whatever their lists and zero points say."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from foreign_checkpoints import (  # pyright: ignore[reportMissingImports] - tests/ is on the path
    dequantized,
    write_awq,
    write_reference_awq,
)
from safetensors.torch import load_file, save_file
from transformers import Qwen3VLForConditionalGeneration

from grace.errors import UserError
from grace.runtime.generate import load
from grace.runtime.inspect import inspect_checkpoint
from grace.runtime.int4_linear import int4_linears, set_kernel

IDS = torch.tensor([[429, 3, 17, 99, 200, 5, 5, 61]])


def dense_logits(directory: Path, linears: dict, out: Path) -> torch.Tensor:
    """What a plain model with the weights that the linears mean says, in fp32."""
    tensors = {name: tensor.float() for name, tensor in load_file(directory / "model.safetensors").items()}
    kept = {name: t for name, t in tensors.items() if not name.endswith(("qweight", "qzeros", "scales"))}
    wide = {f"{name}.weight": dequantized(linear).float() for name, linear in linears.items()}
    shutil.copytree(
        directory, out, ignore=shutil.ignore_patterns("*.safetensors", "awq_quantized_modules.json")
    )
    config = json.loads((out / "config.json").read_text())
    plain = {key: value for key, value in config.items() if key not in ("quantization_config", "awq_packing")}
    (out / "config.json").write_text(json.dumps(plain))
    save_file({**kept, **wide}, out / "model.safetensors", metadata={"format": "pt"})
    return logits(Qwen3VLForConditionalGeneration.from_pretrained(out, dtype=torch.float32).eval())


@torch.inference_mode()
def logits(model) -> torch.Tensor:
    return model(input_ids=IDS, mm_token_type_ids=torch.zeros_like(IDS)).logits.float()


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_any_zero_points(tiny_student_dir: Path, tmp_path: Path, group_size: int):
    left = ("layers.3.mlp.gate_proj",)
    linears = write_awq(tiny_student_dir, tmp_path / "awq", group_size, dense=left)
    expected = dense_logits(tmp_path / "awq", linears, tmp_path / "dense")
    engine = load(tmp_path / "awq", torch.float32)
    assert engine.kind == "awq" and set(int4_linears(engine.model)) == set(linears)
    for kernel in ("auto", "dequant", "reference"):
        set_kernel(engine.model, kernel)
        assert (logits(engine.model) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert engine.generate([], "What is this?", 3).tokens
    fused = load(tmp_path / "awq", torch.bfloat16)
    set_kernel(fused.model, "aten")
    assert (logits(fused.model) - expected).abs().max() <= 0.05 * expected.abs().max()


def test_packed_checkpoints_of_the_public_code(tiny_student_dir: Path, tmp_path: Path):
    linears = write_reference_awq(tiny_student_dir, tmp_path / "packed")
    expected = dense_logits(tmp_path / "packed", linears, tmp_path / "dense")
    engine = load(tmp_path / "packed", torch.float32)
    assert engine.kind == "awq" and set(int4_linears(engine.model)) == set(linears)
    assert (logits(engine.model) - expected).abs().max() <= 1e-5 * expected.abs().max()
    deployed = load(tmp_path / "packed")
    assert deployed.model.dtype == torch.bfloat16 and deployed.generate([], "What is this?", 3).tokens
    figures = inspect_checkpoint(tmp_path / "packed")
    assert figures["kind"] == "awq" and figures["totals"]["layers"] == len(linears)
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    packing = config.pop("awq_packing")
    (tmp_path / "packed" / "config.json").write_text(json.dumps(config))  # the list of modules says it too
    assert torch.equal(logits(load(tmp_path / "packed", torch.float32).model), logits(engine.model))
    assert packing["group_size"] == 128
    (tmp_path / "packed" / "config.json").write_text(json.dumps({**config, "awq_packing": [4, 128]}))
    for use in (load, inspect_checkpoint):
        with pytest.raises(UserError, match="awq_packing is no table"):
            use(tmp_path / "packed")
