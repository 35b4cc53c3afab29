"""Every fault of a training file is one clear line that names the file and the record."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from grace.data.records import Record, Turn, load_records, open_image
from grace.errors import UserError


def good(**changes: Any) -> dict[str, Any]:
    record = {
        "id": "r7",
        "image": "a.png",
        "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "This."}],
    }
    return {key: value for key, value in {**record, **changes}.items() if value is not ...}


def talk(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"from": role, "value": value} for role, value in turns]


def write(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_a_good_file(tmp_path: Path) -> None:
    dialogue = talk(
        ("system", "Be short."),
        ("human", "<image><image> Which?"),
        ("gpt", "A <image>."),
        ("human", "?"),
        ("gpt", "B"),
    )
    path = write(
        tmp_path / "d.json",
        [
            good(),
            good(id=3, image=["a.png", "sub/b.png"], conversations=dialogue, extra=1),
            good(image=..., conversations=talk(("human", "Hi"), ("gpt", "Hello"))),
        ],
    )
    first, second, third = load_records(path)
    assert first == Record(
        "r7", (tmp_path / "a.png",), (Turn("user", "<image>\nWhat?"), Turn("assistant", "This."))
    )
    assert second.id == "3" and second.images == (tmp_path / "a.png", tmp_path / "sub/b.png")
    assert [turn.role for turn in second.turns] == ["system", "user", "assistant", "user", "assistant"]
    assert third.images == ()
    assert load_records(path, image_root="/pictures")[0].images == (Path("/pictures/a.png"),)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("[{", "not readable JSON"),
        ("", "not readable JSON"),
        ({"id": 1}, "holds a JSON dict"),
        ([], "holds no records"),
    ],
)
def test_faults_of_the_file(tmp_path: Path, content: Any, reason: str) -> None:
    path = write(tmp_path / "d.json", content)
    with pytest.raises(UserError, match=reason) as caught:
        load_records(path)
    assert str(path) in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load_records(tmp_path / "absent.json")
    with pytest.raises(UserError, match="cannot be read"):
        load_records(tmp_path)
    (tmp_path / "latin.json").write_bytes(b'["\xe9"]')
    with pytest.raises(UserError, match="not readable JSON"):
        load_records(tmp_path / "latin.json")


FAULTS: list[tuple[Any, str, str]] = [
    ("text", "record number 1", "JSON str"),
    (good(id=...), "record number 1", 'no "id"'),
    (good(id=""), "record number 1", 'no "id"'),
    (good(id=None), "record number 1", 'no "id"'),
    (good(conversations=...), "record r7", 'no "conversations"'),
    (good(conversations=[]), "record r7", 'empty or malformed "conversations"'),
    (good(conversations="hi"), "record r7", 'empty or malformed "conversations"'),
    (good(conversations=["hi", "ho"]), "record r7, turn 0", 'not an object with "from" and "value"'),
    (good(conversations=[{"from": "human"}]), "record r7, turn 0", 'not an object with "from" and "value"'),
    (good(conversations=talk(("alien", "hi"))), "record r7, turn 0", "from 'alien'"),
    (good(conversations=[{"from": ["human"], "value": "x"}]), "record r7, turn 0", "only human, gpt, system"),
    (good(conversations=talk(("human", "<image>?"), ("gpt", " \n"))), "record r7, turn 1", "has no text"),
    (good(conversations=[{"from": "human", "value": None}]), "record r7, turn 0", "has no text"),
    (good(conversations=talk(("human", "<image>?"))), "record r7", "does not end with a gpt turn"),
    (
        good(conversations=talk(("human", "<image>"), ("gpt", "a"), ("human", "b"))),
        "record r7",
        "does not end with a gpt turn",
    ),
    (good(conversations=talk(("system", "x"))), "record r7", "does not end with a gpt turn"),
    (good(conversations=talk(("gpt", "a"))), "record r7", "assistant turn where a user turn"),
    (good(conversations=talk(("human", "a"), ("human", "b"), ("gpt", "c"))), "record r7", "alternate"),
    (good(conversations=talk(("human", "a"), ("system", "b"), ("gpt", "c"))), "record r7", "not its first"),
    (
        good(conversations=talk(("human", "<image><image>"), ("gpt", "c"))),
        "record r7",
        "2 <image> marks .* 1 image:",
    ),
    (
        good(conversations=talk(("human", "none"), ("gpt", "<image>"))),
        "record r7",
        "0 <image> marks .* 1 image:",
    ),
    (good(image=["a", "b"]), "record r7", "1 <image> mark in .* 2 images"),
    (good(image=...), "record r7", "1 <image> mark in .* 0 images"),
    (good(image=7), "record r7", "neither a path nor a list"),
    (good(image=["a", None]), "record r7", "neither a path nor a list"),
    (good(image=""), "record r7", "neither a path nor a list"),
    (good(image="http://host/a.jpg"), "record r7", "download it"),
    (good(video="a.mp4"), "record r7", "torchvision and a video decoder.*data.skip=.video."),
]


@pytest.mark.parametrize(("entry", "where", "reason"), FAULTS)
def test_faults_of_a_record(tmp_path: Path, entry: Any, where: str, reason: str) -> None:
    path = write(tmp_path / "d.json", [good(id="fine"), entry])
    with pytest.raises(UserError, match=reason) as caught:
        load_records(path)
    message = str(caught.value)
    assert str(path) in message and where in message and "\n" not in message


def test_pictures(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, size=(40, 50, 3), dtype=np.uint8)
    for name, picture in {
        "rgb.png": Image.fromarray(noise),
        "grey.png": Image.fromarray(noise[..., 0]),
    }.items():
        picture.save(tmp_path / name)
        opened = open_image(tmp_path / name, "r7")
        assert opened.mode == "RGB" and opened.size == (50, 40)


@pytest.mark.parametrize("name", ["p.png", "p.jpg", "p.webp", "p.gif"])
def test_a_truncated_picture_is_refused_and_never_filled_with_grey(tmp_path: Path, name: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, size=(64, 64, 3), dtype=np.uint8)
    path = tmp_path / name
    Image.fromarray(noise).save(path)
    whole = path.read_bytes()
    for share in (0.0, 0.02, 0.3, 0.8):
        path.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(UserError, match="record r7") as caught:
            open_image(path, "r7")
        assert str(path) in str(caught.value)


def test_missing_and_foreign_pictures(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="record r7: image .*absent.png does not exist"):
        open_image(tmp_path / "absent.png", "r7")
    with pytest.raises(UserError, match="record r7: image .* cannot be decoded"):
        open_image(tmp_path, "r7")
    path = write(tmp_path / "notes.png", "hello")
    with pytest.raises(UserError, match="record r7: image .* cannot be decoded"):
        open_image(path, "r7")
