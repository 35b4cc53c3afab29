"""What a run was: code, versions, devices, data audit; written beside its log and given to W&B."""

import json
import subprocess
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

import grace
from grace import tracking_wandb
from grace.config import Recipe
from grace.data.audit_list import list_path, summary_path
from grace.files import write_text, writing_to
from grace.recipe_parts import paths_of
from grace.run_files import ENVIRONMENT_FILE, RECIPE_FILE
from grace.tracking import Tracker


def git_revision(folder: Path | None = None) -> str | None:
    """The commit of the code that runs, with "-dirty" where tracked files differ from it; None outside a checkout.

    Args:
        folder: in which to ask; None is that of this package.
    """
    where = folder or Path(grace.__file__).parent
    if folder is None and not (where.parent / ".git").exists():  # installed into somebody else's checkout
        return None
    try:
        command = ["git", "-C", str(where), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        found = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None


def environment(accelerator: Accelerator) -> dict[str, Any]:
    """What a run runs on and with."""
    device = accelerator.device
    packages = ("torch", "transformers", "accelerate", "safetensors")
    return {
        "grace": grace.__version__,
        "git_revision": git_revision(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "processes": accelerator.num_processes,
        "distributed": accelerator.distributed_type.value,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        **{name: version(name) for name in packages},
    }


def announce(tracker: Tracker, recipe: Recipe, accelerator: Accelerator) -> None:
    """Writes `environment.json`, starts W&B, and gives it recipe, environment and the data audit's summary."""
    if not accelerator.is_main_process:
        return
    known = {**environment(accelerator), "total_steps": tracker.total_steps}
    with writing_to(tracker.run_dir, "run.output_dir"):
        write_text(tracker.run_dir / ENVIRONMENT_FILE, json.dumps(known, indent=1) + "\n")
    tracker.start_wandb(recipe.run.wandb, recipe.run.wandb_project, {**asdict(recipe), "environment": known})
    if tracker.run is None:
        return
    files = [tracker.run_dir / RECIPE_FILE, tracker.run_dir / ENVIRONMENT_FILE]
    tracking_wandb.log_artifact(tracker.run, "recipe", files, known)
    summary = summary_path(list_path(paths_of(recipe.data.path), recipe.data.audit))
    if summary.is_file():
        tracking_wandb.log_artifact(tracker.run, "data-audit", [summary])


def publish_model(tracker: Tracker, recipe: Recipe, validation: dict[str, float] | None) -> None:
    """Gives W&B the finished model: the files with `run.wandb_model`, else what it is and where it lies."""
    if tracker.run is not None:
        tracking_wandb.log_model(
            tracker.run, tracker.run_dir / "model", validation or {}, recipe.run.wandb_model
        )
