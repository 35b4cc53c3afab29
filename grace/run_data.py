"""The records of a run: read, checked, and without those that the recipe leaves out.

What is left out follows from the annotation file, the recipe and the audit's list alone, so every
process of a run and every start of it comes to the same records.
"""

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object

from grace.config import Recipe
from grace.data.audit_list import length_print, list_path, read_list
from grace.data.faults import Policies
from grace.data.records import Record, load_records
from grace.errors import UserError


@dataclass(frozen=True)
class RunData:
    """Records to train on and to validate on, and how many were left out by class, over both files."""

    records: list[Record]
    validation: list[Record]
    left_out: Mapping[str, int]

    def digest(self) -> str:
        """SHA-256 over the ids of all records, in order."""
        names = "\n".join(record.id for record in (*self.records, *self.validation))
        return hashlib.sha256(names.encode()).hexdigest()

    def notes(self) -> list[str]:
        """What was left out, in a line for people; nothing, if nothing was."""
        if not self.left_out:
            return []
        parts = ", ".join(f"{kind} {count}" for kind, count in sorted(self.left_out.items()))
        return [f"left out by data.skip: {sum(self.left_out.values())} records ({parts})"]


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
    audit = read_list(list_path(data.path, data.audit)) if policies.need_audit() else None
    lengths = length_print(processor, data.max_length) if audit and processor is not None else None
    left_out: Counter[str] = Counter()

    def load(path: str | None) -> list[Record]:
        if path is None:
            return []
        listed = audit.left_out(path, data.image_root, lengths, policies) if audit else {}
        left_out.update(listed.values())
        return load_records(path, data.image_root, policies, listed, left_out)

    return RunData(load(data.path), load(data.validation_path if validation else None), left_out)


def require_same_on_all_ranks(data: RunData, accelerator: Accelerator) -> None:
    """Checks that every process read the same: two that differ would wait for each other for ever.

    Raises:
        UserError: on every process, if two of them differ.
    """
    if accelerator.num_processes == 1:
        return
    if len(set(gather_object([data.digest()]))) > 1:
        raise UserError(
            "the processes read different records: give all of them the same data and audit files"
        )
