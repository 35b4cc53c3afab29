"""The benchmarks, one file each: what a dataset's rows ask, and how answers are counted."""

import importlib

from grace.errors import UserError
from grace.evaluation.question import Task

TASKS = ("mmbench", "seedbench", "scienceqa", "hallusionbench", "ai2d", "mmmu", "mmstar", "small_world")


def task_named(name: str) -> Task:
    """The task of that name.

    Raises:
        UserError: there is none.
    """
    if name not in TASKS:
        raise UserError(f"there is no task {name!r}: choose from {', '.join(TASKS)}")
    return importlib.import_module(f"{__name__}.{name}").TASK
