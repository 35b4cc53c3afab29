"""What the trials of a process have in common: encoded records, and what a teacher says about them.

A living teacher would say the same in every trial. Its hidden states are formed once, over the records in their order, so
that they do not depend on the trial that asks first; gates and loss follow from them as in any training.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grace.data.batch import Batch, collate
from grace.data.packing import collate_packed
from grace.data.records import Record, load_records, text_length
from grace.data.sampler import split_step, step_indices
from grace.data.template import Sample, encode
from grace.demo import scoring
from grace.distill.teacher import TeacherSignals, teacher_signals
from grace.models import qwen3vl
from grace.models.processor import load_processor
from grace.run import Run
from grace.step import supervised_tokens, teacher_outputs
from grace.step_inputs import StepBatches, StepInputs, consecutive

TEACHER_BATCH = 32
MAX_LENGTH = 1024


@dataclass(frozen=True)
class Remembered(TeacherSignals):
    """Signals that bring their teacher's head along."""

    head_VE: Tensor | None = None

    def loss_inputs(self, head_VE: Tensor | None, with_images: bool) -> dict[str, Any]:
        """As of a living teacher."""
        return super().loss_inputs(self.head_VE, with_images)


@dataclass(frozen=True)
class Said:
    """A teacher's final hidden states and the visual tokens of each image, record by record."""

    hidden_TE: list[Tensor]
    visual: list[tuple[Tensor, ...]]
    head_VE: Tensor


@functools.lru_cache(maxsize=2)  # a part of the data, and the one before it
def samples_of(data: Path, processor_of: str) -> list[Sample]:
    """The encoded records of a file."""
    processor = load_processor(processor_of)
    return [encode(record, processor, MAX_LENGTH) for record in load_records(data)]


@functools.lru_cache(maxsize=2)
def said_by(teacher: str, data: Path, processor_of: str) -> Said:
    """What a teacher says about the records of a file."""
    model, samples = qwen3vl.load_model(teacher, torch.float32), samples_of(data, processor_of)
    merge = load_processor(processor_of).image_processor.merge_size
    hidden: list[Tensor] = []
    visual: list[tuple[Tensor, ...]] = []
    for start in range(0, len(samples), TEACHER_BATCH):
        part = samples[start : start + TEACHER_BATCH]
        hidden_TE, _, images = teacher_outputs(model, collate_packed(part, merge))
        counts = [int(supervised_tokens(collate([sample], 0))) for sample in part]
        hidden += hidden_TE.clone().split(counts)
        pictures = iter(images)
        for sample in part:
            count = 0 if sample.image_grid_thw_N3 is None else len(sample.image_grid_thw_N3)
            visual.append(tuple(next(pictures).clone() for _ in range(count)))
    return Said(hidden, visual, qwen3vl.head_weight(model).detach().clone())


class RememberedBatches(StepBatches):
    """The inputs of `StepBatches`, from what is remembered of the records."""

    def __init__(self, run: Run, records: Sequence[Record], processor: Any, data: Path):
        super().__init__(run, records, processor)
        student = self.recipe.student.path
        self.samples = samples_of(data, student)
        self.said = None
        if self.recipe.distils:
            assert self.recipe.teacher.path is not None  # the recipe was validated
            self.said = said_by(self.recipe.teacher.path, data, student)
        self.objective = run.objective

    def inputs(self, step: int) -> StepInputs:
        """See `StepBatches.inputs`."""
        recipe = self.recipe
        indices = step_indices(step, recipe.optim.batch_size, self.mixture, recipe.run.seed)
        shares = split_step(indices, self.rank, self.world_size, recipe.run.micro_batch_size)
        mine = sorted((i for share in shares for i in share), key=lambda i: text_length(self.records[i]))
        groups = [[mine[i] for i in group] for group in consecutive([len(share) for share in shares])]
        student: list[Batch | None] = [self.batch([self.samples[i] for i in group]) for group in groups]
        cached: Any = None if self.said is None else [self.signals(self.said, group) for group in groups]
        return StepInputs(student, cached=cached)

    def signals(self, said: Said, group: Sequence[int]) -> Remembered:
        """The teacher's side of a micro-batch."""
        visual = [image for i in group for image in said.visual[i]]
        hidden_TE = torch.cat([said.hidden_TE[i] for i in group])
        objective = self.objective
        found = teacher_signals(hidden_TE, said.head_VE, visual, objective.vocabulary, objective.gate)
        return Remembered(**vars(found), head_VE=said.head_VE)


@functools.lru_cache(maxsize=1)
def scored_batches(data: Path, processor_of: str) -> list[Batch]:
    """The padded batches of a file to score on."""
    return list(scoring.batches(load_records(data), load_processor(processor_of)))
