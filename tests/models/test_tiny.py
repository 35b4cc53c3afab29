"""The tiny models are complete, real Qwen3-VL directories of the stated size."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoTokenizer, Qwen3VLForConditionalGeneration

from grace.data.batch import collate
from grace.data.records import load_records
from grace.data.template import encode
from grace.errors import UserError
from grace.files import sha256_of
from grace.models.processor import load_processor
from grace.models.tiny import SPECIAL_TOKENS, VOCABULARY, build_tokenizer, write_tiny_model


def load(path: Path) -> Qwen3VLForConditionalGeneration:
    return AutoModelForImageTextToText.from_pretrained(path).eval()


def logits_and_loss(path: Path, world: Path) -> tuple[torch.Tensor, torch.Tensor]:
    processor = load_processor(path)
    samples = [encode(record, processor, 512) for record in load_records(world / "qat_train.json")[:4]]
    batch = collate(samples, processor.tokenizer.pad_token_id)
    with torch.no_grad():
        outputs = load(path)(
            input_ids=batch.input_ids_BL,
            attention_mask=batch.attention_mask_BL,
            mm_token_type_ids=batch.mm_token_type_ids_BL,
            pixel_values=batch.pixel_values_PD,
            image_grid_thw=batch.image_grid_thw_N3,
            labels=batch.labels_BL,
        )
    return outputs.logits, outputs.loss


def test_both_models_fit_ten_megabytes_in_bf16(tiny_teacher_dir: Path, tiny_student_dir: Path) -> None:
    parameters = [
        sum(p.numel() for p in load(path).parameters()) for path in (tiny_teacher_dir, tiny_student_dir)
    ]
    assert parameters[0] > 1.5 * parameters[1]
    assert 2 * sum(parameters) <= 10_000_000


def test_student_decoder_is_made_of_whole_groups_of_128(tiny_student_dir: Path) -> None:
    for name, module in load(tiny_student_dir).model.language_model.layers.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert module.in_features % 128 == 0 and module.out_features % 128 == 0, name


@pytest.mark.parametrize("fixture", ["tiny_teacher_dir", "tiny_student_dir"])
def test_directory_is_complete_and_consistent(fixture: str, request: pytest.FixtureRequest) -> None:
    path: Path = request.getfixturevalue(fixture)
    names = {file.name for file in path.iterdir()}
    assert names == {
        *("config.json", "generation_config.json", "model.safetensors", "processor_config.json"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    }
    model, tokenizer = load(path), AutoTokenizer.from_pretrained(path)
    config, text = model.config, model.config.text_config
    ids = tokenizer.convert_tokens_to_ids
    assert (
        config.tie_word_embeddings and model.lm_head.weight is model.model.language_model.embed_tokens.weight
    )
    assert "lm_head.weight" not in load_file(path / "model.safetensors")
    assert sum(text.rope_parameters["mrope_section"]) == text.head_dim // 2
    assert config.vision_config.deepstack_visual_indexes
    assert config.image_token_id == ids("<|image_pad|>") and config.video_token_id == ids("<|video_pad|>")
    assert config.vision_start_token_id == ids("<|vision_start|>")
    assert tokenizer.pad_token_id == text.pad_token_id == ids("<|endoftext|>") != tokenizer.eos_token_id
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.eos_token_id in model.generation_config.eos_token_id
    assert len(tokenizer) <= text.vocab_size == VOCABULARY


def test_seed_decides_the_weights_and_leaves_the_global_generator_alone(tmp_path: Path) -> None:
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        write_tiny_model(tmp_path / name, "student", seed=seed)
    assert torch.equal(torch.rand(1), expected)
    files = [{file.name: sha256_of(file) for file in (tmp_path / name).iterdir()} for name in "abc"]
    assert files[0] == files[1]
    assert [name for name in files[0] if files[0][name] != files[2][name]] == ["model.safetensors"]


@pytest.mark.parametrize("fixture", ["tiny_teacher_dir", "tiny_student_dir"])
def test_random_models_guess_uniformly(
    fixture: str, tiny_world_dir: Path, request: pytest.FixtureRequest
) -> None:
    logits, loss = logits_and_loss(request.getfixturevalue(fixture), tiny_world_dir)
    assert torch.isfinite(logits).all()
    assert loss.item() == pytest.approx(torch.tensor(VOCABULARY).log().item(), abs=1.5)


def test_pictures_reach_the_logits(tiny_student_dir: Path, tiny_world_dir: Path) -> None:
    processor, model = load_processor(tiny_student_dir), load(tiny_student_dir)
    record = next(record for record in load_records(tiny_world_dir / "test.json"))
    sample = encode(record, processor, 512)
    inputs = {
        "input_ids": sample.input_ids_L[None],
        "mm_token_type_ids": sample.mm_token_type_ids_L[None],
        "image_grid_thw": sample.image_grid_thw_N3,
    }
    with torch.no_grad():
        seen = model(**inputs, pixel_values=sample.pixel_values_PD).logits
        blank = model(**inputs, pixel_values=torch.zeros_like(sample.pixel_values_PD)).logits
    assert (seen - blank).abs().max() > 1e-3


def test_tokenizer_covers_every_byte_and_keeps_digits_apart() -> None:
    tokenizer = build_tokenizer()
    text = "".join(chr(code) for code in range(0x20, 0x250)) + "漢字 🙂\u200d\x00\t\r\n 12345"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    digits = tokenizer("0123456789", add_special_tokens=False)["input_ids"]
    assert len(digits) == len(set(digits)) == 10
    vocabulary = tokenizer.get_vocab()
    assert set(SPECIAL_TOKENS) <= set(vocabulary) and sorted(vocabulary.values()) == list(
        range(len(vocabulary))
    )
    assert 384 <= len(vocabulary) <= VOCABULARY


def test_special_tokens_are_known_under_the_older_key(tiny_student_dir: Path) -> None:
    config = json.loads((tiny_student_dir / "tokenizer_config.json").read_text())
    assert set(config["additional_special_tokens"]) == set(SPECIAL_TOKENS)
    assert set(AutoTokenizer.from_pretrained(tiny_student_dir).all_special_tokens) == set(SPECIAL_TOKENS)


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown tiny model 'judge'"):
        write_tiny_model(tmp_path / "a", "judge")  # type: ignore[arg-type]
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "kept").write_text("x")
    with pytest.raises(UserError, match="not empty"):
        write_tiny_model(tmp_path / "b", "student")
    assert [file.name for file in (tmp_path / "b").iterdir()] == ["kept"]
