"""Parts of the data, and the wrong lessons of noisy teachers."""

import json
from pathlib import Path

from grace.data.questions import RESULTS, SHORT_KINDS
from grace.study.data import NOISES, QUICK, Noise, mislead, question_kind, write_world


def records(path: Path) -> list[dict]:
    return json.loads(path.read_text())


def test_no_record_is_in_two_parts(study_dir: Path) -> None:
    parts = [records(path) for path in sorted((study_dir / "world").glob("train_*.json"))]
    assert [len(part) for part in parts] == [QUICK.part] * 5  # three seeds and two to tune on
    ids = [record["id"] for part in parts for record in part]
    assert len(set(ids)) == len(ids)


def test_what_is_there_is_left_alone(study_dir: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (study_dir / "world").iterdir()}
    write_world(study_dir, QUICK)
    assert before == {path: path.stat().st_mtime_ns for path in (study_dir / "world").iterdir()}


def test_kinds_are_told_by_the_wording(study_dir: Path) -> None:
    """Against the kinds that the ids of the test split end in."""
    for record in records(study_dir / "world" / "test.json"):
        kind = record["id"].rsplit("-", 1)[-1]
        found = question_kind(record["conversations"][0]["value"])
        assert found == (kind if kind in SHORT_KINDS else None)
    assert question_kind("What is 3 plus 4?") is None
    assert question_kind("Which is greater, 3 or 4?") is None


def told(record: dict) -> list[tuple[str | None, str]]:
    turns = record["conversations"]
    return [(question_kind(q["value"]), a["value"]) for q, a in zip(turns[0::2], turns[1::2], strict=True)]


def test_all_wrong_by_one(study_dir: Path) -> None:
    lessons = records(study_dir / "world" / "teacher_answer.json")
    noise = Noise(("position", "sum"), 1.0, next=True)
    seen = 0
    for before, after in zip(lessons, mislead(lessons, noise), strict=True):
        assert {**before, "conversations": None} == {**after, "conversations": None}
        for (kind, right), (_, wrong) in zip(told(before), told(after), strict=True):
            if kind not in noise.kinds:
                assert wrong == right
                continue
            seen += 1
            results = RESULTS[kind]
            result = right.split()[-1]
            expected = results[(results.index(result) + 1) % len(results)]
            assert wrong == right.removesuffix(result) + expected
    assert seen > 10


def test_a_share_is_wrong_the_same_every_time(study_dir: Path) -> None:
    lessons = records(study_dir / "world" / "teacher_answer.json") * 8
    noise = NOISES["unsure"]
    after = mislead(lessons, noise)
    assert after == mislead(lessons, noise)
    pairs = [
        (right != wrong) for one, two in zip(lessons, after, strict=True)
        for (kind, right), (_, wrong) in zip(told(one), told(two), strict=True) if kind in noise.kinds
    ]  # fmt: skip
    assert abs(sum(pairs) / len(pairs) - noise.share) < 0.1
