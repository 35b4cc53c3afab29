"""`grace generate`: answers from every kind of directory, repeatable, and one line for what cannot work."""

import argparse
import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from grace.errors import UserError
from grace.kernels import compiled
from grace.runtime import generate
from grace.runtime.engine import question
from grace.runtime.generate import Engine, checkpoint_kind, load, run_generate
from grace.runtime.sampling import Sampling

PROMPT = "Which digit is in the top left cell?"


@pytest.fixture(scope="module")
def pictures(tiny_world_dir: Path) -> list[Path]:
    return sorted(path for path in tiny_world_dir.rglob("*.png"))[:2]


@pytest.fixture(scope="module")
def engine(awq_dir: Path) -> Engine:
    return load(awq_dir)


def arguments(directory: Path, images: list[Path], **changes) -> argparse.Namespace:
    values = {
        "directory": directory, "image": [str(image) for image in images], "prompt": PROMPT,
        "system": None, "chat": False, "batch": None, "out": None, "rows": None, "preset": None,
        "max_new_tokens": 4, "temperature": None, "top_p": None, "top_k": None, "repetition_penalty": None,
        "seed": None, "stop": [], "kernel": "auto", "head": "bf16", "context": None, "device": None, "json": False,
    }  # fmt: skip
    return argparse.Namespace(**(values | changes))


@pytest.mark.parametrize("kind", ["awq", "qat", "plain"])
def test_every_kind_of_directory_answers(kind, awq_dir, qat_run, tiny_student_dir, pictures, capsys):
    directory = {"awq": awq_dir, "qat": qat_run / "model", "plain": tiny_student_dir}[kind]
    assert checkpoint_kind(directory) == kind
    assert run_generate(arguments(directory, pictures[:1], json=True)) == 0
    out, err = capsys.readouterr()
    answer = json.loads(out)
    assert answer["kind"] == kind and 1 <= len(answer["tokens"]) <= 4 and answer["prompt_tokens"] > 9
    assert answer["first_token_s"] > 0 and isinstance(answer["text"], str)
    fused = "compiled int4" if compiled.obstacle() is None else "ATen int4"
    assert (f"28 packed layers: {fused}" if kind == "awq" else "dense layers only") in err


def test_plain_text_on_stdout_and_the_rest_on_stderr(awq_dir, pictures, capsys):
    assert run_generate(arguments(awq_dir, pictures[:1], kernel="dequant")) == 0
    out, err = capsys.readouterr()
    assert out.count("\n") >= 1 and "packed" not in out
    assert "28 packed layers: dequant" in err and "tokens, first after" in err


def test_the_same_call_gives_the_same_answer_whatever_came_between(engine: Engine, pictures):
    first = engine.generate(pictures[:1], PROMPT, 6).tokens
    engine.generate(pictures, "Compare <image> with <image>", 3)
    engine.generate([], "Say yes", 3)
    assert engine.generate(pictures[:1], PROMPT, 6).tokens == first


def test_an_answer_broken_off_can_be_read_to_its_end(engine: Engine, pictures):
    turns, sampling = [question(PROMPT, 1)], Sampling(max_new_tokens=8, temperature=1.5, seed=5)
    whole = engine.answer(turns, pictures[:1], sampling).result()
    for pieces in (1, 3):
        answer = engine.answer(turns, pictures[:1], sampling)
        for _ in zip(range(pieces), answer, strict=False):
            pass
        rest = answer.result()
        assert (rest.tokens, rest.text) == (whole.tokens, whole.text) == (answer.result().tokens, rest.text)


def test_a_device_that_is_not_there(awq_dir: Path):
    for name in ("cuda:77", "foo"):
        with pytest.raises(UserError, match=f"--device {name} cannot be used"):
            load(awq_dir, device=name)


def test_rows_stay_side_by_side_at_the_end_of_the_model_s_context(engine: Engine):
    sample = engine.encode([question("Say yes", 0)])
    most = Sampling(max_new_tokens=engine.decoder.parts.max_context)
    engine.make_room(len(sample.input_ids_L) + most.max_new_tokens)
    assert engine.decoder.context == engine.decoder.parts.max_context and engine.has_room(sample, most)


def test_the_picture_matters(engine: Engine):
    """Not the words of a random model: the first logits differ with the picture."""
    seen = []
    for colour in ("red", "blue"):
        picture = Image.new("RGB", (96, 96), colour)
        seen.append([engine.generate([picture], PROMPT, 8, temperature=1.0, seed=s).tokens for s in range(4)])
    assert seen[0] != seen[1]


def test_sampling_is_repeatable_and_leaves_the_random_state_alone(engine: Engine, pictures):
    options = {"max_new_tokens": 12, "temperature": 1.5, "top_p": 0.95}
    torch.manual_seed(7)
    state = torch.get_rng_state()
    first, again, other = (
        engine.generate(pictures[:1], PROMPT, seed=seed, **options).tokens for seed in (1, 1, 2)
    )
    assert first == again != other
    assert torch.equal(torch.get_rng_state(), state)


def test_a_narrow_nucleus_is_greedy(engine: Engine, pictures):
    greedy = engine.generate(pictures[:1], PROMPT, 6)
    narrow = engine.generate(pictures[:1], PROMPT, 6, temperature=1.0, top_p=1e-6, seed=3)
    assert narrow.tokens == greedy.tokens


def test_limits_and_timing(engine: Engine, pictures):
    one = engine.generate(pictures[:1], PROMPT, 1)
    assert len(one.tokens) == 1 and one.tokens_per_s is None
    end = engine.processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    config = generate.generation_config(engine.model, engine.processor, 1)
    assert end in config.eos_token_id and not config.do_sample


def test_marks_place_the_pictures(engine: Engine, pictures):
    before = engine.generate(pictures[:1], f"<image>\n{PROMPT}", 3)
    assert before.tokens == engine.generate(pictures[:1], PROMPT, 3).tokens
    both = engine.generate(pictures, "First <image> then <image>", 3)
    assert both.prompt_tokens > before.prompt_tokens


def one_line(caught: pytest.ExceptionInfo[UserError]) -> None:
    assert "\n" not in str(caught.value) and "record" not in str(caught.value)


def test_pictures_that_cannot_be_used(engine: Engine, pictures, tmp_path: Path):
    half = tmp_path / "half.png"
    half.write_bytes(pictures[0].read_bytes()[: pictures[0].stat().st_size // 2])
    (tmp_path / "text.png").write_text("not a picture")
    for name, message in [
        ("half.png", "half.png cannot be read"),
        ("text.png", "text.png cannot be read"),
        ("none.png", "none.png cannot be read .no such file"),
        (".", "cannot be read"),
    ]:
        with pytest.raises(UserError, match=message) as caught:
            engine.generate([tmp_path / name], PROMPT)
        one_line(caught)
    for images, prompt in [(pictures, "one <image>"), (pictures[:1], "<image> and <image>"), ([], "<image>")]:
        with pytest.raises(UserError, match="<image> mark"):
            engine.generate(images, prompt)


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": "  "},
        {"max_new_tokens": 0},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.1},
    ],
)
def test_settings_out_of_range_stop_before_loading(change, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(generate, "load", lambda *a, **k: pytest.fail("loaded"))
    with pytest.raises(UserError) as caught:
        run_generate(arguments(Path("x"), [], **change))
    one_line(caught)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: shutil.rmtree(path), "not a directory"),
        (lambda path: (path / "config.json").unlink(), "no config.json"),
        (lambda path: (path / "config.json").write_text("{"), "cannot be read"),
        (lambda path: (path / "config.json").write_text("[]"), "cannot be read"),
        (lambda path: (path / "config.json").write_text('{"model_type": "bert"}'), "a bert model"),
        (lambda path: (path / "tokenizer.json").unlink(), "no tokenizer.json"),
        (lambda path: (path / "processor_config.json").unlink(), "processor"),
        (lambda path: (path / "model.safetensors").unlink(), "is damaged"),
        (lambda path: (path / "model.safetensors").write_bytes(b"x" * 99), "is damaged"),
        (lambda path: (path / "model.safetensors").write_bytes(b""), "is damaged"),
        (lambda path: quantized_with(path, "gptq"), "quantized with gptq"),
    ],
)
def test_directories_that_cannot_be_used(awq_dir: Path, tmp_path: Path, damage, message: str):
    shutil.copytree(awq_dir, tmp_path / "awq")
    damage(tmp_path / "awq")
    with pytest.raises(UserError, match=message) as caught:
        load(tmp_path / "awq")
    one_line(caught)


def quantized_with(path: Path, method: str) -> None:
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"]["quant_method"] = method
    (path / "config.json").write_text(json.dumps(config))


def test_a_run_directory_gets_a_hint(qat_run: Path):
    with pytest.raises(UserError, match="give its model/"):
        load(qat_run)


def test_a_kernel_needs_packed_layers(qat_run: Path, awq_dir: Path):
    with pytest.raises(UserError, match="no packed weights"):
        load(qat_run / "model", kernel="dequant")
    with pytest.raises(UserError, match="choose auto or dequant"):
        load(awq_dir, kernel="marlin")
