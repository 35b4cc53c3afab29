"""A finished quantized run of the tiny student, made without training: shared by the export and runtime tests."""

import copy
from pathlib import Path

import torch

from grace.checkpoint import QatState, QuantizedWeight, save_model
from grace.models import qwen3vl
from grace.quant.grid import dequantize


def write_qat_run(out: Path, student: Path, world: Path, bits: int = 4, group_size: int = 128) -> Path:
    """Writes `out` as a run directory whose scales are *not* what a quantizer would choose for its weights."""
    torch.manual_seed(0)
    model = qwen3vl.load_model(str(student))
    config = copy.deepcopy(model.config)
    modules = {}
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    for name, layer in qwen3vl.quantize_decoder(model, bits, group_size).items():
        layer.theta.data += 0.2 * torch.randn_like(layer.theta)
        codes_OI, scales_OG = layer.codes_and_scales()
        modules[name] = QuantizedWeight(codes_OI, scales_OG, layer.weight.detach(), layer.theta.detach())
        state[f"{name}.weight"] = dequantize(codes_OI, scales_OG, group_size)
    data = {
        "path": str(world / "qat_train.json"),
        "validation_path": str(world / "validation.json"),
        "max_length": 1024,
    }
    info = {
        "recipe": {"data": data, "quant": {"bits": bits, "group_size": group_size}},
        "recipe_sha256": "0" * 64,
        "metrics": {"val/ce": 1.25, "val/exact_match": 0.5},
        "steps": 20,
        "base_model": "Qwen/Qwen3-VL-2B-Instruct",
    }
    config.dtype = torch.float32
    out.mkdir(parents=True)
    (out / "recipe.yaml").write_text("student: {}\n")
    save_model(out / "model", state, config, student, QatState(bits, group_size, modules, info))
    return out
