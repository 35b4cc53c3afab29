"""One trial of the study: a recipe trained in this process and scored, as a row of JSON types.

The steps are `grace.train`'s own (`one_step`); its files, checkpoints and log are left out, and what many trials have in
common is remembered (`grace.study.memo`).
"""

import dataclasses
import functools
import hashlib
import os
import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import parent_process
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator

from grace import checkpoint
from grace.cache_settings import open_cache
from grace.config import Recipe, load_recipe, resource
from grace.data.records import load_records
from grace.demo import scoring
from grace.distill.cache_store import TeacherCache
from grace.errors import UserError
from grace.evaluation.exact_match import by_type, evaluate, summarize
from grace.models.processor import load_processor
from grace.parallel import make_accelerator
from grace.quant.fake_quant import TorchKernels, use_kernels
from grace.run import Run, set_up
from grace.step import NonFiniteLoss
from grace.step_inputs import StepBatches
from grace.study.kernels import KERNELS, Once
from grace.study.memo import RememberedBatches, said_by, samples_of, scored_batches
from grace.teacher_cache import fill_cache
from grace.train import one_step

LOGGED = ("loss/ce", "loss/gdkd", "loss/rcka", "ib/beta", "ib/ema", "gate/mean", "teacher/entropy")


@dataclass(frozen=True)
class Trial:
    """What one row says the outcome of.

    Attributes:
        recipe: a packaged recipe.
        overrides: `section.key=value`, paths and seed apart.
        seed: which part of the data is trained on, and in which order.
        split: what the student is scored on.
        start, teacher: a role of the packaged weights, or the name of a noisy teacher.
        kernels: of the quantizer, by name.
        trained: without, the student is scored as it starts: rounded to nearest, if the recipe quantizes.
        cached: the teacher speaks from a cache.
        saved_as: what is trained is a noisy teacher of this name, and kept.
    """

    recipe: str
    overrides: tuple[str, ...] = ()
    seed: int = 0
    split: str = "test"
    start: str = "student"
    teacher: str = "teacher"
    kernels: str = "torch"
    trained: bool = True
    cached: bool = False
    saved_as: str | None = None

    def setting(self, name: str) -> str | None:
        """What the overrides say of a field `section.key`."""
        found = [value for key, _, value in (one.partition("=") for one in self.overrides) if key == name]
        return found[-1] if found else None


def model_path(out: Path, name: str) -> Path:
    """A role's packaged weights, or where the noisy teacher of that name is."""
    packaged = name in ("teacher", "student")
    return resource(f"small_world/weights/{name}") if packaged else out / "teachers" / name


def data_path(out: Path, trial: Trial) -> Path:
    """What it is trained on."""
    name = f"train_{trial.seed}" if trial.saved_as is None else f"lessons_{trial.saved_as}"
    return out / "world" / f"{name}.json"


def split_path(out: Path, trial: Trial) -> Path:
    """What it is scored on."""
    return out / "world" / f"{trial.split}.json"


def resolved(trial: Trial, out: Path) -> Recipe:
    """The trial's recipe with its paths."""
    data = data_path(out, trial)
    overrides = [
        *trial.overrides,
        f"run.seed={trial.seed}",
        f"run.output_dir={out / 'unused'}",
        f"data.path={data}",
        "data.validation_path=null",
        f"student.path={model_path(out, trial.start)}",
    ]
    recipe = load_recipe(trial.recipe, overrides)
    if not recipe.distils:
        return recipe
    cache = str(out / "caches" / data.stem) if trial.cached else None
    teacher = dataclasses.replace(recipe.teacher, path=str(model_path(out, trial.teacher)), cache=cache)
    return dataclasses.replace(recipe, teacher=teacher)


def run_trial(trial: Trial, out: Path) -> dict[str, Any]:
    """Trains and scores.

    Returns:
        The scores, what training logged at its first and last step, a digest of what was trained, seconds, and those of a core; or the
        message with which training diverged, as `failed`.
    """
    start, worked = time.perf_counter(), time.process_time()
    try:
        row = outcome(trial, out)
    except NonFiniteLoss as error:
        row = {"failed": str(error)}
    _accelerator().free_memory()
    return {**row, "seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - worked}


def outcome(trial: Trial, out: Path) -> dict[str, Any]:
    """What `run_trial` returns of a trial that does not diverge.

    Raises:
        NonFiniteLoss: it diverged.
    """
    recipe, accelerator = resolved(trial, out), _accelerator()
    torch.manual_seed(recipe.run.seed)
    processor, records = load_processor(recipe.student.path), load_records(data_path(out, trial))
    cache: TeacherCache | None = None
    if recipe.teacher.cache:
        fill_cache(recipe, Path(recipe.teacher.cache), accelerator)
        cache = open_cache(recipe, processor, records)
    steps = cast(int, recipe.run.max_steps) if trial.trained else 0
    run = set_up(recipe, accelerator, processor.tokenizer, max(1, steps), cache)
    kernels = KERNELS[trial.kernels]()
    use_kernels(accelerator.device.type, kernels)
    whole = cache is not None or trial.saved_as is not None  # too much to remember, for one trial each
    batches = (
        StepBatches(run, records, processor)
        if whole or not steps
        else RememberedBatches(run, records, processor, data_path(out, trial))
    )
    logs = []
    for step in range(steps):
        inputs = batches[step]
        if isinstance(inputs, UserError):
            raise inputs
        logs.append(one_step(run, inputs, step)[0])
        if isinstance(kernels, Once):
            kernels.forget()
    scores = score(run, split_path(out, trial))
    row = {"scores": scores, "log": logged(logs), "weights_sha256": digest(run)}
    if trial.kernels == "unsnapped":
        use_kernels(accelerator.device.type, TorchKernels())
        row["scores_snapped"] = score(run, split_path(out, trial))
    if trial.saved_as is not None:
        keep(run, model_path(out, trial.saved_as))
    return row


@functools.cache
def _accelerator() -> Accelerator:
    """One for all trials of the process."""
    return make_accelerator()


def forget() -> None:
    """Drops what the process remembers of earlier trials."""
    for remembered in (samples_of, said_by, scored_batches):
        remembered.cache_clear()


def score(run: Run, data: Path) -> dict[str, Any]:
    """Exact match and cross-entropy, all questions together and kind by kind."""
    model = run.parallel.for_evaluation()
    model.eval()
    scores = evaluate(model, scored_batches(data, run.recipe.student.path), run.accelerator.device)
    model.train()
    return {**summarize(scores), "by_type": dict(by_type(scores))}


def logged(logs: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Of what training told: the values at its first and last step."""
    ends = [logs[0], logs[-1]] if logs else []
    return {name: [end[name] for end in ends] for name in LOGGED if ends and name in ends[0]}


def digest(run: Run) -> str:
    """SHA-256 of everything trained, to tell whether two trials ended with the same bits."""
    total = hashlib.sha256()
    for name, parameter in sorted(run.parallel.trainable().items()):
        total.update(name.encode() + parameter.detach().contiguous().numpy().tobytes())
    return total.hexdigest()


def keep(run: Run, path: Path) -> None:
    """Writes the trained model as a plain directory, in place of one that a killed study left."""
    shutil.rmtree(path, ignore_errors=True)
    state = {name: tensor.detach().clone() for name, tensor in run.parallel.weights()}
    run.base_config.dtype = torch.float32
    checkpoint.save_model(path, state, run.base_config, Path(run.recipe.student.path))


# ---------------------------------------------------------------- the process around it


def set_up_worker() -> None:
    """One thread, no chatter, and no life after the process that asked for the work."""
    scoring.set_up_process(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
