"""How a training run is saved, resumed and finished; `grace.checkpoint` and `grace.resume_checkpoint` know the files.

`resume` and `save_resume_state` are each other's inverse: what one writes, the other puts back.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import cast

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import SafetensorError
from torch import Tensor

from grace import checkpoint
from grace.agreement import agreed
from grace.checkpoint_saver import CheckpointSaver
from grace.config import recipe_hash, to_yaml
from grace.errors import UserError
from grace.files import write_text, writing_to
from grace.models import qwen3vl
from grace.parallel import Replicas
from grace.quant.grid import dequantize, quantize
from grace.resume_checkpoint import Checkpoint, load_newest_checkpoint
from grace.run import Run
from grace.run_files import RECIPE_FILE
from grace.tracking import Tracker


def save_resume_state(run: Run, tracker: Tracker, saver: CheckpointSaver, score: float | None) -> None:
    """Everything that a killed run needs to go on to the same numbers; called by all processes together.

    Args:
        score: validation loss of this very step, where it was measured.

    Raises:
        UserError: the checkpoint before this one could not be written.
    """
    names = run.parallel.trainable()
    trainable = run.parallel.for_main((n, t) for n, t in run.parallel.weights() if n in names)
    moments = run.parallel.for_main(run.parallel.moments())
    if not run.accelerator.is_main_process:
        return
    state = {
        "controller": run.controller.state_dict(), "window": tracker.state(), "validation": run.validation,
        "records": run.records,
    }  # fmt: skip
    rng = {"torch": torch.get_rng_state()}
    tensors = {"trainable": trainable, "optimizer": moments, "rng": rng, "watch": run.watch.state()}
    saver.save(run.step, tensors, state, score)


def resume(run: Run, tracker: Tracker, run_dir: Path, allow_changed: Sequence[str] = ()) -> None:
    """Continues from the newest checkpoint, or starts a new run: its recipe and its log.

    Raises:
        UserError: every checkpoint is damaged, the data holds other records than the run began with, or the directory
            cannot be written to.
    """
    accelerator = run.accelerator
    with agreed(accelerator):
        if accelerator.is_main_process:
            with writing_to(run_dir, "run.output_dir"):
                write_text(run_dir / RECIPE_FILE, to_yaml(run.recipe))
        saved = load_newest_checkpoint(run_dir, tell=accelerator.is_main_process)
        if saved is not None:
            require_same_records(run, saved, allow_changed)
    with agreed(accelerator):
        require_same_checkpoint(accelerator, saved)
    with agreed(accelerator), writing_to(run_dir, "run.output_dir"):
        tracker.start(*((0, None) if saved is None else (saved.step, saved.state["window"])))
    if saved is None:
        return
    run.parallel.load(saved.tensors["trainable"], saved.tensors["optimizer"])
    run.controller.load_state_dict(saved.state["controller"])
    if type(run.parallel) is Replicas:  # elsewhere each process watches rows of its own
        run.watch.load_state(saved.tensors.get("watch", {}))
    run.validation = saved.state["validation"]
    run.step = saved.step
    torch.set_rng_state(saved.tensors["rng"]["torch"])
    accelerator.print(f"continuing from step {saved.step} of {run.total_steps}", file=sys.stderr)


def require_same_records(run: Run, saved: Checkpoint, allow_changed: Sequence[str]) -> None:
    """Raises `UserError` where the data holds other records than the run began with."""
    if saved.state.get("records", run.records) != run.records and not any(
        field.startswith("data.") for field in allow_changed
    ):
        raise UserError(
            f"the records are not those that {run.recipe.run.output_dir} began with (another annotation file or "
            "audit): put them back, set run.output_dir, or go on with these by --allow-changed data.path"
        )


def require_same_checkpoint(accelerator: Accelerator, saved: Checkpoint | None) -> None:
    """Raises `UserError` in all processes where they do not read the same: half of them would train on from elsewhere."""
    steps = [-1 if saved is None else saved.step]
    if accelerator.num_processes > 1 and len(found := set(gather_object(steps))) > 1:
        raise UserError(
            f"the processes find different checkpoints (of steps {sorted(found)}): run.output_dir must be on a file "
            "system that all of them share"
        )


def save_final_model(run: Run, run_dir: Path) -> None:
    """Writes `model/`: W_hat plus codes, scales and latents, or the plain weights; called by all together.

    Raises:
        UserError: it cannot be written.
    """
    state = run.parallel.for_main(run.parallel.weights())
    if not run.accelerator.is_main_process:
        return
    qat, config = None, run.base_config
    dtype = torch.float32
    if run.recipe.quant.bits is not None:
        qat = quantized_state(run, state)
        for name, weight in qat.modules.items():
            state[f"{name}.weight"] = dequantize(weight.codes_OI, weight.scales_OG, qat.group_size)
            del state[f"{name}.theta"]
    elif run.recipe.run.precision == "bf16":
        dtype = torch.bfloat16
    state = {name: tensor.to(dtype) for name, tensor in state.items()}
    config.dtype = dtype
    try:
        checkpoint.save_model(run_dir / "model", state, config, Path(run.recipe.student.path), qat)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{run_dir / 'model'} cannot be written ({getattr(error, 'strerror', None) or error}): make room, then start "
            "the same command again: it writes the model from the last checkpoint"
        ) from error


def quantized_state(run: Run, weights: Mapping[str, Tensor]) -> checkpoint.QatState:
    """Codes and scales as trained, with latents, and what a reader wants to know of the run."""
    bits, group_size = cast(int, run.recipe.quant.bits), run.recipe.quant.group_size
    modules = {}
    for name in qwen3vl.quantized_linears(run.model):
        latent_OI, theta_OG = weights[f"{name}.weight"], weights[f"{name}.theta"]
        try:
            codes_OI, scales_OG = quantize(latent_OI, theta_OG, group_size, bits)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        modules[name] = checkpoint.QuantizedWeight(codes_OI, scales_OG, latent_OI, theta_OG)
    info = {
        "recipe": asdict(run.recipe),
        "recipe_sha256": recipe_hash(run.recipe),
        "metrics": run.validation or {},
        "steps": run.step,
        "base_model": run.recipe.student.path,
    }
    return checkpoint.QatState(bits, group_size, modules, info)
