"""Benchmarks in training: `run.eval_tasks`, a few questions of each whenever a run validates."""

import torch

from grace.config import Recipe
from grace.evaluation.quick_tasks import QuickTasks
from grace.run import Run, compute_dtype
from grace.step import reduce_sum
from grace.student import autocast


def quick_tasks(recipe: Recipe) -> QuickTasks | None:
    """What the recipe asks for, read and checked; None if nothing.

    Raises:
        UserError: an unknown task, or data that is absent or damaged.
    """
    names = recipe.run.eval_tasks
    return QuickTasks(names, recipe.run.eval_data, recipe.run.eval_limit) if names else None


@torch.no_grad()
def task_scores(run: Run, quick: QuickTasks, processor: object) -> dict[str, float]:
    """`eval/TASK` of each; called by all processes together."""
    accelerator = run.accelerator
    model = run.parallel.for_evaluation()
    training = model.training
    model.eval()
    with autocast(accelerator.device, compute_dtype(run.recipe)):
        sums = quick.sums(model, processor, accelerator.process_index, accelerator.num_processes)
    model.train(training)
    joined = reduce_sum(accelerator, torch.tensor(sums, dtype=torch.float64, device=accelerator.device))
    return quick.named(joined.tolist())
