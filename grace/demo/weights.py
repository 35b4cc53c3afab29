"""The demo's teacher and full-precision student: packaged, or made here from random weights.

Both ways give the same kind of directory: bfloat16 weights, as a published model comes, and a
`TRAINED.json` that says which recipes, seed and data made them.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from grace import checkpoint
from grace.config import load_recipe, recipe_hash, resource
from grace.demo import scoring
from grace.files import new_directory, sha256_of, write_text
from grace.models import qwen3vl
from grace.models.tiny import write_tiny_model

ROLES = ("teacher", "student")
STAGES = ("see", "answer")  # first to describe pictures, then to answer every kind of question
ABOUT = "TRAINED.json"


def recipe_of(role: str, stage: str) -> str:
    """Name of the packaged recipe of one stage."""
    return f"small_world/{role}_{stage}.yaml"


def split_of(role: str, stage: str) -> str:
    """The split of the small world a stage is trained on."""
    return f"{role}_{stage}"


def copy_packaged(role: str, out: Path) -> Path:
    """Copies the packaged weights to `out` and returns where they came from."""
    packaged = resource(f"small_world/weights/{role}")
    with new_directory(out) as scratch:
        shutil.copytree(packaged, scratch, dirs_exist_ok=True)
    return packaged


def make(role: str, out: Path, work: Path, data: Path, seed: int, extra: Sequence[str], log: Path) -> float:
    """Random weights, then `grace.train` stage by stage; leaves the model in `out`, returns seconds.

    Args:
        work: where the stages' runs are kept; an interrupted one continues there.
        extra: further recipe overrides, such as a shorter run.
    """
    start, seconds, stages = work / f"{role}_init", 0.0, []
    if not start.exists():
        write_tiny_model(start, role, seed)  # type: ignore[arg-type]
    for stage in STAGES:
        run = work / f"{role}_{stage}"
        overrides = [
            f"run.output_dir={run}",
            f"run.seed={seed}",
            f"data.path={data / split_of(role, stage)}.json",
            f"data.validation_path={data / 'validation.json'}",
            f"student.path={start}",
            *extra,
        ]
        seconds += scoring.train_in_worker(recipe_of(role, stage), overrides, log)
        recipe = load_recipe(recipe_of(role, stage), overrides)
        steps = {
            "recipe": recipe_of(role, stage),
            "steps": recipe.run.max_steps,
            "sha256": recipe_hash(load_recipe(recipe_of(role, stage))),
        }
        stages.append(steps)
        start = run / "model"
    publish(start, out, {"role": role, "seed": seed, "stages": stages})
    return seconds


def publish(source: Path, out: Path, about: dict[str, Any]) -> None:
    """Writes the model at `source` to `out` in bfloat16, with `about` and the hash of the weights."""
    state = {
        name: tensor.to(torch.bfloat16) for name, tensor in load_file(source / "model.safetensors").items()
    }
    config = qwen3vl.config_for(str(source))
    config.dtype = torch.bfloat16
    checkpoint.save_model(out, state, config, source)
    about = {**about, "weights_sha256": sha256_of(out / "model.safetensors")}
    write_text(out / ABOUT, json.dumps(about, indent=1) + "\n")
