"""A few questions of a benchmark, asked of a model while it trains.

The same first questions each time, in every process the same; a process asks its share, and sums are joined outside. What
is asked and how answers are read is as in `grace eval`, but pictures are as large as the recipe has them, so a score here
is to be compared with others of the same run.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grace.errors import UserError
from grace.evaluation.batch_answers import STEP, greedy_answers
from grace.evaluation.harness import Asked, batched, checked_pictures, data_paths, prepare
from grace.evaluation.judge import judged
from grace.evaluation.tasks import task_named
from grace.runtime.decoder import Decoder

BATCH = 8  # questions at a time


class QuickTasks:
    """Benchmarks to be asked in training.

    Args:
        names: of the tasks.
        data: TASK=PATH items; a task without one comes from the Hub.
        limit: the number of questions of each.

    Raises:
        UserError: an unknown task, or data that is absent or damaged.
    """

    def __init__(self, names: Sequence[str], data: Sequence[str], limit: int):
        paths = data_paths(data, "run.eval_data")
        if "small_world" in names and "small_world" not in paths:
            raise UserError(
                "run.eval_tasks has small_world: set run.eval_data to small_world=FILE, such as its test.json"
            )
        self.asked = [prepare(task_named(name), paths, None, limit, Path()) for name in names]
        for one in self.asked:
            checked_pictures(one, one.questions, lambda name, done, total: None)

    def sums(self, model: Any, processor: Any, rank: int = 0, ranks: int = 1) -> list[float]:
        """Of each task the sum of the primary metric over this process's share, and what it is the sum of."""
        decoder = Decoder(model, BATCH, STEP)  # plain steps: graphs would keep weights that change
        return [number for one in self.asked for number in _sums(one, decoder, processor, rank, ranks)]

    def named(self, sums: Sequence[float]) -> dict[str, float]:
        """`eval/TASK` from sums over all processes."""
        pairs = zip(self.asked, sums[::2], sums[1::2], strict=True)
        return {f"eval/{one.task.name}": total / max(count, 1) for one, total, count in pairs}


def _sums(one: Asked, decoder: Decoder, processor: Any, rank: int, ranks: int) -> tuple[float, float]:
    families = list(dict.fromkeys(one.task.family(question) for question in one.questions))
    mine = set(families[rank::ranks])  # what counts together stays together
    samples = []
    for batch in batched([q for q in one.questions if one.task.family(q) in mine], BATCH):
        images = [[one.pictures.image(picture) for picture in question.pictures] for question in batch]
        prompts = [question.prompt for question in batch]
        outputs = greedy_answers(decoder, processor, prompts, images, one.task.decoding.max_new_tokens)
        samples += [judged(q, output, ()) for q, output in zip(batch, outputs, strict=True)]
    units = one.task.measure(samples)[one.task.primary]
    return sum(unit.value for unit in units), float(len(units))
