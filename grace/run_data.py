"""The records of a run: read, checked, and without those that the recipe leaves out.

What is left out follows from the annotation file, the recipe and the audit's list alone, so every
process of a run and every start of it comes to the same records.
"""

import functools
import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object

from grace.config import Recipe
from grace.data.audit_list import length_print, list_path, read_list
from grace.data.faults import Policies
from grace.data.records import Record, Records, load_records, mixture_of, text_keys
from grace.data.sampler import taken_of, visits
from grace.errors import UserError
from grace.progress import progress
from grace.run import total_steps


@dataclass(frozen=True)
class RunData:
    """Records to train on and to validate on, and how many were left out by class, over all files."""

    records: Records
    validation: Sequence[Record]
    left_out: Mapping[str, int]

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 over the texts of all records, in order."""
        keys = b"".join((*text_keys(self.records), *text_keys(self.validation)))
        return hashlib.sha256(keys).hexdigest()

    def notes(self) -> list[str]:
        """What was left out, what an epoch takes of several files, how large ones are held; a line each, for people."""
        both = [one for one in (self.records, self.validation) if isinstance(one, Records)]
        files = [source.annotations for one in both for source in one.sources]
        lines = [file.note for file in files if file.note]
        if self.left_out:
            parts = ", ".join(f"{kind} {count}" for kind, count in sorted(self.left_out.items()))
            lines.append(f"left out by data.skip: {sum(self.left_out.values())} records ({parts})")
        mixture = mixture_of(self.records)
        if mixture.epoch != len(self.records):
            shares = zip(mixture.takes, mixture.sizes, files, strict=False)
            takes = ", ".join(f"{take} of {size} of {file.path.name}" for take, size, file in shares)
            lines.append(f"an epoch takes {mixture.epoch} records: {takes}")
        return lines


def load_run_data(recipe: Recipe, processor: Any = None, validation: bool = True) -> RunData:
    """Reads the annotation files of a recipe.

    Args:
        processor: the run's, to check that an audit counted with the same; None leaves that unchecked.
        validation: reads the validation records too.

    Raises:
        UserError: data the run cannot use, or an audit that `data.skip` needs is absent or stale.
    """
    data = recipe.data
    policies = Policies(data.skip, data.accept)
    audit = read_list(list_path(data.files, data.audit)) if policies.need_audit() else None
    lengths = length_print(processor, data.max_length) if audit and processor is not None else None
    left_out: Counter[str] = Counter()

    def load(path: str) -> Records:
        listed = audit.left_out(path, data.image_root, lengths, policies) if audit else {}
        left_out.update(listed.values())
        with progress("reading", "MB", 1e6) as advance:
            on = functools.partial(advance, Path(path).name)
            return load_records(path, data.image_root, policies, listed, left_out, on)

    parts = [load(part.path) for part in data.parts]
    takes = [taken_of(len(one), part.weight, part.cap) for one, part in zip(parts, data.parts, strict=True)]
    validated = load(data.validation_path) if validation and data.validation_path else []
    return RunData(Records.joined(parts, takes), validated, left_out)


def taken_in_run(recipe: Recipe, records: Sequence[Record]) -> Sequence[Record]:
    """The records that a teacher is asked about: all, or of a mixture those that come up in the recipe's steps."""
    mixture = mixture_of(records)
    if not isinstance(records, Records) or all(
        t >= n for t, n in zip(mixture.takes, mixture.sizes, strict=True)
    ):
        return records
    steps = total_steps(recipe, mixture.epoch)
    times = visits(steps, recipe.optim.batch_size, mixture, recipe.run.seed)
    return records.chosen(np.flatnonzero(times))


def require_same_on_all_ranks(data: RunData, accelerator: Accelerator) -> None:
    """Checks that every process read the same: two that differ would wait for each other for ever.

    Raises:
        UserError: on every process, if two of them differ.
    """
    if accelerator.num_processes == 1:
        return
    if len(set(gather_object([data.digest]))) > 1:
        raise UserError(
            "the processes read different records: give all of them the same data and audit files"
        )
