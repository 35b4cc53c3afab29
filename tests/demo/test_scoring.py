"""The numbers of the report, each against an independent way to get it."""

from pathlib import Path

import torch
from safetensors import safe_open

from grace.data.records import load_records
from grace.demo import scoring
from grace.evaluation.samples import greedy_answer
from grace.models.processor import load_processor


def tensor_bytes(path: Path) -> int:
    with safe_open(path, framework="pt") as file:
        tensors = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118 - not a dict
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def test_weight_bytes_of_the_packed_model_are_those_of_its_file(
    awq_dir: Path, tiny_student_dir: Path
) -> None:
    assert scoring.weight_bytes(tiny_student_dir, 4) == tensor_bytes(awq_dir / "model.safetensors")


def test_weight_bytes_of_a_plain_model(tiny_student_dir: Path) -> None:
    stored = tensor_bytes(tiny_student_dir / "model.safetensors")  # float32
    assert scoring.weight_bytes(tiny_student_dir, None) == stored // 2


def test_exact_match_is_that_of_greedy_decoding(tiny_student_dir: Path, tiny_world_dir: Path) -> None:
    data = tiny_world_dir / "test.json"
    result = scoring.score(tiny_student_dir, "dense", data, examples=2)
    model, processor = scoring.load(tiny_student_dir, "dense"), load_processor(tiny_student_dir)
    records = load_records(data)
    answers = []
    for record in records:
        from grace.data.records import open_image

        images = [open_image(path, record.id) for path in record.images]
        answers.append(greedy_answer(model, processor, record.turns[:-1], images, 8))
    truth = [record.turns[-1].text for record in records]
    hits = sum(a == b for a, b in zip(answers, truth, strict=True)) / len(truth)
    assert result["exact_match"] == hits
    assert result["turns"] == len(records) and set(result["by_type"]) == {
        r.id.rsplit("-", 1)[-1] for r in records
    }
    assert len(result["answers"]) == 2


def test_round_to_nearest_changes_decoder_weights_only(tiny_student_dir: Path) -> None:
    plain, rounded = (scoring.load(tiny_student_dir, kind) for kind in ("dense", "rtn4"))
    before, after = plain.state_dict(), rounded.state_dict()
    vision = [name for name in before if "visual" in name]
    assert vision and all(torch.equal(before[name], after[name]) for name in vision)
    x = torch.randn(3, 128)
    name = "model.language_model.layers.0.mlp.up_proj"
    assert not torch.equal(plain.get_submodule(name)(x), rounded.get_submodule(name)(x))


def test_picked_takes_question_types_in_turn(tiny_world_dir: Path) -> None:
    kinds = [r.id.rsplit("-", 1)[-1] for r in scoring.picked(load_records(tiny_world_dir / "test.json"), 5)]
    assert len(set(kinds)) == 5
