"""One rank's part of an optimizer step: its records as micro-batches, and the teacher's side where that is cached."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.data import Dataset

from grace.cache_settings import cached_record
from grace.data.batch import Batch, collate
from grace.data.packing import collate_packed, pack_evenly
from grace.data.records import Record, mixture_of, text_length
from grace.data.sampler import split_step, step_indices
from grace.data.template import Sample, encode
from grace.distill.cache_store import TeacherCache
from grace.distill.cached import CachedSignals, collate_cached
from grace.errors import UserError
from grace.run import Run
from grace.step_stats import step_work


@dataclass(frozen=True)
class StepInputs:
    """One rank's records of a step.

    Attributes:
        student: cut into its micro-batches.
        teacher: cut for the teacher, where the recipe says how.
        cached: the teacher's side of each of the student's micro-batches, where there is a cache.
        work: of the student's micro-batches (`grace.step_stats.step_work`).
    """

    student: list[Batch | None]
    teacher: list[Batch | None] | None = None
    cached: list[CachedSignals | None] | None = None
    work: Sequence[float] = ()

    def to(self, device: torch.device) -> "StepInputs":
        """The same on `device`."""

        def moved(parts: list[Any] | None) -> list[Any] | None:
            return None if parts is None else [part and part.to(device) for part in parts]

        return StepInputs(moved(self.student) or [], moved(self.teacher), moved(self.cached), self.work)


class StepBatches(Dataset):
    """Maps a step number to this rank's inputs: a pure function of (step, seed)."""

    def __init__(self, run: Run, records: Sequence[Record], processor: Any):
        self.recipe, self.records, self.processor = run.recipe, records, processor
        self.mixture = mixture_of(records)
        self.rank, self.world_size = run.accelerator.process_index, run.accelerator.num_processes
        self.has_teacher, self.cache = run.teacher is not None, run.cache

    def __getitem__(self, step: int) -> StepInputs | UserError:
        try:
            inputs = self.inputs(step)
            return replace(inputs, work=step_work(inputs.student))
        except UserError as error:  # raised in a worker process, it would arrive with the worker's trace
            return error

    def inputs(self, step: int) -> StepInputs:
        """The inputs themselves.

        Raises:
            UserError: a record or picture that cannot be used.
        """
        recipe = self.recipe
        indices = step_indices(step, recipe.optim.batch_size, self.mixture, recipe.run.seed)
        shares = split_step(indices, self.rank, self.world_size, recipe.run.micro_batch_size)
        # Alike lengths together: less padding, and the sums of the step do not depend on the cut.
        mine = sorted((self.records[i] for share in shares for i in share), key=text_length)
        samples = [encode(record, self.processor, recipe.data.max_length) for record in mine]
        groups = consecutive([len(share) for share in shares])
        if recipe.run.micro_batch_tokens is not None:
            lengths = [len(sample.input_ids_L) for sample in samples]
            groups = pack_evenly(lengths, recipe.run.micro_batch_tokens) or [[]]
            order = [i for group in groups for i in group]
            mine, samples = [mine[i] for i in order], [samples[i] for i in order]
            groups = consecutive([len(group) for group in groups])
        student = self.batches(samples, groups)
        if self.cache is not None:
            return StepInputs(student, cached=self.cached(self.cache, mine, groups))
        size = recipe.teacher.micro_batch_size
        if size is None or not self.has_teacher:
            return StepInputs(student)
        starts = range(0, len(samples), size)
        return StepInputs(
            student, self.batches(samples, [range(i, min(i + size, len(samples))) for i in starts])
        )

    def cached(
        self, cache: TeacherCache, records: Sequence[Record], groups: Sequence[Sequence[int]]
    ) -> list[CachedSignals | None]:
        """The teacher's side of each micro-batch."""
        known = [cached_record(cache, record) for record in records]
        sharpness = self.recipe.distill.gate_sharpness
        return [collate_cached([known[i] for i in group], sharpness) if group else None for group in groups]

    def batches(self, samples: Sequence[Sample], groups: Sequence[Sequence[int]]) -> list[Batch | None]:
        """Samples by groups of their indices, each packed or padded; none make None."""
        return [self.batch([samples[i] for i in group]) if group else None for group in groups]

    def batch(self, samples: Sequence[Sample]) -> Batch:
        """Packed into one row, or padded to the longest."""
        if self.recipe.data.packing:
            return collate_packed(samples, self.processor.image_processor.merge_size)
        return collate(samples, self.processor.tokenizer.pad_token_id)


def wrong_input(inputs: StepInputs | UserError) -> UserError | None:
    """What is wrong with a step's inputs, where something is."""
    return inputs if isinstance(inputs, UserError) else None


def consecutive(sizes: Sequence[int]) -> list[range]:
    """Indices of groups of these sizes, one after the other."""
    ends = list(itertools.accumulate(sizes))
    return [range(end - size, end) for size, end in zip(sizes, ends, strict=True)]
