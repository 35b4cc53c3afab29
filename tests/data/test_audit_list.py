"""The list on disk: who may read it, and that a stale or damaged one is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from planted_faults import Planted, entry, plant

from grace.data.audit import FileAudit, audit_file
from grace.data.audit_list import (
    length_print,
    list_path,
    read_list,
    require_writable,
    summary_path,
    write_list,
)
from grace.data.faults import CLASSES, Policies
from grace.errors import UserError
from grace.models.processor import load_processor

SKIP = Policies(skip=("missing", "over_long"))


@pytest.fixture(scope="module")
def processor(tiny_student_dir: Path) -> Any:
    return load_processor(tiny_student_dir)


@pytest.fixture(scope="module")
def written(
    tmp_path_factory: pytest.TempPathFactory, processor: Any
) -> tuple[Path, list[Planted], FileAudit]:
    path, planted = plant(tmp_path_factory.mktemp("list") / "data")
    audit = audit_file(path, None, processor, 2000)
    write_list(list_path(path), [audit], None, length_print(processor, 2000), {"records": len(planted)})
    return path, planted, audit


def test_lines_hold_what_a_reader_needs(written: tuple[Path, list[Planted], FileAudit]) -> None:
    path, planted, audit = written
    lines = [json.loads(line) for line in list_path(path).read_text().splitlines()]
    assert [(line["index"], line["class"]) for line in lines] == [(f.index, f.kind) for f in audit.findings]
    for line in lines:
        assert set(line) == {"id", "index", "class", "detail", "file", "source"}
        one = planted[line["index"]].entry
        assert line["id"] is None or line["id"] == str(one["id"])


def test_reading_gives_the_records_to_leave_out(
    written: tuple[Path, list[Planted], FileAudit], processor: Any
) -> None:
    path, _, audit = written
    chosen = read_list(list_path(path)).left_out(path, None, length_print(processor, 2000), SKIP)
    assert chosen == audit.left_out(SKIP) and set(chosen.values()) == {"missing", "over_long"}


@pytest.fixture
def copy(written: tuple[Path, list[Planted], FileAudit], tmp_path: Path) -> Path:
    """The annotations and their list, alone."""
    path = tmp_path / written[0].name
    for source in (written[0], list_path(written[0]), summary_path(list_path(written[0]))):
        shutil.copy(source, tmp_path)
    return path


def test_other_annotations_are_refused(copy: Path, written: tuple[Path, list[Planted], FileAudit]) -> None:
    root = written[0].parent
    read_list(list_path(copy)).left_out(copy, root, None, SKIP)
    copy.write_text(json.dumps([entry("x")]))
    with pytest.raises(UserError, match="not of .* as it is now: run `grace data audit` again"):
        read_list(list_path(copy)).left_out(copy, root, None, SKIP)


def test_other_pictures_are_refused(copy: Path) -> None:
    with pytest.raises(UserError, match="is of pictures in .*data, not"):
        read_list(list_path(copy)).left_out(copy, None, None, SKIP)


def test_other_lengths_are_refused_where_they_matter(
    copy: Path, written: tuple[Path, list[Planted], FileAudit], processor: Any
) -> None:
    root, others = written[0].parent, length_print(processor, 1999)
    assert others != length_print(processor, 2000)
    with pytest.raises(UserError, match="counted tokens with another"):
        read_list(list_path(copy)).left_out(copy, root, others, SKIP)
    assert read_list(list_path(copy)).left_out(copy, root, others, Policies(skip=("missing",)))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda list_file, summary: list_file.unlink(), "no audit at"),
        (lambda list_file, summary: summary.unlink(), "no audit at"),
        (lambda list_file, summary: summary.write_text("{"), "cannot be read"),
        (lambda list_file, summary: summary.write_text("[]"), "not of this version"),
        (lambda list_file, summary: summary.write_text('{"format": 0}'), "not of this version"),
        (lambda list_file, summary: list_file.write_text(list_file.read_text()[:-40]), "not the list"),
        (lambda list_file, summary: list_file.write_bytes(b"\xff"), "cannot be read"),
    ],
)
def test_damaged_lists_are_refused(copy: Path, damage: Any, reason: str) -> None:
    damage(list_path(copy), summary_path(list_path(copy)))
    with pytest.raises(UserError, match=f"{reason}.*grace data audit"):
        read_list(list_path(copy))


def test_where_the_list_lies(tmp_path: Path) -> None:
    assert list_path("a/b.json") == Path("a/b.audit.jsonl")
    assert list_path("a/b.json", tmp_path) == tmp_path / "b.audit.jsonl"
    assert list_path("a/b.json", "new/") == Path("new/b.audit.jsonl")
    assert list_path("a/b.json", "x.jsonl") == Path("x.jsonl")
    assert summary_path(Path("x.jsonl")) == Path("x.summary.json")


def test_only_an_audit_is_overwritten(copy: Path, tmp_path: Path) -> None:
    require_writable(list_path(copy), [str(copy)])
    require_writable(tmp_path / "new" / "deep" / "list.jsonl", [str(copy)])
    with pytest.raises(UserError, match="overwrite the annotations"):
        require_writable(copy, [str(copy)])
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is no audit's"):
        require_writable(tmp_path / "notes.txt", [str(copy)])
    with pytest.raises(UserError, match="cannot write to .*notes.txt"):
        require_writable(tmp_path / "notes.txt" / "list.jsonl", [str(copy)])


@pytest.mark.parametrize(
    ("lists", "reason"),
    [
        ({"skip": ("mising",)}, "data.skip names 'mising'.*did you mean missing"),
        ({"accept": ("Palette",)}, "did you mean palette"),
        ({"skip": ("xyzzy",)}, "the classes are not_an_object, "),
        ({"accept": ("truncated",)}, "training cannot use"),
        ({"skip": ("palette",), "accept": ("palette",)}, "palette is in data.skip and in data.accept"),
    ],
)
def test_policies_that_make_no_sense(lists: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        Policies(**lists)


def test_policy_of_each_class() -> None:
    policies = Policies(skip=("missing", "video"), accept=("alpha",))
    assert {kind: policies.of(kind) for kind in CLASSES if policies.of(kind) != "error"} == {
        "missing": "skip", "video": "skip", "alpha": "accept"
    }  # fmt: skip
    assert policies.need_audit() == ["missing"]
