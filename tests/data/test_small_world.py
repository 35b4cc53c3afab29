"""The written world: same seed, same bytes; balanced; readable by the code that reads real data."""

import hashlib
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from grace.data import small_world
from grace.data.questions import KINDS, kind_of
from grace.data.records import load_records, open_image
from grace.data.small_world import SPLIT_SIZES, majority_rate, write_small_world
from grace.data.template import encode
from grace.errors import UserError
from grace.models.processor import load_processor


def hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("worlds") / "w"
    return write_small_world(out, seed=3, splits={"student_answer": 400, "qat_train": 60, "test": 240})


def entries(world: Path, name: str) -> list[dict[str, Any]]:
    return json.loads((world / f"{name}.json").read_text())


def test_the_same_seed_gives_the_same_bytes(world: Path, tmp_path: Path) -> None:
    again = write_small_world(
        tmp_path / "again", seed=3, splits={"test": 240, "qat_train": 60, "student_answer": 400}
    )
    first, second = hashes(world), hashes(again)
    del first["world.json"], second["world.json"]  # lists the splits in the order asked
    assert first == second and len(first) > 600
    other = hashes(write_small_world(tmp_path / "other", seed=4, splits={"test": 14}))
    assert all(first[name] != digest for name, digest in other.items() if name.endswith(".png"))


def test_a_record_depends_on_neither_other_splits_nor_sizes(world: Path, tmp_path: Path) -> None:
    small = write_small_world(tmp_path / "small", seed=3, splits={"test": 21})
    assert entries(small, "test") == entries(world, "test")[:21]
    large = hashes(world)
    assert all(large[name] == digest for name, digest in hashes(small).items() if name.endswith(".png"))
    assert sorted(path.name for path in small.iterdir()) == ["images", "test.json", "world.json"]


def test_stored_bytes_of_the_first_record(tmp_path: Path) -> None:
    # A stored value: another world would silently invalidate every committed weight and score.
    out = write_small_world(tmp_path / "w", seed=0, splits={"test": 1, "qat_train": 1})
    assert entries(out, "test") == [FIRST_TEST]
    pixels = open_image(out / FIRST_TEST["image"], "x").tobytes()
    assert hashlib.sha256(pixels).hexdigest() == FIRST_PIXELS
    assert entries(out, "qat_train")[0]["conversations"] == FIRST_QAT


FIRST_TEST: dict[str, Any] = {
    "id": "test-000000-read",
    "image": "images/test/test-000000-read.png",
    "conversations": [
        {"from": "human", "value": "<image>\nWhich digit is in the top left cell?"},
        {"from": "gpt", "value": "2"},
    ],
}
FIRST_PIXELS = "90bad06e4b03a2b3998e5a36c1f1b806bae7b54db1f7f091442656eedac6f2b8"
FIRST_QAT = [
    {"from": "human", "value": "<image>\nWhich digit is below the top right digit?"},
    {"from": "gpt", "value": "middle right: 3"},
    {"from": "human", "value": "How many orange digits are there?"},
    {"from": "gpt", "value": "orange none: 0"},
]


def test_measured_records_are_single_questions_in_equal_numbers(world: Path) -> None:
    records = load_records(world / "test.json")
    assert Counter(kind_of(record.id) for record in records) == dict.fromkeys(KINDS, 30)
    assert all(len(record.turns) == 2 and len(record.images) == 1 for record in records)
    assert len({record.images for record in records}) == len(records)
    rates = majority_rate(records)
    assert set(rates) == set(KINDS) and rates["compare"] < 0.75 and max(rates["sum"], rates["describe"]) < 0.3


def test_training_records_are_mixed(world: Path) -> None:
    records = load_records(world / "student_answer.json")
    pictured = [record for record in records if record.images]
    assert 0.02 < 1 - len(pictured) / len(records) < 0.09
    turns = Counter(len(record.turns) // 2 for record in records)
    assert set(turns) == {1, 2, 3, 4, 5, 6} and min(turns.values()) > 0.08 * len(records)
    described = [[";" in turn.text for turn in record.turns[1::2]] for record in pictured]
    assert 0.22 < sum(map(any, described)) / len(pictured) < 0.38
    assert all(sum(record) <= 1 for record in described)
    places = Counter(record.index(True) for record in described if any(record))
    assert set(places) == {0, 1, 2, 3, 4, 5}
    assert all(
        "<image>" not in turn["value"]
        for e in entries(world, "student_answer")
        if "image" not in e
        for turn in e["conversations"]
    )


def test_files_follow_the_sharegpt4v_schema(world: Path) -> None:
    for name in ("student_answer", "qat_train", "test"):
        for entry in entries(world, name):
            assert set(entry) in ({"id", "image", "conversations"}, {"id", "conversations"})
            assert [turn["from"] for turn in entry["conversations"]] == ["human", "gpt"] * (
                len(entry["conversations"]) // 2
            )
            if "image" in entry:
                assert entry["conversations"][0]["value"].startswith("<image>\n")
                assert entry["image"] == f"images/{name}/{entry['id']}.png"
                assert open_image(world / entry["image"], entry["id"]).size == (96, 96)


def test_three_answers_of_ten_are_wrong_and_all_else_is_equal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noisy = entries(write_small_world(tmp_path / "noisy", seed=3, splits={"qat_train": 300}), "qat_train")
    honest_split = replace(small_world.SPLITS["qat_train"], wrong=0.0)
    monkeypatch.setitem(small_world.SPLITS, "qat_train", honest_split)
    honest = entries(write_small_world(tmp_path / "honest", seed=3, splits={"qat_train": 300}), "qat_train")
    changed, total = Counter[bool](), 0
    for told, true in zip(noisy, honest, strict=True):
        assert told.get("image") == true.get("image")
        for told_turn, true_turn in zip(told["conversations"], true["conversations"], strict=True):
            if told_turn["from"] == "human":
                assert told_turn == true_turn
            else:
                total += 1
                changed[";" in true_turn["value"]] += told_turn != true_turn
    assert 0.25 < changed.total() / total < 0.35
    assert changed[True] > 20 and changed[False] > 100


def test_every_word_is_one_token(world: Path, tiny_student_dir: Path) -> None:
    processor = load_processor(tiny_student_dir)
    for name in ("student_answer", "test"):
        for record in load_records(world / f"{name}.json"):
            for turn in record.turns:
                text = turn.text.removeprefix("<image>\n")
                pieces = text.split()
                digits = sum(c.isdigit() for c in text)
                marks = sum(c in ",;?.:" for c in text)
                words = sum(any(c.isalpha() for c in piece) for piece in pieces)
                # Digits stand alone; "yes" and "no" are known without the space before them.
                spaces = sum(piece[0].isdigit() or piece in ("yes", "no") for piece in pieces[1:])
                assert len(processor.tokenizer.tokenize(text)) == words + digits + marks + spaces, text


def test_records_are_short_enough_for_training(world: Path, tiny_student_dir: Path) -> None:
    processor = load_processor(tiny_student_dir)
    samples = [encode(record, processor, 256) for record in load_records(world / "qat_train.json")]
    assert 50 < sum(len(sample.input_ids_L) for sample in samples) / len(samples) < 120


def test_default_sizes() -> None:
    assert SPLIT_SIZES == {
        "teacher_see": 16000,
        "student_see": 16000,
        "teacher_answer": 12000,
        "student_answer": 6000,
        "qat_train": 2000,
        "validation": 1000,
        "test": 3000,
    }


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'dev' of 5 records"):
        write_small_world(tmp_path / "w", splits={"dev": 5})
    with pytest.raises(UserError, match="'test' of 0 records"):
        write_small_world(tmp_path / "w", splits={"test": 0})
    assert not (tmp_path / "w").exists()
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "kept").write_text("x")
    with pytest.raises(UserError, match="not empty"):
        write_small_world(tmp_path / "w", splits={"test": 7})
