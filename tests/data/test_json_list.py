"""Entries and messages are those of `json.loads`, wherever the windows happen to end."""

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grace.data import json_list
from grace.data.json_list import NotAList, stream_entries

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=12),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=8,
)


def whole(path: Path) -> Any:
    """What reading the file at once gives: the entries, or the message."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        return str(error)
    return value if isinstance(value, list) else type(value).__name__


def streamed(path: Path) -> Any:
    try:
        return [value for _, value in stream_entries(path)]
    except NotAList as error:
        return error.kind
    except ValueError as error:
        return str(error)


def same(path: Path, windows: tuple[int, ...] = (1, 3, 40, 1 << 22)) -> Any:
    """Checks every window and returns what they all give."""
    expected = whole(path)
    with pytest.MonkeyPatch.context() as patch:
        for window in windows:
            patch.setattr(json_list, "WINDOW", window)
            assert repr(streamed(path)) == repr(expected), window
    return expected


@settings(max_examples=80, deadline=None)
@given(
    values=st.lists(VALUES, max_size=5),
    indent=st.sampled_from([None, 1]),
    ascii_only=st.booleans(),
    cut=st.floats(0, 1),
    data=st.data(),
)
def test_any_list_and_any_damage(
    tmp_path_factory: pytest.TempPathFactory,
    values: Any,
    indent: Any,
    ascii_only: bool,
    cut: float,
    data: Any,
) -> None:
    path = tmp_path_factory.mktemp("json") / "d.json"
    text = json.dumps(values, indent=indent, ensure_ascii=ascii_only)
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    same(path)
    raw = path.read_bytes()
    path.write_bytes(raw[: int(cut * len(raw))])
    same(path)
    at = data.draw(st.integers(0, max(0, len(raw) - 1)))
    path.write_bytes(raw[:at] + bytes([data.draw(st.sampled_from(list(b'"\\,]}x\n\xff7')))]) + raw[at + 1 :])
    same(path)


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "[", "[]", " [ ] ", "[]]", "[1,]", "[,1]", "[1 2]", "[1] x", "{}", "7", "nul", "[nul", "[1"),
        *('["a', '["\\ud83d\\ude00"]', '["\\ud83d"]', '["\\x"]', "[12345678901234567890]", "[1.5e10, -0]"),
        *("[NaN, -Infinity]", '[{"a": 1, "a": 2}]', "[\n1,\n\n2\nx]", "\ufeff[1]", '["\t"]', '{"a": [1, }'),
    ],
)  # fmt: skip
def test_corner_cases(tmp_path: Path, text: str) -> None:
    path = tmp_path / "d.json"
    path.write_bytes(text.encode())
    same(path)
    path.write_bytes(text.replace("\n", "\r\n").encode())
    same(path)


@pytest.mark.parametrize(
    "raw", [b'["\xe9"]', b'["ab", "\xc3', b'[1 "\xff"]', b"[1, 2] x \xff", b'["\xe2\x82"]']
)
def test_other_encodings(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "d.json"
    path.write_bytes(raw)
    assert "codec can't decode" in same(path)
    path.write_bytes(b'["' + b"\xc3\xa9" * 9000 + b'", ' + raw)
    assert "codec can't decode" in same(path, (5, 4096, 1 << 22))


def test_the_text_of_an_entry_is_its_own(tmp_path: Path) -> None:
    path = tmp_path / "d.json"
    path.write_text('[ {"a" :1.50} ,"b\\u00e9", 3 ]')
    assert [text for text, _ in stream_entries(path)] == ['{"a" :1.50}', '"b\\u00e9"', "3"]


def test_memory_does_not_grow_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_list, "WINDOW", 1 << 16)
    path = tmp_path / "d.json"
    path.write_text(json.dumps([{"id": i, "text": "word " * 50} for i in range(40_000)]))
    tracemalloc.start()
    assert sum(1 for _ in stream_entries(path)) == 40_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert path.stat().st_size > 10_000_000 and peak < 1_000_000


def test_bytes_read_are_told(tmp_path: Path) -> None:
    path = tmp_path / "d.json"
    path.write_text("[1, 2]")
    told: list[int] = []
    list(stream_entries(path, told.append))
    assert told[-1] == 6
