"""Entries held in memory or mapped from a table are the same entries, with the same faults."""

import json
import multiprocessing
import os
import pickle
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from planted_faults import STRUCTURE, entry, talk

from grace.data import annotations
from grace.data.annotations import KINDS, TextsInMemory, open_annotations
from grace.data.faults import Policies
from grace.data.record_key import text_key
from grace.data.record_parse import entry_id, parse_entry
from grace.data.records import Records, load_records, mixture_of, text_keys
from grace.data.sampler import Mixture
from grace.errors import UserError

SURROGATE = (
    '{"id": "\\ud800", "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}]}'
)


@pytest.fixture(params=["memory", "table"])
def held(request: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """How files are held in this test: in memory, or in a table below `tmp_path`."""
    if request.param == "table":
        use_tables(tmp_path, monkeypatch)
    return request.param


def use_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes every file worth a table; returns where they lie."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(annotations, "IN_MEMORY", -1)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache" / "grace"


def planted(path: Path) -> list[Any]:
    """Writes every fault that an entry can show, repeated ids among them; returns the entries."""
    entries = [
        *(one.entry for one in STRUCTURE),
        entry("r"),
        entry("s", None),
        entry("r"),
        entry("7"),
        entry("x", id=7),
    ]
    path.write_text(f"{json.dumps(entries, indent=1)[:-1]},{SURROGATE}, {SURROGATE}]")
    return [*entries, json.loads(SURROGATE), json.loads(SURROGATE)]


def test_every_entry_is_what_parsing_gives(held: str, tmp_path: Path) -> None:
    entries = planted(tmp_path / "d.json")
    found = open_annotations(tmp_path / "d.json")
    assert isinstance(found.texts, TextsInMemory) == (held == "memory")
    ids = [entry_id(one) for one in entries]
    repeats = [name is not None and name in ids[:i] for i, name in enumerate(ids)]
    assert len(found) == len(entries) and sum(repeats) == 5
    assert found.index.repeats_N.tolist() == repeats
    parsed = [parse_entry(one, Path("root"), repeat) for one, repeat in zip(entries, repeats, strict=True)]
    assert [found.parsed(i, Path("root")) for i in range(len(found))] == parsed
    assert found.index.usable_N.tolist() == [one.record is not None for one in parsed]
    kinds = [[k.kind for k in one.faults if k.kind != "duplicate_id"] for one in parsed]
    of = zip(found.index.fault_rows_F.tolist(), found.index.fault_kinds_F.tolist(), strict=True)
    assert [(row, KINDS[kind]) for row, kind in of] == [(i, k) for i, one in enumerate(kinds) for k in one]
    keys = [bytes(8) if one.record is None else text_key(one.record) for one in parsed]
    assert [key.tobytes() for key in found.index.keys_N8] == keys
    for skip in ([], ["duplicate_id"], ["empty_text", "unanswered"], list(KINDS)):
        policies = Policies(skip)
        chosen = [policies.skips(one.faults) for one in parsed]
        numbers = found.index.skipped_N(policies).tolist()
        assert [KINDS[kind] if kind >= 0 else None for kind in numbers] == chosen


def test_records_are_a_sequence_made_on_demand(held: str, tmp_path: Path) -> None:
    entries = [entry(f"r{i}") for i in range(12)]
    entries[5]["conversations"] = talk(("human", "<image>"))
    path = tmp_path / "d.json"
    path.write_text(json.dumps(entries))
    skipped: Counter[str] = Counter()
    records = load_records(path, None, Policies(["one_sided"]), [0, 11, 99], skipped)
    names = [f"r{i}" for i in range(1, 11) if i != 5]
    assert isinstance(records, Records) and skipped == {"one_sided": 1}
    assert [record.id for record in records] == names and len(records) == 9 and records[-1].id == "r10"
    assert [record.id for record in records[2:7:2]] == names[2:7:2] and records[3:][0].id == names[3]
    assert records == list(records) and records != list(records)[:-1] and records[:2] != records[1:3]
    assert text_keys(records) == [text_key(record) for record in records] == text_keys(list(records))
    assert pickle.loads(pickle.dumps(records)) == records
    both = Records.joined([records, load_records(path, "/p", Policies(["one_sided"]))], [9, 2])
    assert mixture_of(both) == Mixture((9, 11), (9, 2)) and mixture_of(both[:5]) == Mixture.whole(5)
    assert [record.id for record in both][9:11] == ["r0", "r1"] and both[9].images[0].parent.parent == Path(
        "/p"
    )
    assert both[3:12].text_keys() == [text_key(record) for record in both][3:12]
    with pytest.raises(IndexError):
        records[9]
    with pytest.raises(UserError, match="r5 does not end with a gpt turn"):
        load_records(path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (
            "[{",
            "is not readable JSON .Expecting property name enclosed in double quotes: line 1 column 3 .char 2",
        ),
        ("", "is not readable JSON .Expecting value: line 1 column 1 .char 0"),
        ('{"id": 1}', "holds a JSON dict: a list of records is needed"),
        ("[]", "holds no records"),
        ('[{"id": 1}, "x]', "Unterminated string starting at: line 1 column 13 .char 12"),
    ],
)
def test_a_bad_file_leaves_nothing_behind(held: str, tmp_path: Path, content: str, reason: str) -> None:
    path = tmp_path / "d.json"
    path.write_text(content)
    with pytest.raises(UserError, match=reason):
        load_records(path)
    assert [one.name for one in (tmp_path / "cache").rglob("*") if one.is_file()] in ([], [".lock"])


def test_later_starts_read_no_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_tables(tmp_path, monkeypatch)
    path = tmp_path / "d.json"
    path.write_text(json.dumps([entry(str(i)) for i in range(3000)]))
    told: list[tuple[int, int]] = []
    first = load_records(path, advance=lambda done, total: told.append((done, total)))
    assert told[-1] == (path.stat().st_size,) * 2
    monkeypatch.setattr("grace.data.arrow_table.read_texts", None)
    again = load_records(path)
    assert len(pickle.dumps(again)) < 200_000 < path.stat().st_size
    assert again.text_keys() == first.text_keys() and again == first  # 3,000 reads: mapped anew on the way
    monkeypatch.undo()


def test_a_changed_file_has_another_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = use_tables(tmp_path, monkeypatch)
    path = tmp_path / "d.json"
    for name in ("a", "b"):
        path.write_text(json.dumps([entry(name)]))
        assert load_records(path)[0].id == name
        time.sleep(0.02)  # the clock of file systems is coarse
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize("file", ["entries.arrow", "index.npz", "table.json"])
@pytest.mark.parametrize("damage", ["gone", "short", "empty"])
def test_a_damaged_table_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, damage: str
) -> None:
    cache = use_tables(tmp_path, monkeypatch)
    path = tmp_path / "d.json"
    path.write_text(json.dumps([entry(str(i)) for i in range(50)]))
    first = load_records(path)
    (target,) = cache.rglob(file)
    raw = target.read_bytes()
    target.unlink()
    if damage != "gone":
        target.write_bytes(raw[: len(raw) // 2] if damage == "short" else b"")
    again = load_records(path)
    assert again.text_keys() == first.text_keys() and again[49].id == "49"


def test_flipped_bytes_are_never_taken_for_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = use_tables(tmp_path, monkeypatch)
    path = tmp_path / "d.json"
    path.write_text(json.dumps([entry(str(i)) for i in range(50)]))
    first = list(load_records(path))
    (target,) = cache.rglob("entries.arrow")
    raw = target.read_bytes()
    refused = 0
    for at in np.random.default_rng(0).integers(0, len(raw), size=150).tolist():
        target.write_bytes(raw[:at] + bytes([raw[at] ^ 0x21]) + raw[at + 1 :])
        try:
            found = list(load_records(path))
        except UserError as error:
            refused += "is damaged: remove" in str(error)
        else:
            assert found == first  # what was hit means nothing, or the table was made again
        target.write_bytes(raw)
    assert refused > 50


def test_a_table_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_tables(tmp_path, monkeypatch)
    (tmp_path / "cache").write_text("")
    path = tmp_path / "d.json"
    path.write_text(json.dumps([entry("a")]))
    with pytest.raises(UserError, match="set HF_DATASETS_CACHE"):
        load_records(path)


def _load(path: Path, found: Any) -> None:
    found.put(len(load_records(path)))


def test_processes_that_start_together_make_one_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = use_tables(tmp_path, monkeypatch)
    path = tmp_path / "d.json"
    path.write_text(json.dumps([entry(str(i)) for i in range(4000)]))
    context = multiprocessing.get_context("fork")
    found = context.Queue()
    processes = [context.Process(target=_load, args=(path, found)) for _ in range(4)]
    for process in processes:
        process.start()
    assert [found.get(timeout=60) for _ in processes] == [4000] * 4
    for process in processes:
        process.join()
    assert len(list(cache.iterdir())) == 1 and not list(cache.rglob("*.tmp-*"))


def test_a_kill_while_the_table_is_made_leaves_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = use_tables(tmp_path, monkeypatch)
    path = tmp_path / "d.json"
    path.write_text(json.dumps([entry(str(i)) for i in range(60_000)]))
    code = f"""
import sys, os, datasets
from pathlib import Path
datasets.config.HF_DATASETS_CACHE = Path({str(tmp_path / "cache")!r})
from grace.data import annotations, json_list
annotations.IN_MEMORY = -1
json_list.WINDOW = 1 << 16
told = iter(range(10**9))
annotations.open_annotations(Path({str(path)!r}), lambda *_: os.kill(os.getpid(), 9) if next(told) == 40 else None)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    assert list(cache.rglob("*.tmp-*")) and not list(cache.rglob("table.json"))
    assert len(load_records(path)) == 60_000
    assert not list(cache.rglob("*.tmp-*"))


def test_without_datasets_a_large_file_is_held_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "d.json"
    path.write_text(json.dumps([entry("a")]))
    assert open_annotations(path).note is None
    monkeypatch.setattr(annotations, "IN_MEMORY", 10)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    told: list[tuple[int, int]] = []
    found = open_annotations(path, lambda done, total: told.append((done, total)))
    assert len(found) == 1 and found.note is not None and "pip install datasets" in found.note
    assert told[-1] == (path.stat().st_size,) * 2


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(UserError, match="no regular file"):
        open_annotations(tmp_path / "pipe.json")
