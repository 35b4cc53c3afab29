"""The processor loads from either layout of a Qwen3-VL directory and keeps to its pixel budget."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from grace.errors import UserError
from grace.models.processor import Qwen3VLProcessor, load_processor

PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, size=(300, 500, 3), dtype=np.uint8))
QUESTION = [
    {
        "role": "user",
        "content": [{"type": "image", "image": PHOTO}, {"type": "text", "text": "What is this?"}],
    },
]


@pytest.fixture
def published_layout(tiny_student_dir: Path, tmp_path: Path) -> Path:
    """The files of a published Qwen3-VL model: preprocessor configs and a chat_template.json."""
    out = tmp_path / "published"
    shutil.copytree(tiny_student_dir, out)
    template = (out / "chat_template.jinja").read_text()
    for name in ("processor_config.json", "chat_template.jinja"):
        (out / name).unlink()
    (out / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    shared = {
        "size": {"longest_edge": 16777216, "shortest_edge": 65536},
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "Qwen3VLProcessor",
    }
    image = {**shared, "image_processor_type": "Qwen2VLImageProcessorFast"}
    video = {**shared, "video_processor_type": "Qwen3VLVideoProcessor"}
    (out / "preprocessor_config.json").write_text(json.dumps(image))
    (out / "video_preprocessor_config.json").write_text(json.dumps(video))
    return out


def tokens_of(processor: Qwen3VLProcessor) -> int:
    inputs = processor.apply_chat_template(QUESTION, tokenize=True, return_dict=True, return_tensors="pt")
    return int((inputs["input_ids"] == processor.image_token_id).sum())


def test_published_layout(published_layout: Path) -> None:
    processor = load_processor(published_layout)
    assert type(processor).__name__ == "Qwen3VLProcessor"
    assert processor.image_processor.size == {"longest_edge": 16777216, "shortest_edge": 65536}
    assert tokens_of(processor) == 9 * 16  # 300 x 500 becomes 288 x 512
    assert tokens_of(load_processor(published_layout, max_pixels=200704 // 4)) == 5 * 9  # 50,176: 160 x 288


def test_what_is_saved_loads_again(published_layout: Path, tmp_path: Path) -> None:
    processor = load_processor(published_layout, min_pixels=4096, max_pixels=50176)
    processor.save_pretrained(tmp_path / "saved")
    again = load_processor(tmp_path / "saved")
    assert again.image_processor.to_dict() == processor.image_processor.to_dict()
    assert again.chat_template == processor.chat_template
    encode = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    first, second = (p.apply_chat_template(QUESTION, **encode) for p in (processor, again))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_budget_is_an_area(tiny_student_dir: Path) -> None:
    assert tokens_of(load_processor(tiny_student_dir)) == 6  # at most 96 x 96: 64 x 96
    assert tokens_of(load_processor(tiny_student_dir, max_pixels=64 * 64)) == 2
    assert tokens_of(load_processor(tiny_student_dir, min_pixels=300_000)) >= 300_000 // 32**2
    processor = load_processor(tiny_student_dir, min_pixels=1024, max_pixels=50176)
    assert processor.image_processor.size == {"longest_edge": 50176, "shortest_edge": 1024}


@pytest.mark.parametrize("budget", [(9000, 4000), (0, 4096), (None, 500), (-1, None)])
def test_impossible_budgets_are_refused(
    tiny_student_dir: Path, budget: tuple[int | None, int | None]
) -> None:
    with pytest.raises(UserError, match="max_pixels must be at least"):
        load_processor(tiny_student_dir, *budget)


def test_batches_mix_pictures_and_plain_text(tiny_student_dir: Path) -> None:
    processor = load_processor(tiny_student_dir)
    plain = [{"role": "user", "content": [{"type": "text", "text": "What is 3 plus 4?"}]}]
    inputs = processor.apply_chat_template(
        [QUESTION, plain],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    )
    assert inputs["input_ids"].shape[0] == 2 and len(inputs["image_grid_thw"]) == 1
    assert inputs["mm_token_type_ids"].sum(-1).tolist() == [6, 0]


def foreign_directories(source: Path, out: Path) -> dict[str, Path]:
    """Directories that are almost a Qwen3-VL model, by what is wrong with them."""
    made = {}
    for name in (
        "empty",
        "no tokenizer",
        "no image processor",
        "broken json",
        "another model",
        "other tokenizer",
    ):
        made[name] = out / name.replace(" ", "_")
        if name == "empty":
            made[name].mkdir()
        else:
            shutil.copytree(source, made[name])
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (made["no tokenizer"] / file).unlink()
    (made["no image processor"] / "processor_config.json").unlink()
    (made["broken json"] / "processor_config.json").write_text("{")
    path = made["another model"] / "processor_config.json"
    path.write_text(path.read_text().replace('"Qwen2VLImageProcessor"', '"CLIPImageProcessor"'))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        path = made["other tokenizer"] / file
        path.write_text(path.read_text().replace("<|vision_start|>", "<|picture|>"))
    return made


def test_missing_and_foreign_directories_are_refused(tiny_student_dir: Path, tmp_path: Path) -> None:
    for what, path in foreign_directories(tiny_student_dir, tmp_path).items():
        with pytest.raises(UserError) as caught:
            load_processor(path)
        message = str(caught.value)
        assert str(path) in message and "\n" not in message, what
    with pytest.raises(UserError, match="no processor at"):
        load_processor(tmp_path / "absent")
