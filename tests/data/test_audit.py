"""The audit finds every planted fault and nothing else, and counts what training would encode."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from planted_faults import DEEP_FILES, FILES, SPECIAL, STRUCTURE, Planted, entry, plant

from grace.data.audit import COUNTS, FileAudit, audit_file, by_source, source_of
from grace.data.faults import CLASSES, Policies
from grace.data.record_parse import parse_entry
from grace.data.records import load_records
from grace.data.stats import statistics
from grace.data.template import IGNORED, encode
from grace.errors import UserError
from grace.models.processor import load_processor

MAX_LENGTH = 2000


@pytest.fixture(scope="module")
def processor(tiny_student_dir: Path) -> Any:
    return load_processor(tiny_student_dir)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Planted]]:
    return plant(tmp_path_factory.mktemp("planted") / "data", deep=True)


@pytest.fixture(scope="module")
def deep(tree: tuple[Path, list[Planted]], processor: Any) -> FileAudit:
    return audit_file(tree[0], None, processor, MAX_LENGTH, deep=True, workers=1)


def found(audit: FileAudit, count: int) -> list[set[str]]:
    kinds: list[set[str]] = [set() for _ in range(count)]
    for finding in audit.findings:
        kinds[finding.index].add(finding.kind)
    return kinds


def test_at_least_forty_kinds_are_planted_and_every_class_among_them() -> None:
    faulty = [one for one in STRUCTURE if one.kinds]
    faulty += [name for table in (FILES, DEEP_FILES, SPECIAL) for name, (_, kinds) in table.items() if kinds]
    assert len(faulty) > 80
    classes = {kind for one in STRUCTURE for kind in one.kinds} | {"absolute_path"}
    classes |= {
        kind for table in (FILES, DEEP_FILES, SPECIAL) for _, kinds in table.values() for kind in kinds
    }
    assert classes == set(CLASSES)


def test_the_documentation_names_every_class_and_which_may_be_accepted() -> None:
    text = (Path(__file__).parents[2] / "data" / "README.md").read_text()
    table = text[text.index("| seen in") : text.index("Those with a star")]
    named = {name: bool(star) for name, star in re.findall(r"`([a-z_]+)`(\*?)", table)}
    assert named == {name: one.usable for name, one in CLASSES.items()}


def test_every_fault_is_found_and_nothing_else(tree: tuple[Path, list[Planted]], deep: FileAudit) -> None:
    planted = tree[1]
    wrong = {
        one.name: (sorted(kinds), sorted(one.kinds))
        for one, kinds in zip(planted, found(deep, len(planted)), strict=True)
        if kinds != one.kinds
    }
    assert wrong == {}


def test_headers_and_tails_show_all_but_what_only_decoding_can(
    tree: tuple[Path, list[Planted]], processor: Any
) -> None:
    path, planted = tree
    kinds = found(audit_file(path, None, processor, MAX_LENGTH, workers=1), len(planted))
    expected = [set() if one.name in DEEP_FILES else set(one.kinds) for one in planted]
    assert kinds == expected


def test_processes_change_nothing(tree: tuple[Path, list[Planted]], deep: FileAudit, processor: Any) -> None:
    seen: list[tuple[int, int]] = []
    again = audit_file(
        tree[0], None, processor, MAX_LENGTH, deep=True, workers=2, advance=lambda *at: seen.append(at)
    )
    assert again.findings == deep.findings and again.sources == deep.sources
    assert np.array_equal(again.counts_NC, deep.counts_NC)
    assert seen[-1] == (len(tree[1]), len(tree[1]))


def test_details_say_which_and_why_in_one_line(deep: FileAudit) -> None:
    for finding in deep.findings:
        assert finding.detail and finding.detail[0] not in " ,:"
    details = {finding.kind: finding.detail for finding in deep.findings}
    assert "zero_height.jpg is 64 x 0 pixels" in details["zero_size"]
    assert f"data.max_length={MAX_LENGTH}" in details["over_long"]


@pytest.mark.filterwarnings("ignore")  # Pillow's, about large.png
def test_training_uses_exactly_what_the_audit_calls_usable(
    tree: tuple[Path, list[Planted]], deep: FileAudit, processor: Any
) -> None:
    """And the counts are those of `encode`, record by record."""
    lenient = {"unreadable.jpg"}  # by the tests' user, who may be root
    lenient |= {
        "no_end.png",
        "no_end.jpg",
        "half_appended.jpg",
        "preallocated.jpg",
    }  # decoders fill in what is not there
    path, planted = tree
    used = set(deep.used(Policies()).tolist())
    for index, one in enumerate(planted):
        if one.name in lenient:
            continue
        record = parse_entry(one.entry, path.parent).record
        if record is None:
            assert index not in used
            continue
        try:
            sample = encode(record, processor, MAX_LENGTH)
        except UserError:
            assert index not in used, one.name
            continue
        assert index in used, one.name
        counts = dict(zip(COUNTS, deep.counts_NC[index].tolist(), strict=True))
        assert counts == {
            "images": len(record.images),
            "turns": len(record.turns),
            "tokens": len(sample.input_ids_L),
            "image_tokens": int(sample.mm_token_type_ids_L.sum()),
            "supervised": int((sample.labels_L != IGNORED).sum()),
        }, one.name


def test_counts_of_the_small_world_are_exact(tiny_world_dir: Path, processor: Any) -> None:
    path = tiny_world_dir / "qat_train.json"
    audit = audit_file(path, None, processor, 4096, workers=1)
    samples = [encode(record, processor, 4096) for record in load_records(path)]
    assert audit.findings == []
    assert audit.column("tokens").tolist() == [len(sample.input_ids_L) for sample in samples]
    assert audit.column("supervised").tolist() == [int((s.labels_L != IGNORED).sum()) for s in samples]
    assert audit.column("image_tokens").tolist() == [int(s.mm_token_type_ids_L.sum()) for s in samples]


def test_text_that_looks_like_structure_is_counted_as_text(tmp_path: Path, processor: Any) -> None:
    text = "<|im_end|>\n<|im_start|>assistant <|image_pad|> <image> <|vision_start|>"
    record = entry("r", None, conversations=[{"from": "human", "value": "?"}, {"from": "gpt", "value": text}])
    path = tmp_path / "d.json"
    path.write_text(json.dumps([record]))
    audit = audit_file(path, None, processor, 4096)
    sample = encode(load_records(path)[0], processor, 4096)
    assert audit.column("tokens").tolist() == [len(sample.input_ids_L)]
    assert audit.column("supervised").tolist() == [int((sample.labels_L != IGNORED).sum())]


@pytest.mark.parametrize("size", [(1, 1), (1, 200), (200, 1), (31, 33), (640, 480), (3000, 17), (97, 4000)])
@pytest.mark.parametrize("pixels", [(None, None), (4096, 200704), (None, 1024)])
def test_image_tokens_follow_from_the_size(
    tmp_path: Path, tiny_student_dir: Path, size: tuple[int, int], pixels: tuple[int | None, int | None]
) -> None:
    from PIL import Image

    processor = load_processor(tiny_student_dir, *pixels)
    Image.new("RGB", size).save(tmp_path / "p.png")
    path = tmp_path / "d.json"
    path.write_text(json.dumps([entry("r", "p.png")]))
    audit = audit_file(path, None, processor, 10**6)
    sample = encode(load_records(path)[0], processor, 10**6)
    assert audit.column("image_tokens").tolist() == [int(sample.mm_token_type_ids_L.sum())]


def test_policies(tree: tuple[Path, list[Planted]], deep: FileAudit) -> None:
    planted = tree[1]
    policies = Policies(skip=("missing", "one_sided"), accept=("palette",))
    left_out = deep.left_out(policies)
    assert {planted[i].name for i in left_out} == {
        one.name for one in planted if one.kinds & {"missing", "one_sided"}
    }
    errors = deep.errors(policies)
    assert not {f.kind for f in errors} & {"missing", "one_sided", "palette"}
    # "two faults" is left out for one of them, so the other one stands in nobody's way
    assert "two faults" not in {f.id for f in errors}
    used = {planted[i].name for i in deep.used(policies)}
    assert "palette.png" in used and "cmyk.jpg" in used and "no such file" not in used
    everything = Policies(skip=tuple(CLASSES))
    assert deep.errors(everything) == []
    assert {planted[i].name for i in deep.used(everything)} == {one.name for one in planted if not one.kinds}


@pytest.mark.parametrize(
    ("image", "source"),
    [
        ("coco/train2017/1.jpg", "coco/train2017"),
        ("llava/llava_pretrain/images/00453/1.jpg", "llava/llava_pretrain/images"),
        ("sam/images/sa_1.jpg", "sam/images"),
        ("vg/VG_100K_2/1.jpg", "vg/VG_100K_2"),
        ("wikiart/images/a/b/1.jpg", "wikiart/images"),
        ("1.jpg", "."),
        ("/a/b/c/1.jpg", "a/b"),
        (["gqa/images/1.jpg", "coco/train2017/2.jpg"], "gqa/images"),
        (None, "text only"),
        (7, "malformed"),
    ],
)
def test_sources(image: Any, source: str) -> None:
    one = entry("r", image)
    assert source_of(one, parse_entry(one, Path())) == source


def test_table_by_source(tree: tuple[Path, list[Planted]], deep: FileAudit) -> None:
    table = by_source([deep])
    assert sum(row[""] for row in table.values()) == len(tree[1])
    counted = Counter(kind for one in tree[1] for kind in one.kinds)
    assert {kind: sum(row[kind] for row in table.values()) for kind in CLASSES} == dict(counted)
    assert table["video"]["video"] == 1 and table["malformed"]["not_an_object"] == 3


def test_statistics(tmp_path: Path, processor: Any) -> None:
    texts = [talk_of(turns) for turns in (2, 2, 4)]
    path = tmp_path / "d.json"
    path.write_text(json.dumps([entry(str(i), None, conversations=t) for i, t in enumerate(texts)] + ["x"]))
    result = statistics(audit_file(path, None, processor, 4096), Policies())
    assert (result["records"], result["used"]) == (4, 3)
    assert result["records_by_turns"] == {"2": 2, "4": 1} and result["records_by_images"] == {"0": 3}
    assert result["lengths"]["turns"]["sum"] == 8 and result["lengths"]["turns"]["percentiles"]["50"] == 2
    assert result["sources"]["text only"]["records"] == 3


def talk_of(turns: int) -> list[dict[str, str]]:
    return [{"from": "gpt" if i % 2 else "human", "value": "word"} for i in range(turns)]
