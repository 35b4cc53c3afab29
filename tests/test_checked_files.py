"""Files that lie: each is one `DamagedFile` or `UserError`, at once and without much memory."""

import json
import os
import time
from pathlib import Path

import pytest

from grace.checked_files import (
    CONFIG_LIMIT,
    HEADER_LIMIT,
    DamagedFile,
    damage_of,
    open_regular,
    read_json,
    require_regular,
    safetensors_header,
    weight_files,
)
from grace.errors import UserError

TENSORS = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    "empty": {"dtype": "I8", "shape": [0, 7], "data_offsets": [32, 32]},
}


def write(path: Path, header: object, data: int = 32, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + bytes(data))
    return path


def test_a_good_file(tmp_path: Path):
    path = write(tmp_path / "x.safetensors", {"__metadata__": {"format": "pt"}, **TENSORS})
    start = path.stat().st_size - 32
    found = safetensors_header(path)
    assert {name: (t.dtype, t.shape, t.start - start, t.end - start) for name, t in found.items()} == {
        "a": ("F32", (2, 3), 0, 24),
        "b": ("BF16", (4,), 24, 32),
        "empty": ("I8", (0, 7), 32, 32),
    }


def changed(name: str, **fields: object) -> dict:
    return {**TENSORS, name: {**TENSORS[name], **fields}}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (changed("a", data_offsets=[0, 23]), "length of 'a'"),
        (changed("a", data_offsets=[24, 0]), "length of 'a'"),
        (changed("a", data_offsets=[-24, 0]), "position of 'a'"),
        (changed("a", data_offsets=[0.0, 24.0]), "position of 'a'"),
        (changed("a", data_offsets=[0, 2**64]), "position of 'a'"),
        (changed("a", data_offsets=[0]), "position of 'a'"),
        (changed("b", data_offsets=[16, 24]), "overlaps"),
        (changed("b", data_offsets=[25, 33]), "gap"),
        (changed("b", data_offsets=[1000, 1008]), "gap"),
        (changed("a", shape=[3, 3]), "length of 'a'"),
        (changed("a", shape=[-2, -3]), "shape of 'a'"),
        (changed("a", shape=[True, 6]), "shape of 'a'"),
        (changed("a", shape=[2**62, 2**62]), "shape of 'a'"),
        (changed("a", shape=[1] * 99), "shape of 'a'"),
        (changed("a", shape="23"), "shape of 'a'"),
        (changed("a", dtype="F99"), "type of 'a'"),
        (changed("a", dtype=["F32"]), "type of 'a'"),
        ({**TENSORS, "a": None}, "entry of 'a'"),
        ({**TENSORS, "a": {"dtype": "F32"}}, "entry of 'a'"),
        ({**TENSORS, "__metadata__": {"format": 1}}, "metadata"),
        ([], "not an object"),
        (b"{", "not JSON"),
        (b"\xff\xfe", "not text"),
        (b"[" * 100_000, "too deeply"),
        (b'{"a":' + json.dumps(TENSORS["a"]).encode() + b',"a":' + json.dumps(TENSORS["a"]).encode() + b"}", "twice"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": 1e999}', "1e999"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not JSON"),
    ],
)  # fmt: skip
def test_a_header_that_its_file_contradicts(tmp_path: Path, header: object, message: str):
    with pytest.raises(DamagedFile, match=message) as caught:
        safetensors_header(write(tmp_path / "x.safetensors", header))
    assert "\n" not in str(caught.value) and "x.safetensors" in str(caught.value)


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, HEADER_LIMIT + 1, 10_000, 1])
def test_a_wrong_header_length(tmp_path: Path, length: int):
    with pytest.raises(DamagedFile):
        safetensors_header(write(tmp_path / "x.safetensors", TENSORS, length=length))


@pytest.mark.parametrize("size", [0, 7, 8, 100, -1])
def test_a_file_cut_short_or_longer(tmp_path: Path, size: int):
    path = write(tmp_path / "x.safetensors", TENSORS)
    path.write_bytes(path.read_bytes()[:size] if size != -1 else path.read_bytes() + b"more")
    with pytest.raises(DamagedFile):
        safetensors_header(path)


def test_what_is_no_file_is_not_waited_for(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "loop.json").symlink_to(tmp_path / "loop.json")
    (tmp_path / "zero.json").symlink_to("/dev/zero")
    for name in ("pipe", "folder", "zero"):
        with pytest.raises(DamagedFile, match="not a regular file"):
            open_regular(tmp_path / f"{name}.json")
    with pytest.raises(OSError, match="symbolic links"):
        open_regular(tmp_path / "loop.json")
    for name in ("pipe", "folder", "loop", "zero"):
        folder = tmp_path / f"in-{name}"
        folder.mkdir()
        (tmp_path / f"{name}.json").rename(folder / "tokenizer.json")
        with pytest.raises(UserError, match="is damaged"):
            require_regular(folder)


def test_a_link_to_a_file_is_a_file(tmp_path: Path):
    (tmp_path / "blob").write_text('{"x": 1}')
    (tmp_path / "config.json").symlink_to(tmp_path / "blob")
    assert read_json(tmp_path / "config.json") == {"x": 1}


def test_sizes_are_bounded_before_anything_is_read(tmp_path: Path):
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(2**30)  # sparse: a gigabyte of nothing
    start = time.perf_counter()
    with pytest.raises(DamagedFile, match=f"more than {CONFIG_LIMIT} bytes"):
        read_json(tmp_path / "config.json")
    with pytest.raises(UserError, match="more than"):
        require_regular(tmp_path)
    assert time.perf_counter() - start < 1


def test_many_names_given_twice_take_no_time(tmp_path: Path):
    pairs = ",".join(f'"n{i}":0' for i in range(200_000))
    (tmp_path / "x.json").write_text(f'{{{pairs},"n199999":0}}')
    start = time.perf_counter()
    with pytest.raises(DamagedFile, match="twice"):
        read_json(tmp_path / "x.json")
    assert time.perf_counter() - start < 5


def test_numbers_that_python_writes_are_read_where_wanted(tmp_path: Path):
    (tmp_path / "x.json").write_text('{"a": NaN, "b": -Infinity}')
    assert str(read_json(tmp_path / "x.json", finite=False)) == "{'a': nan, 'b': -inf}"


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        ({"a": "../x.safetensors"}, "no file beside it"),
        ({"a": "/etc/passwd"}, "no file beside it"),
        ({"a": "sub/x.safetensors"}, "no file beside it"),
        ({"a": "x.safetensors\0.safetensors"}, "no file beside it"),
        ({"a": 7}, "no weight_map"),
        ([], "no weight_map"),
        ({}, "no weight_map"),
        ({"a": "x.safetensors"}, "disagree"),
    ],
)
def test_an_index_that_leads_elsewhere(tmp_path: Path, listed: object, message: str):
    write(tmp_path / "x.safetensors", TENSORS)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))
    with pytest.raises(DamagedFile, match=message):
        weight_files(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path):
    for name in ("x", "y"):
        write(tmp_path / f"{name}.safetensors", TENSORS)
    listed = {**dict.fromkeys(TENSORS, "x.safetensors"), "a": "y.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))
    with pytest.raises(DamagedFile, match="disagree"):
        weight_files(tmp_path)


def test_one_line_for_whatever_went_wrong():
    for error in (ValueError("a\nb"), KeyError("name"), OSError("gone"), IndexError(), TypeError("t")):
        with pytest.raises(UserError, match="^it is damaged .*: mend it$"), damage_of("it", "mend it"):
            raise error
    with pytest.raises(UserError, match="^mine$"), damage_of("it", "mend it"):
        raise UserError("mine")
