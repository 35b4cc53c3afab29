"""Ids equal the processor's own on ordinary text; labels come from structure whatever the text says."""

import json
import unicodedata
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from grace.data.packing import collate_packed
from grace.data.record_parse import parse_entry
from grace.data.records import Record, Turn, load_records, open_image
from grace.data.template import CHAT_TEMPLATE, IGNORED, Sample, count_tokens, encode, encode_prompt
from grace.errors import UserError
from grace.models.processor import load_processor


@pytest.fixture(scope="module")
def processor(tiny_student_dir: Path) -> Any:
    return load_processor(tiny_student_dir)


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "p.png"
    Image.linear_gradient("L").resize((96, 96)).convert("RGB").save(path)
    return path


def record(picture: Path, *texts: str, system: str | None = None) -> Record:
    """A record of alternating user and assistant texts, with as many pictures as there are marks."""
    turns = [Turn("user" if i % 2 == 0 else "assistant", text) for i, text in enumerate(texts)]
    if system is not None:
        turns.insert(0, Turn("system", system))
    marks = sum(turn.text.count("<image>") for turn in turns if turn.role == "user")
    return Record("r7", (picture,) * marks, tuple(turns))


def messages(record: Record) -> list[dict[str, Any]]:
    """The record as the library's chat messages, with the joining newlines taken out by hand."""
    images = iter(record.images)
    result = []
    for turn in record.turns:
        parts: list[dict[str, Any]] = []
        text = turn.text
        if turn.role == "user":
            for joined in ("<image>\n", "\n<image>"):
                text = text.replace(joined, "<image>")
            for i, part in enumerate(text.split("<image>")):
                if i > 0:
                    parts.append({"type": "image", "image": open_image(next(images), record.id)})
                if part:
                    parts.append({"type": "text", "text": part})
        else:
            parts.append({"type": "text", "text": text})
        result.append({"role": turn.role, "content": parts})
    return result


def by_library(record: Record, processor: Any, **options: Any) -> Any:
    return processor.apply_chat_template(
        messages(record), tokenize=True, return_dict=True, return_tensors="pt", **options
    )


def check_against_library(record: Record, processor: Any) -> None:
    sample = encode(record, processor, 4096)
    library = by_library(record, processor, return_assistant_tokens_mask=True)
    assert sample.input_ids_L.tolist() == library["input_ids"][0].tolist()
    assert torch.equal(sample.mm_token_type_ids_L, library["mm_token_type_ids"][0])
    assert (sample.labels_L != IGNORED).tolist() == torch.as_tensor(library["assistant_masks"])[
        0
    ].bool().tolist()
    if record.images:
        assert torch.equal(sample.pixel_values_PD, library["pixel_values"])
        assert torch.equal(sample.image_grid_thw_N3, library["image_grid_thw"])
    else:
        assert sample.pixel_values_PD is None and sample.image_grid_thw_N3 is None


CONVERSATIONS = [
    ("<image>\nWhat is the digit at the centre?", "3"),
    (
        "<image>\nWhere?",
        "top left",
        "How many red digits are there?",
        "2",
        "Describe.",
        "red 3, none; blue 7",
    ),
    ("What is 3 plus 4?", "7"),
    ("<image>\n<image>\nWhich is greater?", "the first one"),
    ("Look at <image> and <image>, please.\n\nWhich?", "Both."),
    ("What is this?\n<image>", "a scene"),
    ("First <image>", "yes", "and <image>\n?", "no"),
    ("<image>", "a picture"),
    ("  <image>\n  spaced  ", " answer with space ", "\nnew line first", "two\n\nlines\n"),
    ("été 漢字 🙂 'll don't\t12.5%", "naïve e\u0301 ok"),
]


@pytest.mark.parametrize("texts", CONVERSATIONS)
@pytest.mark.parametrize("system", [None, "Answer briefly."])
def test_ids_and_mask_equal_the_library_s(
    texts: tuple[str, ...], system: str | None, picture: Path, processor: Any
) -> None:
    check_against_library(record(picture, *texts, system=system), processor)


# No `<` (structure, marks); an answer that starts with a line break is a case of its own below.
ORDINARY = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<"), min_size=1, max_size=30)
ANSWER = ORDINARY.filter(lambda text: text == text.lstrip())


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(ORDINARY, ANSWER), min_size=1, max_size=3))
def test_ids_equal_the_library_s_on_any_ordinary_text(
    processor: Any, picture: Path, turns: list[tuple[str, str]]
) -> None:
    texts = [text for pair in turns for text in pair]
    check_against_library(record(picture, "<image>" + texts[0].removeprefix("\n"), *texts[1:]), processor)


def test_world_records_equal_the_library_s(tiny_world_dir: Path, processor: Any) -> None:
    for name in ("qat_train", "test"):
        for world_record in load_records(tiny_world_dir / f"{name}.json")[:14]:
            check_against_library(world_record, processor)


def test_an_answer_s_ids_are_those_generation_can_produce(picture: Path, processor: Any) -> None:
    # Tokenised together, "assistant\n" + "\nyes" would merge both line breaks.
    prompt = encode_prompt([Turn("user", "Well?")], [], processor)
    sample = encode(record(picture, "Well?", "\nyes"), processor, 100)
    assert sample.input_ids_L[: len(prompt.input_ids_L)].tolist() == prompt.input_ids_L.tolist()
    assert (sample.labels_L[len(prompt.input_ids_L) - 1 :] != IGNORED).tolist()[:2] == [False, True]


TRAPS = st.sampled_from(
    [
        *(
            "<|im_end|>",
            "<|im_start|>assistant\n",
            "<|im_start|>",
            "<|endoftext|>",
            "assistant",
            "\n",
            "user",
        ),
        *("<|image_pad|>", "<|vision_start|><|image_pad|><|vision_end|>", "<|vision_end|>", "<|video_pad|>"),
        *("<image", "image>", "{% generation %}", "{{ messages }}", " ", "yes", "3"),
    ]
)
TRAPPED = st.lists(TRAPS | ORDINARY, min_size=1, max_size=6).map("".join).filter(lambda t: "<image>" not in t)


def runs(sample: Sample) -> list[list[int]]:
    """The supervised stretches, one after another."""
    stretches: list[list[int]] = []
    previous = IGNORED
    for label in sample.labels_L.tolist():
        if label != IGNORED:
            if previous == IGNORED:
                stretches.append([])
            stretches[-1].append(label)
        previous = label
    return stretches


@settings(max_examples=150, deadline=None)
@given(
    turns=st.lists(st.tuples(TRAPPED, TRAPPED), min_size=1, max_size=3),
    system=st.none() | TRAPPED,
    images=st.integers(0, 2),
)
def test_no_text_acts_as_structure(
    processor: Any, picture: Path, turns: list[tuple[str, str]], system: str | None, images: int
) -> None:
    texts = [text for pair in turns for text in pair]
    fuzzed = record(picture, "<image>" * images + texts[0].removeprefix("\n"), *texts[1:], system=system)
    sample = encode(fuzzed, processor, 4096)
    ids, token = sample.input_ids_L.tolist(), processor.tokenizer.convert_tokens_to_ids
    start, end, pad = token("<|im_start|>"), token("<|im_end|>"), processor.image_token_id
    assert ids.count(start) == ids.count(end) == len(fuzzed.turns)
    assert ids.count(token("<|endoftext|>")) == ids.count(token("<|video_pad|>")) == 0
    assert ids.count(token("<|vision_start|>")) == ids.count(token("<|vision_end|>")) == images
    span = [token("<|vision_start|>"), *[pad] * 9, token("<|vision_end|>")]
    assert sum(ids[i : i + 11] == span for i in range(len(ids))) == images and ids.count(pad) == 9 * images
    assert sample.mm_token_type_ids_L.tolist() == [int(i == pad) for i in ids]
    assert all(label in (IGNORED, i) for label, i in zip(sample.labels_L.tolist(), ids, strict=True))
    answers = [turn.text for turn in fuzzed.turns if turn.role == "assistant"]
    stretches = runs(sample)
    assert all(stretch[-1] == end for stretch in stretches)
    decoded = [processor.tokenizer.decode(s[:-1], clean_up_tokenization_spaces=False) for s in stretches]
    assert decoded == [unicodedata.normalize("NFC", answer) for answer in answers]


def test_the_tokenizer_is_left_as_it_was(picture: Path, processor: Any) -> None:
    before = processor.tokenizer("a<|im_end|>")["input_ids"]
    encode(record(picture, "<|im_end|>", "yes"), processor, 100)
    assert processor.tokenizer("a<|im_end|>")["input_ids"] == before


def test_prompt_is_the_record_up_to_its_answer(picture: Path, processor: Any) -> None:
    full = record(picture, "<image>\nWhere?", "top left", "And red?", "none")
    prompt = encode_prompt(full.turns[:-1], [open_image(picture, "r7")], processor)
    sample = encode(full, processor, 4096)
    length = len(prompt.input_ids_L)
    assert torch.equal(prompt.input_ids_L, sample.input_ids_L[:length])
    assert (prompt.labels_L == IGNORED).all() and sample.labels_L[length] != IGNORED
    assert sample.labels_L[length - 1] == IGNORED
    library = by_library(Record("p", full.images, full.turns[:-1]), processor, add_generation_prompt=True)
    assert torch.equal(prompt.input_ids_L, library["input_ids"][0])
    assert torch.equal(prompt.pixel_values_PD, library["pixel_values"])


def test_prompt_with_the_wrong_number_of_pictures(picture: Path, processor: Any) -> None:
    with pytest.raises(UserError, match="the prompt has 1 <image> mark in its human turns but 0 images"):
        encode_prompt([Turn("user", "<image>?")], [], processor)


def test_too_long_is_refused_not_cut(picture: Path, processor: Any) -> None:
    fits = record(picture, "<image>\nWhere?", "top left")
    length = len(encode(fits, processor, 4096).input_ids_L)
    assert len(encode(fits, processor, length).input_ids_L) == length
    with pytest.raises(
        UserError, match=f"record r7 has {length} tokens, more than data.max_length={length - 1}"
    ):
        encode(fits, processor, length - 1)


@pytest.mark.parametrize("size", [(96, 96), (64, 96), (160, 50), (500, 300), (33, 31)])
def test_pixels_of_any_size_equal_the_library_s(
    size: tuple[int, int], tmp_path: Path, processor: Any
) -> None:
    Image.radial_gradient("L").resize(size).convert("RGB").save(tmp_path / "p.png")
    check_against_library(record(tmp_path / "p.png", "<image>\nWhat?", "yes"), processor)


def test_unusable_pictures_name_the_record(tmp_path: Path, processor: Any) -> None:
    Image.new("RGB", (900, 2)).save(tmp_path / "line.png")
    with pytest.raises(UserError, match="record r7: an image cannot be used"):
        encode(record(tmp_path / "line.png", "<image>\nWhat?", "yes"), processor, 100)
    with pytest.raises(UserError, match="record r7: image .* does not exist"):
        encode(record(tmp_path / "absent.png", "<image>\nWhat?", "yes"), processor, 100)


def test_template_marks_what_is_supervised() -> None:
    assert CHAT_TEMPLATE.count("generation -%}") >= 2 and "<|im_end|>" in CHAT_TEMPLATE


MARKED = st.lists(TRAPS | ORDINARY | st.just("<image>"), min_size=1, max_size=6).map("".join)
SEPARATED = MARKED.filter(lambda t: t.replace("<image>", "").strip())  # text beside the marks


@settings(max_examples=150, deadline=None)
@given(turns=st.lists(st.tuples(SEPARATED, SEPARATED), min_size=1, max_size=3), system=st.none() | SEPARATED)
def test_image_marks_count_in_human_turns_only_from_file_to_packed_row(
    processor: Any, picture: Path, turns: list[tuple[str, str]], system: str | None
) -> None:
    """Through the file, the parser, the audit's count and the packed row, beside another record."""
    said = [("system", system)] if system is not None else []
    said += [(role, text) for pair in turns for role, text in zip(("human", "gpt"), pair, strict=True)]
    marks = sum(text.count("<image>") for role, text in said if role == "human")
    entry = {"id": "r", "image": [picture.name] * marks,
             "conversations": [{"from": role, "value": text} for role, text in said]}  # fmt: skip
    parsed = parse_entry(json.loads(json.dumps(entry)), picture.parent)
    assert parsed.record is not None, parsed.faults
    sample = encode(parsed.record, processor, 4096)
    (counts,) = count_tokens([(parsed.record.turns, [9] * marks)], processor)
    answers = [unicodedata.normalize("NFC", text) for role, text in said if role == "gpt"]
    assert int(sample.mm_token_type_ids_L.sum()) == counts.image == 9 * marks
    assert (len(sample.input_ids_L), sum(map(len, runs(sample)))) == (counts.tokens, counts.supervised)
    row = collate_packed([encode(record(picture, "<image>?", "no"), processor, 100), sample], 2)
    ids_L, labels_L = row.input_ids_BL[0], row.labels_BL[0]
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert int((ids_L == processor.image_token_id).sum()) == 9 * (marks + 1)
    assert torch.equal(labels_L[labels_L != IGNORED], ids_L[labels_L != IGNORED])
    stretches = runs(replace(sample, labels_L=labels_L))
    assert all(stretch.count(end) == 1 and stretch[-1] == end for stretch in stretches)
    decoded = [processor.tokenizer.decode(s[:-1], clean_up_tokenization_spaces=False) for s in stretches]
    assert decoded == ["no", *answers]


@settings(max_examples=60, deadline=None)
@given(text=SEPARATED, images=st.integers(0, 3))
def test_a_mark_without_its_picture_is_a_fault_never_an_image(picture: Path, text: str, images: int) -> None:
    entry = {"id": "r", "image": [picture.name] * images,
             "conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": text}]}  # fmt: skip
    parsed = parse_entry(entry, picture.parent)
    right = text.count("<image>") == images
    assert any(fault.kind == "image_count" for fault in parsed.faults) != right
    assert (parsed.record is not None) == right
