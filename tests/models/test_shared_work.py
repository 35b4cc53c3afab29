"""Equal work for every rank, and the whole copy of a sharded model."""

from pathlib import Path

import pytest
import torch
from transformers import Qwen3VLForConditionalGeneration

from grace.data.batch import Batch, collate
from grace.data.records import IMAGE_MARK, Record, Turn, load_records
from grace.data.template import encode
from grace.models import qwen3vl
from grace.models.processor import load_processor
from grace.models.shared_work import idle_vision, whole_copy


@pytest.fixture
def student(tiny_student_dir: Path) -> Qwen3VLForConditionalGeneration:
    return qwen3vl.load_model(str(tiny_student_dir))


def batch_of(student_dir: Path, world: Path, with_pictures: bool) -> Batch:
    processor = load_processor(str(student_dir))
    records = load_records(world / "validation.json")[:3]
    if not with_pictures:
        texts = [tuple(Turn(t.role, t.text.replace(IMAGE_MARK, "")) for t in r.turns) for r in records]
        records = [Record(r.id, (), turns) for r, turns in zip(records, texts, strict=True)]
    return collate([encode(record, processor, 1024) for record in records], processor.tokenizer.pad_token_id)


def visited(model: torch.nn.Module, batch: Batch) -> tuple[list[str], torch.Tensor]:
    """The modules in the order of a forward pass, and its final hidden states."""
    names: list[str] = []
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: names.append(name))
        for name, module in model.named_modules()
        if next(module.parameters(recurse=False), None) is not None
    ]
    final_BLD = qwen3vl.hidden_states(model, batch).final_BLD  # type: ignore[arg-type]
    for handle in handles:
        handle.remove()
    return names, final_BLD


def test_text_alone_runs_the_layers_that_pictures_run(student, tiny_student_dir, tiny_world_dir) -> None:
    text, pictures = (batch_of(tiny_student_dir, tiny_world_dir, flag) for flag in (False, True))
    plain, expected = visited(student, text)
    order, _ = visited(student, pictures)
    with idle_vision(student):
        idle, final_BLD = visited(student, text)
    assert idle == order and idle != plain
    assert torch.equal(final_BLD, expected)
    assert visited(student, text)[0] == plain  # outside, nothing of it is left


def test_idle_tower_gets_gradients_of_zero(student, tiny_student_dir, tiny_world_dir) -> None:
    text = batch_of(tiny_student_dir, tiny_world_dir, with_pictures=False)
    with idle_vision(student):
        qwen3vl.hidden_states(student, text).final_BLD.square().sum().backward()
    tower = {name: p.grad for name, p in student.named_parameters() if qwen3vl.is_vision(name)}
    assert len(tower) > 20
    assert all(grad is not None and not grad.any() for grad in tower.values())


@torch.no_grad()
def test_whole_copy_computes_what_the_quantized_model_does(student, tiny_student_dir, tiny_world_dir) -> None:
    batch = batch_of(tiny_student_dir, tiny_world_dir, with_pictures=True)
    quantized = qwen3vl.quantize_decoder(student, 4, 128)
    for layer in quantized.values():
        layer.theta.add_(0.2)
    weights = {name: p.detach().clone() for name, p in student.named_parameters()}
    expected = qwen3vl.hidden_states(student, batch).final_BLD
    copy = whole_copy(student, weights)
    assert not qwen3vl.quantized_linears(copy) and not any(p.requires_grad for p in copy.parameters())
    assert torch.equal(qwen3vl.hidden_states(copy, batch).final_BLD, expected)
    assert qwen3vl.head_weight(copy) is copy.get_input_embeddings().weight
    assert copy.generation_config is student.generation_config
