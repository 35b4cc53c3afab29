"""Hashes of records: the same for the same, another for any change."""

import dataclasses
from pathlib import Path

import pytest

from grace.data.record_key import CONTENT_BYTES, TEXT_BYTES, content_key, text_key
from grace.data.records import Record, Turn
from grace.errors import UserError


@pytest.fixture
def record(tmp_path: Path) -> Record:
    (tmp_path / "a.png").write_bytes(b"picture")
    (tmp_path / "b.png").write_bytes(b"other")
    return Record("r", (tmp_path / "a.png",), (Turn("user", "<image> What?"), Turn("assistant", "That.")))


def test_any_change_of_text_shows(record: Record) -> None:
    changes = [
        {"id": "s"},
        {"turns": (Turn("user", "<image> What"), Turn("assistant", "?That."))},
        {"turns": (Turn("user", "<image> What?"), Turn("assistant", "That"))},
        {"turns": (Turn("system", "<image> What?"), Turn("assistant", "That."))},
        {"turns": record.turns[:1]},
        {"images": ()},
    ]
    keys = [text_key(dataclasses.replace(record, **change)) for change in ({}, *changes)]
    assert len(set(keys)) == len(keys) and {len(k) for k in keys} == {TEXT_BYTES}


def test_pictures_count_by_their_bytes_not_their_place(record: Record, tmp_path: Path) -> None:
    before = content_key(record)
    assert len(before) == CONTENT_BYTES
    moved = tmp_path / "moved.png"
    record.images[0].rename(moved)
    record = dataclasses.replace(record, images=(moved,))
    assert content_key(record) == before
    moved.write_bytes(b"picturf")
    assert content_key(record) != before


def test_order_of_pictures_counts(record: Record, tmp_path: Path) -> None:
    one, two = tmp_path / "a.png", tmp_path / "b.png"
    keys = [content_key(dataclasses.replace(record, images=images)) for images in ((one, two), (two, one))]
    assert keys[0] != keys[1]


def test_lone_surrogates_have_a_key(record: Record) -> None:
    assert text_key(dataclasses.replace(record, turns=(Turn("user", "\ud800"),)))


def test_a_missing_picture_is_named(record: Record) -> None:
    record.images[0].unlink()
    with pytest.raises(UserError, match="record r: image .*a.png cannot be read"):
        content_key(record)
