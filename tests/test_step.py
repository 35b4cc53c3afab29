"""One optimizer step, cut in every way: its losses and gradients must not notice.

Run as a script under `torch.distributed.run`, this file is one rank of the same steps.
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file, save_file
from torch import Tensor
from two_ranks import launch_two

from grace.config import load_recipe
from grace.data.batch import Batch, collate
from grace.data.packing import collate_packed
from grace.data.records import IMAGE_MARK, Record, Turn, load_records
from grace.data.sampler import split_step
from grace.data.template import encode
from grace.distill.gdkd import confidence_gate, gated_dkd
from grace.distill.rcka import rcka_loss
from grace.distill.teacher import supervised
from grace.models import qwen3vl
from grace.models.placement import spread, weight_bytes
from grace.models.processor import load_processor
from grace.parallel import leave, make_accelerator
from grace.run import Run, set_up
from grace.step import NonFiniteLoss, forward_backward, run_teacher
from grace.student import Weights

WEIGHTS = Weights(beta=0.7, omega=3.0)

# Name: (records as "i"mage or "t"ext, micro-batch size of the two-rank run).
STEPS = {
    "images and text": ("itiiitti", 2),
    "last micro-batch without images": ("iittiitt", 2),  # on both ranks: the mergers look unused there
    "text only": ("tttt", 1),
    "one rank runs out": ("itiit", 1),  # ranks of 2 and 3 records
    "one rank has nothing": ("i", 4),
}


def records_of(kinds: str, world: Path) -> list[Record]:
    """The first records of the small world, those of kind "t" without their picture."""
    records = load_records(world / "qat_train.json")[: len(kinds)]
    return [
        record
        if kind == "i"
        else Record(
            record.id, (), tuple(Turn(t.role, t.text.replace(IMAGE_MARK, "").strip()) for t in record.turns)
        )
        for record, kind in zip(records, kinds, strict=True)
    ]


def prepare(models: Path, world: Path, out: Path, *extra: str) -> tuple[Run, object]:
    """The small-world GRACE run on tiny models, scales moved off what initialisation chose."""
    recipe = load_recipe(
        "small_world/grace_w4.yaml",
        [
            f"student.path={models / 'student'}",
            f"teacher.path={models / 'teacher'}",
            f"data.path={world / 'qat_train.json'}",
            f"run.output_dir={out}",
            *extra,
        ],
    )
    processor = load_processor(recipe.student.path)
    run = set_up(recipe, make_accelerator(), processor.tokenizer, 1)
    torch.manual_seed(3)
    with torch.no_grad():
        for layer in qwen3vl.quantized_linears(run.model).values():
            layer.theta.add_(0.2 * torch.randn_like(layer.theta))
    return run, processor


def batches_of(records: Sequence[Record], processor, micro: int, rank: int, ranks: int) -> list[Batch | None]:
    pad = processor.tokenizer.pad_token_id
    return [
        collate([encode(records[i], processor, 1024) for i in share], pad) if share else None
        for share in split_step(range(len(records)), rank, ranks, micro)
    ]


def step(
    run: Run,
    batches: Sequence[Batch | None],
    weights: Weights = WEIGHTS,
    teacher_batches: Sequence[Batch | None] | None = None,
) -> dict[str, Tensor]:
    """Losses, counts and all gradients of one step, as one dictionary of tensors."""
    run.parallel.optimizer.zero_grad(set_to_none=True)
    assert run.teacher is not None
    signals = run_teacher(run.teacher, batches, run.objective.vocabulary, teacher_batches)
    head_VE = qwen3vl.head_weight(run.teacher)
    result = forward_backward(run.parallel, batches, signals, weights, "gdkd", head_VE)
    losses = ("total", "ce", "kd", "rcka", "degenerate_images")
    values = {f"loss.{name}": torch.tensor(getattr(result, name), dtype=torch.float64) for name in losses}
    values |= {
        f"count.{name}": torch.tensor(v, dtype=torch.float64)
        for name, v in dataclasses.asdict(result.counts).items()
    }
    for name, parameter in run.model.named_parameters():
        if parameter.requires_grad:
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            values[f"grad.{name}"] = gradient.clone()
    return values


def assert_same(one: dict[str, Tensor], two: dict[str, Tensor], rel: float = 1e-5) -> None:
    assert one.keys() == two.keys()
    for name, value in one.items():
        distance, size = (value - two[name]).norm().item(), value.norm().item()
        assert distance <= rel * size + 1e-9, f"{name}: {distance / max(size, 1e-30):.2e}"


# ---------------------------------------------------------------- one process


@pytest.fixture(scope="module")
def models(tiny_student_dir: Path, tiny_teacher_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    (folder / "student").symlink_to(tiny_student_dir)
    (folder / "teacher").symlink_to(tiny_teacher_dir)
    return folder


@pytest.fixture(scope="module")
def single(
    models: Path, tiny_world_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Run, object]:
    return prepare(models, tiny_world_dir, tmp_path_factory.mktemp("single"))


@pytest.fixture(scope="module")
def whole(single, tiny_world_dir: Path) -> dict[str, dict[str, Tensor]]:
    """Every step in one micro-batch."""
    run, processor = single
    return {
        name: step(run, batches_of(records_of(kinds, tiny_world_dir), processor, 8, 0, 1))
        for name, (kinds, _) in STEPS.items()
    }


@pytest.mark.parametrize("micro", [1, 2, 3, 4])
@pytest.mark.parametrize("name", STEPS)
def test_micro_batch_size_does_not_matter(single, whole, tiny_world_dir, name: str, micro: int) -> None:
    run, processor = single
    batches = batches_of(records_of(STEPS[name][0], tiny_world_dir), processor, micro, 0, 1)
    assert_same(whole[name], step(run, batches))


@pytest.mark.parametrize("micro", [1, 3, 8])
@pytest.mark.parametrize("name", STEPS)
def test_packed_or_padded_does_not_matter(single, whole, tiny_world_dir, name: str, micro: int) -> None:
    run, processor = single
    records = records_of(STEPS[name][0], tiny_world_dir)
    merge_size = processor.image_processor.merge_size
    batches = [
        collate_packed([encode(records[i], processor, 1024) for i in share], merge_size) if share else None
        for share in split_step(range(len(records)), 0, 1, micro)
    ]
    assert_same(whole[name], step(run, batches))


@pytest.mark.parametrize("teacher_micro", [1, 3, 8])
@pytest.mark.parametrize("name", STEPS)
def test_teacher_may_be_cut_otherwise(single, whole, tiny_world_dir, name: str, teacher_micro: int) -> None:
    run, processor = single
    records = records_of(STEPS[name][0], tiny_world_dir)
    student, teacher = (batches_of(records, processor, micro, 0, 1) for micro in (2, teacher_micro))
    assert_same(whole[name], step(run, [*student, None], teacher_batches=teacher))


@pytest.mark.parametrize("teacher_micro", [None, 3])
def test_teacher_may_lie_elsewhere(single, whole, tiny_world_dir, tmp_path: Path, teacher_micro) -> None:
    """In two places (the second a disk, from which weights come at each use): the same step to the bit."""
    run, processor = single
    teacher, path = run.teacher, run.recipe.teacher.path
    places = spread(teacher, weight_bytes(teacher, 4, None), ["cpu", "disk"]) | {qwen3vl.HEAD: "cpu"}
    over = qwen3vl.load_model(path, torch.float32, device_map=places, offload_folder=tmp_path)
    qwen3vl.put_head_on(over, run.accelerator.device)
    records = records_of(STEPS["images and text"][0], tiny_world_dir)
    batches = batches_of(records, processor, 2, 0, 1)
    cut = None if teacher_micro is None else batches_of(records, processor, teacher_micro, 0, 1)
    near, far = (
        step(dataclasses.replace(run, teacher=t), batches, teacher_batches=cut) for t in (teacher, over)
    )
    assert near.keys() == far.keys() and all(torch.equal(near[name], far[name]) for name in near)
    assert_same(whole["images and text"], far)


def test_every_part_of_the_loss_is_there(whole) -> None:
    values = whole["images and text"]
    assert all(values[f"loss.{name}"] > 0 for name in ("ce", "kd", "rcka"))
    assert values["count.images"] == 5 and values["loss.degenerate_images"] == 0
    total = values["loss.ce"] + WEIGHTS.beta * values["loss.kd"] + WEIGHTS.omega * values["loss.rcka"]
    assert values["loss.total"] == pytest.approx(total.item(), rel=1e-12)
    silent = [name for name, value in values.items() if name.startswith("grad.") and not value.any()]
    assert silent == []
    assert sum(name.endswith(".theta") for name in values) == 28
    # Mergers learn nothing from text, and there is nothing relational in it.
    assert whole["text only"]["loss.rcka"] == 0
    assert not any(value.any() for name, value in whole["text only"].items() if "merger" in name)


@torch.no_grad()
def test_losses_are_those_of_the_dense_equations(single, whole, tiny_world_dir: Path) -> None:
    run, processor = single
    (batch,) = batches_of(records_of(STEPS["images and text"][0], tiny_world_dir), processor, 8, 0, 1)
    assert batch is not None and run.teacher is not None
    sides = []
    for model in (run.model, run.teacher):
        states = qwen3vl.hidden_states(model, batch)
        hidden_TD, targets_T = supervised(states.final_BLD, batch.labels_BL)
        logits_TV = hidden_TD.double() @ qwen3vl.head_weight(model).double().T
        sides.append((logits_TV, qwen3vl.visual_tokens(model, states.last_layer_input_BLD, batch)))
    (student_TV, student_visual), (teacher_TV, teacher_visual) = sides
    values = whole["images and text"]
    ce = torch.nn.functional.cross_entropy(student_TV, targets_T)
    assert values["loss.ce"].item() == pytest.approx(ce.item(), rel=1e-5)
    kd = gated_dkd(student_TV, teacher_TV, targets_T)
    assert values["loss.kd"].item() == pytest.approx(kd.item(), rel=1e-5)
    rcka = rcka_loss([v.double() for v in student_visual], [v.double() for v in teacher_visual])
    assert values["loss.rcka"].item() == pytest.approx(rcka.item(), rel=1e-5)
    assert values["count.tokens"] == len(targets_T)
    assert values["count.gate_sum"].item() == pytest.approx(
        confidence_gate(teacher_TV).sum().item(), rel=1e-5
    )


def test_relational_loss_can_be_off(single, whole, tiny_world_dir: Path) -> None:
    run, processor = single
    batches = batches_of(records_of("ii", tiny_world_dir), processor, 1, 0, 1)
    values = step(run, batches, Weights(beta=0.7, omega=0.0))
    assert values["loss.rcka"] == 0
    assert values["loss.total"] == pytest.approx((values["loss.ce"] + 0.7 * values["loss.kd"]).item())


def broken(batch: Batch) -> Batch:
    assert batch.pixel_values_PD is not None
    return dataclasses.replace(batch, pixel_values_PD=batch.pixel_values_PD * torch.nan)


def test_non_finite_loss_names_the_records_of_its_micro_batch(single, tiny_world_dir: Path) -> None:
    run, processor = single
    records = records_of("itii", tiny_world_dir)
    batches = batches_of(records, processor, 2, 0, 1)
    assert batches[1] is not None
    with pytest.raises(NonFiniteLoss) as told:
        step(run, [batches[0], broken(batches[1])])
    assert [record.id in str(told.value) for record in records] == [False, False, True, True]


# ---------------------------------------------------------------- two ranks


@pytest.fixture(scope="module")
def two_ranks(models: Path, tiny_world_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `<step>-<rank>.safetensors` of every step, and what each rank said at the end."""
    out = tmp_path_factory.mktemp("ranks")
    launch_two([__file__, str(models), str(tiny_world_dir), str(out)], out / "log")
    return out


@pytest.mark.slow
@pytest.mark.parametrize("name", STEPS)
def test_two_ranks_make_the_same_step(whole, two_ranks: Path, name: str) -> None:
    for rank in (0, 1):
        assert_same(whole[name], load_file(two_ranks / f"{name}-{rank}.safetensors"))


@pytest.mark.slow
def test_non_finite_loss_on_one_rank_stops_both(two_ranks: Path, tiny_world_dir: Path) -> None:
    told = [(two_ranks / f"stopped-{rank}.txt").read_text() for rank in (0, 1)]
    assert all("not finite" in text for text in told)
    first, second = records_of("ii", tiny_world_dir)
    assert second.id in told[1] and first.id not in told[1]


def one_rank(models: Path, world: Path, out: Path) -> None:
    """What each of the two processes does."""
    run, processor = prepare(models, world, out)
    accelerator = run.accelerator
    assert accelerator.num_processes == 2
    assert accelerator.distributed_type == DistributedType.MULTI_CPU
    rank = accelerator.process_index
    for name, (kinds, micro) in STEPS.items():
        batches = batches_of(records_of(kinds, world), processor, micro, rank, 2)
        save_file(step(run, batches), out / f"{name}-{rank}.safetensors")
    (batch,) = batches_of(records_of("ii", world), processor, 1, rank, 2)
    assert batch is not None
    try:
        step(run, [broken(batch) if rank == 1 else batch])
    except NonFiniteLoss as error:
        (out / f"stopped-{rank}.txt").write_text(str(error))
    accelerator.wait_for_everyone()
    leave(0)


if __name__ == "__main__":
    one_rank(*(Path(argument) for argument in sys.argv[1:]))
