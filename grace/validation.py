"""How the student does on the validation records, while it trains and at its end."""

import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from grace.agreement import agreed
from grace.config import Recipe
from grace.data.batch import Batch, collate
from grace.data.records import Record
from grace.data.template import encode
from grace.evaluation.exact_match import evaluate
from grace.evaluation.samples import sample_table
from grace.run import Run, compute_dtype
from grace.step import reduce_sum
from grace.student import autocast
from grace.tracking import Tracker


@torch.no_grad()
def validate(run: Run, tracker: Tracker, records: Sequence[Record], processor: Any) -> None:
    """Cross-entropy and exact match on the validation records, shared out over the ranks."""
    accelerator, settings = run.accelerator, run.recipe.run
    mine = records[accelerator.process_index :: accelerator.num_processes]
    model = run.parallel.for_evaluation()
    training = model.training
    model.eval()
    with agreed(accelerator), autocast(accelerator.device, compute_dtype(run.recipe)):
        scores = evaluate(model, validation_batches(mine, processor, run.recipe), accelerator.device)
        if accelerator.is_main_process:
            samples = records[: settings.eval_samples] if tracker.run is not None else []
            tracker.log_samples(run.step, sample_table(model, processor, samples))
    model.train(training)
    sums = [
        float(len(scores)),
        float(sum(s.exact for s in scores)),
        sum(s.ce_sum for s in scores),
        float(sum(s.tokens for s in scores)),
    ]
    turns, exact, ce, tokens = reduce_sum(
        accelerator, torch.tensor(sums, dtype=torch.float64, device=accelerator.device)
    ).tolist()
    rate = exact / max(turns, 1)
    run.validation = {"val/ce": ce / max(tokens, 1), "val/exact_match": rate, "val/turns": turns,
                      "val/exact_match_se": math.sqrt(rate * (1 - rate) / max(turns, 1))}  # fmt: skip
    with agreed(accelerator):
        tracker.log(run.step, run.validation)
    accelerator.print(
        "  ".join(f"{name} {value:.4g}" for name, value in run.validation.items()), file=sys.stderr
    )


def validation_batches(records: Sequence[Record], processor: Any, recipe: Recipe) -> Iterator[Batch]:
    """Padded batches of validation records, as many at a time as in training (at least 8)."""
    size = max(8, recipe.run.micro_batch_size)
    for start in range(0, len(records), size):
        part = records[start : start + size]
        samples = [encode(record, processor, recipe.data.max_length) for record in part]
        yield collate(samples, processor.tokenizer.pad_token_id)
