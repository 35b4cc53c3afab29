"""`grace generate --batch`: every request answered once, whatever interrupts it, and bad lines named before loading."""

import argparse
import fcntl
import json
from pathlib import Path

import pytest

from grace.errors import UserError
from grace.runtime import batch
from grace.runtime.batch import read_requests, run_batch
from grace.runtime.engine import Engine, load
from grace.runtime.sampling import Sampling

GREEDY = Sampling(max_new_tokens=6)


@pytest.fixture(scope="module")
def engine(awq_dir: Path) -> Engine:
    return load(awq_dir, rows=2)


@pytest.fixture(scope="module")
def pictures(tiny_world_dir: Path) -> list[str]:
    return [str(path) for path in sorted(tiny_world_dir.rglob("*.png"))[:3]]


def write(path: Path, entries: list) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def run(
    path: Path, out: Path, monkeypatch: pytest.MonkeyPatch, engine: Engine, sampling: Sampling = GREEDY
) -> int:
    monkeypatch.setattr(batch, "load", lambda *a, **k: engine)
    args = argparse.Namespace(
        batch=path, out=out, system=None, rows=2, json=False, directory=Path("x"), kernel="auto", head="bf16",
        context=None, device=None,
    )  # fmt: skip
    return run_batch(args, sampling)


def answers_in(out: Path) -> dict[str, dict]:
    return {entry["id"]: entry for entry in map(json.loads, out.read_text().splitlines())}


@pytest.fixture
def requests(tmp_path: Path, pictures: list[str]) -> Path:
    return write(
        tmp_path / "in.jsonl",
        [
            {"id": "text", "prompt": "Say yes"},
            {"id": 2, "prompt": "Which digit is in the top left cell?", "image": pictures[0]},
            {"prompt": "First <image> then <image>", "images": pictures[1:]},
            {"id": "chat", "messages": [{"role": "system", "content": "Be brief."},
                                        {"role": "user", "content": "yes"}, {"role": "assistant", "content": "no"},
                                        {"role": "user", "content": "yes"}]},
            {"id": "long", "prompt": "List all digits", "max_new_tokens": 15},
            {"id": "drawn", "prompt": "Say no", "temperature": 1.5, "seed": 3, "stop": "zzz"},
        ],
    )  # fmt: skip


def test_answers_are_those_of_single_prompts(requests, tmp_path, monkeypatch, engine, pictures, awq_dir):
    out = tmp_path / "new" / "out.jsonl"
    assert run(requests, out, monkeypatch, engine) == 0
    found = answers_in(out)
    assert set(found) == {"text", "2", "3", "chat", "long", "drawn"}
    alone = load(awq_dir)
    for name, images, prompt, sampling in [
        ("text", [], "Say yes", GREEDY),
        ("2", pictures[:1], "Which digit is in the top left cell?", GREEDY),
        ("3", pictures[1:], "First <image> then <image>", GREEDY),
        ("long", [], "List all digits", Sampling(max_new_tokens=15)),
        ("drawn", [], "Say no", Sampling(max_new_tokens=6, temperature=1.5, seed=3)),
    ]:
        expected = alone.generate(images, prompt, sampling=sampling)
        assert found[name]["tokens"] == expected.tokens and found[name]["text"] == expected.text
        assert found[name]["finish_reason"] == expected.finish_reason
        assert found[name]["prompt_tokens"] == expected.prompt_tokens


def test_it_goes_on_after_a_kill(requests, tmp_path, monkeypatch, engine):
    out = tmp_path / "out.jsonl"
    run(requests, out, monkeypatch, engine)
    whole = answers_in(out)
    lines = out.read_bytes().splitlines(keepends=True)
    out.write_bytes(b"".join(lines[:3]) + lines[3][:20])  # killed in the middle of the fourth
    monkeypatch.setattr(Engine, "encode", _counting(calls := []))
    assert run(requests, out, monkeypatch, engine) == 0
    assert len(calls) == 3 and answers_in(out) == whole
    assert len(out.read_text().splitlines()) == 6
    monkeypatch.setattr(batch, "load", lambda *a, **k: pytest.fail("loaded, with nothing to do"))


def _counting(calls: list, real=Engine.encode):
    def encode(self, *args):
        calls.append(args)
        return real(self, *args)

    return encode


def test_failures_are_told_and_tried_again(tmp_path, monkeypatch, engine, pictures):
    path = write(tmp_path / "in.jsonl", [
        {"id": "a", "prompt": "x", "image": str(tmp_path / "later.png")}, {"id": "b", "prompt": "Say yes"},
        {"id": "c", "prompt": "word " * 5000},
    ])  # fmt: skip
    out = tmp_path / "out.jsonl"
    with pytest.raises(UserError, match="2 of 3 requests failed"):
        run(path, out, monkeypatch, engine)
    found = answers_in(out)
    assert (
        "no such file" in found["a"]["error"]
        and "tokens" in found["c"]["error"]
        and found["b"]["text"] is not None
    )
    (tmp_path / "later.png").write_bytes(Path(pictures[0]).read_bytes())
    with pytest.raises(UserError, match="1 of 3 requests failed"):
        run(path, out, monkeypatch, engine)
    assert "error" not in answers_in(out)["a"] and len(out.read_text().splitlines()) == 5


def test_answers_to_other_questions_are_not_taken_over(tmp_path, monkeypatch, engine):
    out = tmp_path / "out.jsonl"
    path = write(tmp_path / "in.jsonl", [{"id": "a", "prompt": "Say yes"}])
    run(path, out, monkeypatch, engine)
    with pytest.raises(UserError, match="with other settings: choose another --out"):
        run(path, out, monkeypatch, engine, Sampling(max_new_tokens=7))
    write(path, [{"id": "a", "prompt": "Say no"}])
    with pytest.raises(UserError, match="another request with the id 'a'"):
        run(path, out, monkeypatch, engine)
    out.write_text("notes of mine\n")
    with pytest.raises(UserError, match="line 1, is not an answer"):
        run(path, out, monkeypatch, engine)
    assert out.read_text() == "notes of mine\n"
    for notes in (
        "notes of mine",
        json.dumps({"id": "b", "prompt": "x"}),
        '{"id":1}\n{"id": "b", "prompt": "x"}',
    ):
        out.write_text(notes)
        with pytest.raises(UserError, match="choose another --out"):
            run(path, out, monkeypatch, engine)
        assert out.read_text() == notes
    before = path.read_text()
    with pytest.raises(UserError, match="holds the requests"):
        run(path, path, monkeypatch, engine)
    assert path.read_text() == before


def test_one_writer_at_a_time(tmp_path, monkeypatch, engine):
    path, out = write(tmp_path / "in.jsonl", [{"prompt": "x"}]), tmp_path / "out.jsonl"
    with out.open("a+b") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="in use by another run"):
            run(path, out, monkeypatch, engine)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2"),
        ("[]", "a JSON object is needed"),
        ('{"prompt": "x", "promt": "y"}', "unknown field 'promt'"),
        ('{"id": "b"}', 'one of "prompt" and "messages"'),
        ('{"prompt": "x", "messages": []}', 'one of "prompt" and "messages"'),
        ('{"prompt": 5}', '"prompt" must be a text'),
        ('{"prompt": " "}', "prompt is empty"),
        ('{"prompt": "x", "images": [1]}', "list of files"),
        ('{"prompt": "x", "images": ["-"]}', "list of files"),
        ('{"prompt": "x", "temperature": "warm"}', '"temperature" must be a number'),
        ('{"prompt": "x", "temperature": -1}', "out of range"),
        ('{"prompt": "x", "max_new_tokens": 1.5}', "whole number"),
        ('{"prompt": "x", "seed": true}', "whole number"),
        ('{"prompt": "x", "stop": [1]}', '"stop" must be'),
        ('{"id": null, "prompt": "x"}', "id must be"),
        (r'{"prompt": "x\ud800"}', "surrogates not allowed"),
        (r'{"id": "\ud800", "prompt": "x"}', "surrogates not allowed"),
        ('{"prompt": "x", "temperature": 1' + "0" * 400 + "}", "too large"),
        ('{"prompt": ' + "[" * 100_000, "recursion"),
        ('{"id": "a", "prompt": "x"}', "occurs twice"),
        ('{"messages": [{"role": "tool", "content": "x"}]}', "role"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', "must be the user's"),
    ],
)
def test_bad_lines_are_named_before_anything_is_loaded(line: str, message: str, tmp_path: Path):
    path = tmp_path / "in.jsonl"
    path.write_text('{"id": "a", "prompt": "x"}\n' + line + "\n")
    with pytest.raises(UserError, match=message) as caught:
        read_requests(path, GREEDY)
    assert "line 2" in str(caught.value) and "\n" not in str(caught.value)


def test_a_text_may_hold_any_line_end(tmp_path: Path):
    path = tmp_path / "in.jsonl"
    text = "a\u2028b\x85c\x0bd"
    path.write_text(json.dumps({"prompt": text}, ensure_ascii=False) + "\r\n", encoding="utf-8")
    assert [request.turns[0].text for request in read_requests(path, GREEDY)] == [text]


def test_files_that_hold_no_requests(tmp_path: Path):
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    for name, message in (("none", "No such file"), ("empty", "holds no requests"), ("binary", "not UTF-8")):
        with pytest.raises(UserError, match=message):
            read_requests(tmp_path / name, GREEDY)
