"""A rank's micro-batches of a step: every record once, however they are cut."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from grace.config import load_recipe
from grace.data.records import load_records
from grace.data.sampler import step_indices
from grace.models.processor import load_processor
from grace.step_inputs import StepBatches, StepInputs


@pytest.fixture(scope="module")
def cut(tiny_student_dir: Path, tiny_world_dir: Path):
    """The inputs of a step, by overrides of the recipe."""
    processor = load_processor(tiny_student_dir)
    records = load_records(tiny_world_dir / "qat_train.json")

    def make(
        *overrides: str, rank: int = 0, ranks: int = 1, teacher: Any = None, step: int = 0
    ) -> StepInputs:
        paths = [f"student.path={tiny_student_dir}", f"data.path={tiny_world_dir / 'qat_train.json'}"]
        recipe = load_recipe("small_world/grace_w4.yaml", [*paths, "optim.batch_size=13", *overrides])
        accelerator = SimpleNamespace(process_index=rank, num_processes=ranks)
        run: Any = SimpleNamespace(recipe=recipe, accelerator=accelerator, teacher=teacher, cache=None)
        return StepBatches(run, records, processor).inputs(step)

    make.ids = [records[i].id for i in step_indices(0, 13, len(records), 0)]  # type: ignore[attr-defined]
    return make


def ids(inputs: StepInputs) -> list[str]:
    return [name for batch in inputs.student if batch is not None for name in batch.record_ids]


@pytest.mark.parametrize("packing", ["true", "false"])
@pytest.mark.parametrize("ranks", [1, 2, 5, 14])
def test_every_record_is_on_one_rank_once(cut, packing: str, ranks: int) -> None:
    found = []
    for rank in range(ranks):
        inputs = cut(f"data.packing={packing}", "run.micro_batch_size=2", rank=rank, ranks=ranks)
        found += ids(inputs)
        assert len(inputs.student) == math.ceil(math.ceil(13 / ranks) / 2)  # the same number on every rank
    assert sorted(found) == sorted(cut.ids)


@pytest.mark.parametrize("budget", [1, 150, 400, 100_000])
@pytest.mark.parametrize("packing", ["true", "false"])
def test_rows_hold_what_the_budget_allows(cut, budget: int, packing: str) -> None:
    inputs = cut(f"run.micro_batch_tokens={budget}", f"data.packing={packing}")
    assert sorted(ids(inputs)) == sorted(cut.ids)
    for batch in inputs.student:
        tokens = (
            int((batch.mm_token_type_ids_BL >= 0).sum())
            if batch.lengths
            else int(batch.attention_mask_BL.sum())
        )
        assert tokens <= budget or len(batch.record_ids) == 1
        assert (batch.lengths is None) == (packing == "false")


def test_a_rank_without_records_has_an_empty_micro_batch(cut) -> None:
    inputs = cut("run.micro_batch_tokens=100", "optim.batch_size=1", rank=0, ranks=2)
    assert inputs.student == [None]


@pytest.mark.parametrize("budget", ["null", "300"])
def test_the_teachers_cut_keeps_the_order(cut, budget: str) -> None:
    inputs = cut("teacher.micro_batch_size=5", f"run.micro_batch_tokens={budget}", teacher=object())
    assert inputs.teacher is not None and len(inputs.teacher) == 3
    teacher_ids = [name for batch in inputs.teacher for name in batch.record_ids]
    assert teacher_ids == ids(inputs)


def test_the_same_step_is_the_same_inputs(cut) -> None:
    one, two = (cut("run.micro_batch_tokens=300", step=3) for _ in range(2))
    for a, b in zip(one.student, two.student, strict=True):
        assert torch.equal(a.input_ids_BL, b.input_ids_BL) and a.record_ids == b.record_ids
    assert ids(one) != ids(cut("run.micro_batch_tokens=300", step=2))
