"""How a training run is saved, resumed and finished; `grace.checkpoint` knows the files.

`resume` and `save_resume_state` are each other's inverse: what one writes, the other puts back.
"""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import cast

import torch

from grace import checkpoint
from grace.config import recipe_hash, to_yaml
from grace.files import write_text
from grace.models import qwen3vl
from grace.quant.grid import dequantize
from grace.run import Run
from grace.run_files import RECIPE_FILE
from grace.tracking import Tracker


def save_resume_state(run: Run, tracker: Tracker, run_dir: Path) -> None:
    """Everything that a killed run needs to go on to the same numbers."""
    trainable = {name: p for name, p in run.model.named_parameters() if p.requires_grad}
    moments = {
        f"{name}.{key}": value
        for name, p in trainable.items()
        for key, value in run.optimizer.state[p].items()
    }
    state = {"controller": run.controller.state_dict(), "window": tracker.state(), "validation": run.validation}  # fmt: skip
    rng = {"torch": torch.get_rng_state()}
    tensors = {"trainable": trainable, "optimizer": moments, "rng": rng, "watch": run.watch.state()}
    checkpoint.save_checkpoint(run_dir, run.step, tensors, state, run.recipe.run.keep_last)


def resume(run: Run, tracker: Tracker, run_dir: Path) -> None:
    """Continues from the newest checkpoint, or starts a new run: its recipe and its log."""
    if run.accelerator.is_main_process:
        write_text(run_dir / RECIPE_FILE, to_yaml(run.recipe))
    saved = checkpoint.load_newest_checkpoint(run_dir)
    if saved is None:
        tracker.start(0, None)
        return
    with torch.no_grad():
        for name, parameter in run.model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(saved.tensors["trainable"][name])
                moments = {
                    key: saved.tensors["optimizer"][f"{name}.{key}"].to(parameter.device)
                    for key in ("step", "exp_avg", "exp_avg_sq")
                    if f"{name}.{key}" in saved.tensors["optimizer"]  # absent: no gradient so far
                }
                if moments:
                    run.optimizer.state[parameter] = moments
    run.controller.load_state_dict(saved.state["controller"])
    run.watch.load_state(saved.tensors.get("watch", {}))
    run.validation = saved.state["validation"]
    run.step = saved.step
    torch.set_rng_state(saved.tensors["rng"]["torch"])
    tracker.start(saved.step, saved.state["window"])
    run.accelerator.print(f"continuing from step {saved.step} of {run.total_steps}", file=sys.stderr)


def save_final_model(run: Run, run_dir: Path) -> None:
    """Writes `model/`: W_hat plus codes, scales and latents, or the plain weights."""
    state = {name: tensor for name, tensor in run.model.state_dict().items() if not name.endswith(".theta")}
    if run.base_config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    qat, config = None, run.base_config
    dtype = torch.float32
    if run.recipe.quant.bits is not None:
        qat = quantized_state(run)
        for name, weight in qat.modules.items():
            state[f"{name}.weight"] = dequantize(weight.codes_OI, weight.scales_OG, qat.group_size)
    elif run.recipe.run.precision == "bf16":
        dtype = torch.bfloat16
    state = {name: tensor.to(dtype) for name, tensor in state.items()}
    config.dtype = dtype
    checkpoint.save_model(run_dir / "model", state, config, Path(run.recipe.student.path), qat)


def quantized_state(run: Run) -> checkpoint.QatState:
    """Codes and scales as trained, with latents, and what a reader wants to know of the run."""
    modules = {}
    for name, layer in qwen3vl.quantized_linears(run.model).items():
        codes_OI, scales_OG = layer.codes_and_scales()
        modules[name] = checkpoint.QuantizedWeight(
            codes_OI.cpu(), scales_OG.cpu(), layer.weight.detach().cpu(), layer.theta.detach().cpu()
        )
    info = {
        "recipe": asdict(run.recipe),
        "recipe_sha256": recipe_hash(run.recipe),
        "metrics": run.validation or {},
        "steps": run.step,
        "base_model": run.recipe.student.path,
    }
    return checkpoint.QatState(cast(int, run.recipe.quant.bits), run.recipe.quant.group_size, modules, info)
