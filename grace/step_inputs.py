"""One rank's part of an optimizer step: its records as micro-batches, and the teacher's side where that is cached."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset

from grace.cache_settings import cached_record
from grace.data.batch import Batch, collate
from grace.data.records import Record, text_length
from grace.data.sampler import split_step, step_indices
from grace.data.template import Sample, encode
from grace.distill.cache_store import TeacherCache
from grace.distill.cached import CachedSignals, collate_cached
from grace.errors import UserError
from grace.run import Run


@dataclass(frozen=True)
class StepInputs:
    """One rank's records of a step.

    Attributes:
        student: cut into its micro-batches.
        teacher: cut for the teacher, where the recipe says how.
        cached: the teacher's side of each of the student's micro-batches, where there is a cache.
    """

    student: list[Batch | None]
    teacher: list[Batch | None] | None = None
    cached: list[CachedSignals | None] | None = None

    def to(self, device: torch.device) -> "StepInputs":
        """The same on `device`."""

        def moved(parts: list[Any] | None) -> list[Any] | None:
            return None if parts is None else [part and part.to(device) for part in parts]

        return StepInputs(moved(self.student) or [], moved(self.teacher), moved(self.cached))


class StepBatches(Dataset):
    """Maps a step number to this rank's inputs: a pure function of (step, seed)."""

    def __init__(self, run: Run, records: Sequence[Record], processor: Any):
        self.recipe, self.records, self.processor = run.recipe, records, processor
        self.rank, self.world_size = run.accelerator.process_index, run.accelerator.num_processes
        self.has_teacher, self.cache = run.teacher is not None, run.cache

    def __getitem__(self, step: int) -> StepInputs | UserError:
        try:
            return self.inputs(step)
        except UserError as error:  # raised in a worker process, it would arrive with the worker's trace
            return error

    def inputs(self, step: int) -> StepInputs:
        """The inputs themselves.

        Raises:
            UserError: a record or picture that cannot be used.
        """
        recipe = self.recipe
        indices = step_indices(step, recipe.optim.batch_size, len(self.records), recipe.run.seed)
        shares = split_step(indices, self.rank, self.world_size, recipe.run.micro_batch_size)
        # Alike lengths together: less padding, and the sums of the step do not depend on the cut.
        mine = sorted((self.records[i] for share in shares for i in share), key=text_length)
        samples = [encode(record, self.processor, recipe.data.max_length) for record in mine]
        sizes = [len(share) for share in shares]
        student = self.batches(samples, sizes)
        if self.cache is not None:
            return StepInputs(student, cached=self.cached(self.cache, mine, sizes))
        size = recipe.teacher.micro_batch_size
        if size is None or not self.has_teacher:
            return StepInputs(student)
        return StepInputs(student, self.batches(samples, [size] * math.ceil(len(samples) / size)))

    def cached(
        self, cache: TeacherCache, records: Sequence[Record], sizes: Sequence[int]
    ) -> list[CachedSignals | None]:
        """The teacher's side of each micro-batch."""
        rest = iter([cached_record(cache, record) for record in records])
        parts = [list(itertools.islice(rest, size)) for size in sizes]
        return [collate_cached(part) if part else None for part in parts]

    def batches(self, samples: Sequence[Sample], sizes: Sequence[int]) -> list[Batch | None]:
        """Samples in their order, collated by these sizes; none make None."""
        rest, pad = iter(samples), self.processor.tokenizer.pad_token_id
        parts = [list(itertools.islice(rest, size)) for size in sizes]
        return [collate(part, pad) if part else None for part in parts]
