"""Trains a student: quantized or not, with a teacher or without.

    accelerate launch -m grace.train recipes/qwen3vl_2b_w4g128.yaml [section.key=value ...]
    python -m grace.train recipes/small_world/grace_w4.yaml --dry-run

The same command continues a run that was interrupted, from its newest checkpoint. The run
directory ends with `model/`: a QAT checkpoint when quantization is on, else a plain model.
"""

import contextlib
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from grace.agreement import agreed, same_in_all, settle
from grace.arguments import add_train
from grace.cache_settings import open_cache
from grace.checkpoint_saver import CheckpointSaver
from grace.config import Recipe, load_recipe
from grace.data.records import Record, mixture_of
from grace.errors import Parser, Preempted, run_command
from grace.models import qwen3vl
from grace.models.processor import load_processor
from grace.parallel import leave, make_accelerator
from grace.preemption import ignore_in_worker, listening
from grace.run import Run, claimed, set_up, total_steps
from grace.run_data import load_run_data, require_same_on_all_ranks
from grace.run_info import announce, publish_model
from grace.run_save import resume, save_final_model, save_resume_state
from grace.run_tasks import QuickTasks, quick_tasks, task_scores
from grace.schedule import learning_rate_factor
from grace.step import NonFiniteLoss, forward_backward, run_teacher
from grace.step_inputs import StepBatches, StepInputs, wrong_input
from grace.step_stats import Stats, gate_stats, padding_share
from grace.student import Signals, Weights
from grace.tracking import Tracker
from grace.validation import validate
from grace.watch import HISTOGRAM_EDGES, controller_values

WindowEnd = Literal["no", "yes", "layers"]


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of `grace.train`; returns the process exit code."""
    description = __doc__.splitlines()[0] if __doc__ else None
    parser = Parser(prog="grace.train", description=description, rest="overrides")
    add_train(parser)
    args = parser.parse_args(argv)

    def command() -> int:
        with same_in_all():
            recipe = load_recipe(args.recipe, args.overrides)
        if args.dry_run:
            if os.environ.get("RANK", "0") == "0":  # one plan, however many processes were launched
                from grace.plan import format_plan, plan

                print(format_plan(plan(recipe)))
            return 0
        train(recipe, args.allow_changed)
        return 0

    return run_command(command)


def train(recipe: Recipe, allow_changed: Sequence[str] = ()) -> Path:
    """Runs a recipe to its end and returns the directory of the finished model.

    Args:
        allow_changed: fields `section.key` that may differ from those that an interrupted run began with.

    Raises:
        UserError: recipe, data, models or output directory are unusable.
        Preempted: asked to stop (SIGTERM, SIGUSR1); the state after the last step is saved.
        NonFiniteLoss: training diverged; nothing was stepped or saved after the last good step.
    """
    run_dir = Path(recipe.run.output_dir)
    with same_in_all():
        accelerator = make_accelerator()
    with contextlib.ExitStack() as held:
        with agreed(accelerator):
            held.enter_context(claimed(run_dir, recipe, accelerator.is_main_process, allow_changed))
        if (run_dir / "model").is_dir():
            accelerator.print(f"{run_dir} is finished: its model is {run_dir / 'model'}", file=sys.stderr)
            return run_dir / "model"
        torch.manual_seed(recipe.run.seed)
        with agreed(accelerator):
            processor = load_processor(recipe.student.path, recipe.data.min_pixels, recipe.data.max_pixels)
            data = load_run_data(recipe, processor)
            quick = quick_tasks(recipe)
        with agreed(accelerator):
            require_same_on_all_ranks(data, accelerator)
        for note in data.notes():
            accelerator.print(note, file=sys.stderr)
        records, validation = data.records, data.validation[: recipe.run.eval_records]
        cached = recipe.distils and recipe.teacher.cache is not None
        with agreed(accelerator):
            cache = open_cache(recipe, processor, records) if cached else None
        steps = total_steps(recipe, mixture_of(records).epoch)
        run = set_up(recipe, accelerator, processor.tokenizer, steps, cache)
        run.records = data.digest
        tracker = Tracker(
            run_dir, run.total_steps, recipe.run.log_every, accelerator.is_main_process,
            HISTOGRAM_EDGES, run.watch.peak,
        )  # fmt: skip
        saver = CheckpointSaver(run_dir, recipe.run.keep_last, recipe.run.keep_best)
        resume(run, tracker, run_dir, allow_changed)
        with agreed(accelerator), tracker.aside():  # W&B may take its time
            announce(tracker, recipe, accelerator)
        try:
            loop(run, tracker, saver, records, validation, processor, quick)
            with agreed(accelerator):
                save_final_model(run, run_dir)
            publish_model(tracker, recipe, run.validation)
        finally:
            tracker.finish()
        accelerator.wait_for_everyone()
    return run_dir / "model"


def _first(items: list[Any]) -> Any:
    return items[0]


def loop(
    run: Run,
    tracker: Tracker,
    saver: CheckpointSaver,
    records: Sequence[Record],
    validation: Sequence[Record],
    processor: Any,
    quick: QuickTasks | None = None,
) -> None:
    """Steps from `run.step` to the end, logging, validating and saving on the way.

    Raises:
        Preempted: asked to stop; the step is done and saved.
    """
    settings, device = run.recipe.run, run.accelerator.device
    steps = range(run.step, run.total_steps)
    loader = DataLoader(
        StepBatches(run, records, processor), batch_size=1, collate_fn=_first, sampler=steps,  # type: ignore[arg-type]
        num_workers=run.recipe.data.num_workers, worker_init_fn=ignore_in_worker,
    )  # fmt: skip
    with listening() as stop:
        for step, (inputs, waited) in zip(steps, timed(loader), strict=True):
            settle(run.accelerator, wrong_input(inputs) or saver.failure())
            end = window_end(run, tracker, step)
            values, measured, totals = one_step(run, inputs.to(device), step, waited, end)
            if step == steps.start:  # not before: a picture that cannot be read stays one line
                run.accelerator.print(f"kernels: {run.kernels}", file=sys.stderr)
            run.step = step + 1
            with agreed(run.accelerator) if tracker.due(run.step) else contextlib.nullcontext():
                tracker.add(run.step, values, measured=measured, **totals)
            finished = run.step == run.total_steps
            measure = finished or (settings.eval_every and run.step % settings.eval_every == 0)
            if validation and measure:
                with tracker.aside():
                    validate(run, tracker, validation, processor)
            if quick and measure:
                with tracker.aside():
                    tracker.log(run.step, task_scores(run, quick, processor))
            stopping = stop.on_any_rank(run.accelerator) and not finished
            if finished or stopping or run.step % settings.save_every == 0:
                score = run.validation["val/ce"] if run.validation and measure else None
                with agreed(run.accelerator):
                    save_resume_state(run, tracker, saver, score)
            if stopping:
                with agreed(run.accelerator):
                    saver.wait()
                raise Preempted(
                    f"saved after step {run.step} of {run.total_steps}; the same command goes on from there"
                )
        with agreed(run.accelerator):
            saver.wait()


def timed(loader: Iterable[Any]) -> Iterator[tuple[Any, float]]:
    """Each item, and the seconds that it was waited for."""
    start = time.perf_counter()
    for item in loader:
        yield item, time.perf_counter() - start
        start = time.perf_counter()


def window_end(run: Run, tracker: Tracker, step: int) -> WindowEnd:
    """What the log window tells that ends with `step` (0-based), if one does: layers once per validation and at the end."""
    every, log_every = run.recipe.run.eval_every, run.recipe.run.log_every
    logged = step // log_every * log_every  # the step before this one with a line
    validated = step + 1 == run.total_steps or (every > 0 and (step + 1) // every > logged // every)
    return ("layers" if validated else "yes") if tracker.due(step + 1) else "no"


def one_step(
    run: Run, inputs: StepInputs, step: int, waited: float = 0.0, end: WindowEnd = "no"
) -> tuple[Stats, dict[str, float | None], dict[str, float]]:
    """One optimizer step.

    Args:
        waited: seconds that the inputs took to come.
        end: whether this step ends a log window, and whether its line tells of every layer.

    Returns:
        The values of this step, what was measured for the log line (nothing unless it ends there), and counts whose
        rates are of interest.
    """
    options, optim = run.recipe.distill, run.recipe.optim
    omega = options.rcka_weight * min(1.0, (step + 1) / max(1, options.rcka_warmup_steps))
    weights = Weights(beta=run.controller.beta if options.loss != "none" else 0.0, omega=omega)
    factor = learning_rate_factor(step, run.total_steps, optim.warmup_ratio, optim.schedule)
    for group in run.parallel.optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
    signals, head_VE = teacher_side(run, inputs)
    result = forward_backward(
        run.parallel, inputs.student, signals, weights, options.loss, head_VE, [*inputs.work, waited]
    )
    norms = run.watch.grad_norms() if end != "no" else {}
    norm = run.parallel.update()
    if not math.isfinite(norm):
        names = [record_id for batch in inputs.student if batch is not None for record_id in batch.record_ids]
        raise NonFiniteLoss(f"the gradient is not finite at step {step + 1}; records of this step: {names}")
    values: Stats = {
        "loss/total": result.total,
        "loss/ce": result.ce,
        "optim/lr": optim.lr * factor,
        "optim/grad_norm": norm,
    }
    if run.recipe.distils:
        values |= {
            "loss/gdkd": result.kd, "loss/rcka": result.rcka, "ib/beta": weights.beta, "rcka/omega": omega,
            "rcka/degenerate_images": result.degenerate_images,
            **gate_stats(result.gates, run.objective.gate, run.objective.vocabulary), **result.images,
        }  # fmt: skip
        if options.loss != "none":
            run.controller.update(result.kd)
            values["ib/ema"] = run.controller.m if run.controller.m is not None else result.kd
    *work, all_waited = result.work
    totals = run.watch.totals(work, result.counts.tokens) | {
        "waited": all_waited / run.accelerator.num_processes
    }
    values["data/padding_share"] = padding_share(work)
    measured: dict[str, float | None] = {}
    if end != "no":
        measured = run.watch.measure(norms, by_layer=end == "layers")
        measured |= controller_values(run.controller) if options.loss != "none" else {}
    return values, measured, totals


def teacher_side(run: Run, inputs: StepInputs) -> tuple[Sequence[Signals | None], Tensor | None]:
    """What the teacher says about each micro-batch, living or cached, and the living one's head."""
    if inputs.cached is not None:
        return inputs.cached, None
    if run.teacher is None:
        return [None] * len(inputs.student), None
    objective = run.objective
    signals = run_teacher(run.teacher, inputs.student, objective.vocabulary, inputs.teacher, objective.gate)
    return signals, qwen3vl.head_weight(run.teacher)


if __name__ == "__main__":
    leave(main())
