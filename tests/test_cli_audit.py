"""`grace data audit` and `grace data stats` from outside, and training that honours the same policies."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from planted_faults import JPEG, entry, plant, talk

from grace import cli
from grace.config import load_recipe
from grace.data.audit_list import list_path, summary_path
from grace.data.faults import CLASSES
from grace.data.records import load_records
from grace.data.sampler import step_indices, visits
from grace.data.template import IGNORED, encode
from grace.errors import UserError
from grace.export.pack import parity_records
from grace.models.processor import load_processor
from grace.plan import plan
from grace.run_data import load_run_data, require_same_on_all_ranks
from grace.train import train

RECIPE = "small_world/qat_w4.yaml"


@pytest.fixture
def mixed(tmp_path: Path, tiny_student_dir: Path) -> Any:
    """Ten records, of which 2 and 7 have no picture and 4 has no answer; and the arguments to use them."""
    (tmp_path / "data" / "coco").mkdir(parents=True)
    entries = [entry(f"r{i}", f"coco/{i}.jpg") for i in range(10)]
    entries[4]["conversations"] = entries[4]["conversations"][:1]
    for i in set(range(10)) - {2, 7}:
        (tmp_path / "data" / "coco" / f"{i}.jpg").write_bytes(JPEG)
    path = tmp_path / "data" / "train.json"
    path.write_text(json.dumps(entries))

    def arguments(*extra: str) -> list[str]:
        return [
            RECIPE, f"data.path={path}", "data.validation_path=null", f"student.path={tiny_student_dir}",
            "run.max_steps=null", "optim.batch_size=3", "optim.epochs=1.5", f"run.output_dir={tmp_path / 'run'}",
            *extra,
        ]  # fmt: skip

    return arguments


def audit(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any], str]:
    capsys.readouterr()
    code = cli.main(["data", "audit", *arguments, "--json"])
    out, err = capsys.readouterr()
    return code, json.loads(out), err


SKIP = "data.skip=[missing,one_sided]"


def test_errors_are_one_line_with_counts_and_the_list(mixed: Any, tmp_path: Path, capsys: Any) -> None:
    code, report, err = audit(capsys, *mixed())
    path = tmp_path / "data" / "train.audit.jsonl"
    assert code == 2 and err.count("\n") == 1 and err.startswith("error: 3 records have faults")
    assert "missing 2" in err and "unanswered 1" in err and str(path) in err and "data.skip" in err
    assert report["errors"] == {"one_sided": 1, "unanswered": 1, "missing": 2}
    assert report["sources"]["coco"] == {"records": 10, "faults": report["errors"]}
    assert report["run"]["records"] == 7  # what could be trained on
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["id"], line["index"], line["class"]) for line in lines] == [
        ("r2", 2, "missing"), ("r4", 4, "unanswered"), ("r4", 4, "one_sided"), ("r7", 7, "missing"),
    ]  # fmt: skip


def test_skipped_classes_pass_and_the_run_is_counted_exactly(mixed: Any, capsys: Any) -> None:
    code, report, err = audit(capsys, *mixed(SKIP))
    assert (code, err) == (0, "")
    assert report["left_out"] == {"missing": 2, "one_sided": 1}
    recipe = load_recipe(RECIPE, mixed(SKIP)[1:])
    processor = load_processor(recipe.student.path)
    records = load_run_data(recipe, processor).records
    assert [record.id for record in records] == ["r0", "r1", "r3", "r5", "r6", "r8", "r9"]
    samples = [encode(record, processor, 4096) for record in records]
    steps = report["run"]["steps"]
    assert steps == 4  # 1.5 epochs of 7 records, 3 at a time
    seen = [i for step in range(steps) for i in step_indices(step, 3, 7, recipe.run.seed)]
    for name, of in {
        "tokens": lambda s: len(s.input_ids_L),
        "image_tokens": lambda s: int(s.mm_token_type_ids_L.sum()),
        "supervised": lambda s: int((s.labels_L != IGNORED).sum()),
    }.items():
        assert report["run"][name] == sum(of(s) for s in samples)
        assert report["run"]["whole_run"][name] == sum(of(samples[i]) for i in seen)


def test_training_takes_the_steps_and_records_that_the_audit_names(
    mixed: Any, tmp_path: Path, capsys: Any
) -> None:
    _, report, _ = audit(capsys, *mixed(SKIP))
    train(load_recipe(RECIPE, mixed(SKIP, "run.log_every=1")[1:]))
    err = capsys.readouterr().err
    assert "left out by data.skip: 3 records (missing 2, one_sided 1)" in err
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert sum("loss/total" in json.loads(line) for line in lines) == report["run"]["steps"]


def test_training_refuses_what_the_policies_do_not_cover(mixed: Any, tmp_path: Path, capsys: Any) -> None:
    def refusal(*extra: str) -> str:
        with pytest.raises(UserError) as caught:
            train(load_recipe(RECIPE, mixed(*extra)[1:]))
        return str(caught.value)

    assert "record r4 does not end with a gpt turn" in refusal()
    assert "there is no audit at" in refusal(SKIP)
    assert "did you mean missing?" in refusal("data.skip=mising")
    assert audit(capsys, *mixed(SKIP))[0] == 0
    assert "counted tokens" in refusal("data.skip=[missing,over_long]", "data.max_length=99")
    assert "record r4" in refusal("data.skip=missing")
    path = tmp_path / "data" / "train.json"
    path.write_text(path.read_text() + " ")
    assert "not of" in refusal(SKIP)
    assert "not of" in refusal(SKIP, "run.output_dir=" + str(tmp_path / "other"))


def test_classes_seen_in_the_record_need_no_audit(mixed: Any, tmp_path: Path) -> None:
    recipe = load_recipe(RECIPE, mixed("data.skip=one_sided")[1:])
    data = load_run_data(recipe)
    assert len(data.records) == 9 and data.left_out == {"one_sided": 1}
    assert data.notes() == ["left out by data.skip: 1 records (one_sided 1)"]


def test_nothing_left_is_an_error(mixed: Any, capsys: Any) -> None:
    everything = f"data.skip=[{','.join(CLASSES)}]"
    code, report, err = audit(capsys, *mixed(everything, "data.max_length=1"))
    assert code == 2 and report["run"] == {"records": 0, "steps": 0} and "no record of" in err
    with pytest.raises(UserError, match="leaves no record"):
        train(load_recipe(RECIPE, mixed(everything, "data.max_length=1")[1:]))


def test_plan_and_parity_gate_take_the_same_records(mixed: Any, tmp_path: Path, capsys: Any) -> None:
    assert audit(capsys, *mixed(SKIP))[0] == 0
    recipe = load_recipe(RECIPE, mixed(SKIP)[1:])
    planned = plan(recipe)
    assert planned["data"]["records"] == 7 and planned["schedule"]["steps"] == 4
    source: Any = SimpleNamespace(recipe=asdict(recipe), directory=tmp_path)
    kept = [record.id for record in parity_records(source, None, None, tmp_path)]
    assert kept == ["r0", "r1", "r3", "r5", "r6", "r8", "r9"][: len(kept)] and len(kept) > 2


def test_validation_is_audited_and_left_out_alike(mixed: Any, tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "data" / "validation.json"
    path.write_text(json.dumps([entry("v0", "coco/0.jpg"), entry("v1", "coco/2.jpg")]))
    given = mixed(SKIP, f"data.validation_path={path}")
    code, report, _ = audit(capsys, *given)
    assert (code, report["records"], report["validation_records"]) == (0, 12, 1)
    assert report["left_out"] == {"missing": 3, "one_sided": 1}
    data = load_run_data(load_recipe(RECIPE, given[1:]))
    assert [record.id for record in data.validation] == ["v0"] and len(data.records) == 7


def test_the_planted_tree_in_words(tmp_path: Path, tiny_student_dir: Path, capsys: Any) -> None:
    path, planted = plant(tmp_path / "tree")
    given = [RECIPE, f"data.path={path}", "data.validation_path=null", f"student.path={tiny_student_dir}"]
    out = tmp_path / "lists"
    assert (
        cli.main(["data", "audit", *given, "data.max_length=2000", "--out", f"{out}/", "--workers", "2"]) == 2
    )
    text, err = capsys.readouterr()
    assert err.count("\n") == 1 and "data.accept" in err
    for kind in {kind for one in planted for kind in one.kinds}:
        assert f"{kind} " in text
    assert {file.name for file in out.iterdir()} == {"records.audit.jsonl", "records.audit.summary.json"}
    skip = f"data.skip=[{','.join(CLASSES)}]"
    assert cli.main(["data", "audit", *given, "data.max_length=2000", skip, "--out", str(out)]) == 0
    assert f"{len(planted):,} read" in capsys.readouterr().out
    recipe = load_recipe(
        RECIPE, [*given[1:], skip, "data.max_length=2000", f"data.audit={out}/records.audit.jsonl"]
    )
    data = load_run_data(recipe, load_processor(tiny_student_dir))
    assert len(data.records) == sum(not one.kinds for one in planted)
    for record in data.records:
        encode(record, load_processor(tiny_student_dir), 2000)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (["data.path=/nowhere.json"], "does not exist"),
        (["data.skip=[1]"], "list of names"),
        (["student.path=/nowhere"], "no processor"),
        (["data.skip=truncatd"], "did you mean truncated"),
    ],
)
def test_wrong_input_is_one_line(mixed: Any, capsys: Any, change: list[str], reason: str) -> None:
    for command in ("audit", "stats"):
        assert cli.main(["data", command, *mixed(*change)]) == 2
        out, err = capsys.readouterr()
        assert not out and err.count("\n") == 1 and reason in err


def test_out_that_would_overwrite_something(mixed: Any, tmp_path: Path, capsys: Any) -> None:
    before = (tmp_path / "data" / "train.json").read_bytes()
    assert cli.main(["data", "audit", *mixed(), "--out", str(tmp_path / "data" / "train.json")]) == 2
    assert "overwrite the annotations" in capsys.readouterr().err
    assert (tmp_path / "data" / "train.json").read_bytes() == before


def test_a_list_elsewhere_says_how_training_finds_it(mixed: Any, tmp_path: Path, capsys: Any) -> None:
    code, _, err = audit(capsys, *mixed(SKIP), "--out", str(tmp_path / "list.jsonl"))
    assert code == 0 and err == f"for training to find this list: data.audit={tmp_path / 'list.jsonl'}\n"
    with pytest.raises(UserError, match="there is no audit"):
        load_run_data(load_recipe(RECIPE, mixed(SKIP)[1:]))
    given = mixed(SKIP, f"data.audit={tmp_path / 'list.jsonl'}")
    assert len(load_run_data(load_recipe(RECIPE, given[1:])).records) == 7


def test_processes_that_read_different_records_are_stopped(mixed: Any, monkeypatch: Any) -> None:
    data = load_run_data(load_recipe(RECIPE, mixed("data.skip=one_sided")[1:]))
    two = SimpleNamespace(num_processes=2)
    monkeypatch.setattr("grace.run_data.gather_object", lambda mine: [*mine, *mine])
    require_same_on_all_ranks(data, two)  # type: ignore[arg-type]
    monkeypatch.setattr("grace.run_data.gather_object", lambda mine: [*mine, "other"])
    with pytest.raises(UserError, match="different records"):
        require_same_on_all_ranks(data, two)  # type: ignore[arg-type]
    require_same_on_all_ranks(data, SimpleNamespace(num_processes=1))  # type: ignore[arg-type]


def test_stats(mixed: Any, capsys: Any) -> None:
    assert cli.main(["data", "stats", *mixed(), "--json"]) == 0
    (result,) = json.loads(capsys.readouterr().out).values()
    assert (result["records"], result["used"], result["records_by_images"]) == (10, 7, {"1": 7})
    assert result["sources"]["coco"]["records"] == 7
    assert cli.main(["data", "stats", *mixed()]) == 0
    assert "coco" in capsys.readouterr().out


@pytest.mark.slow
def test_a_killed_audit_leaves_no_list_that_training_takes(mixed: Any, tmp_path: Path, capsys: Any) -> None:
    """Killed at several moments; each time either nothing is there or training refuses or takes it whole."""
    command = [sys.executable, "-m", "grace", "data", "audit", *mixed(SKIP)]
    path = list_path(tmp_path / "data" / "train.json")
    for moment in (0.5, 3.0, 4.0):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(moment)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        if path.exists() and summary_path(path).exists():
            assert len(load_run_data(load_recipe(RECIPE, mixed(SKIP)[1:])).records) == 7
    assert audit(capsys, *mixed(SKIP))[0] == 0


@pytest.mark.slow
def test_workers_end_with_the_process_they_work_for(tmp_path: Path, tiny_student_dir: Path) -> None:
    path = tmp_path / "d.json"
    path.write_text(
        json.dumps(
            [
                entry(f"r{i}", None, conversations=talk(("human", "?"), ("gpt", "word " * 2000)))
                for i in range(9000)
            ]
        )
    )
    command = [sys.executable, "-m", "grace", "data", "audit", RECIPE, f"data.path={path}", "data.validation_path=null",
               f"student.path={tiny_student_dir}", "--workers", "2"]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while len(children := descendants(process.pid)) < 4 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(children) >= 4  # the resource tracker, the server that forks, and the workers
    process.kill()
    process.communicate(timeout=60)  # waits for all that hold its stderr
    while any(Path(f"/proc/{child}").exists() for child in children) and time.monotonic() < deadline + 30:
        time.sleep(0.05)
    assert not [child for child in children if Path(f"/proc/{child}").exists()]


def descendants(pid: int) -> list[int]:
    """Processes below a process (Linux)."""
    try:
        own = [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return own + [below for one in own for below in descendants(one)]


def test_visits_counts_the_stream() -> None:
    for steps, batch, n in ((4, 3, 7), (1, 1, 5), (9, 8, 3), (7, 2, 14)):
        stream = [i for step in range(steps) for i in step_indices(step, batch, n, 5)]
        assert visits(steps, batch, n, 5).tolist() == [stream.count(i) for i in range(n)]


def test_records_of_skipped_classes_load_like_the_file_without_them(mixed: Any, tmp_path: Path) -> None:
    recipe = load_recipe(RECIPE, mixed("data.skip=one_sided")[1:])
    entries = json.loads((tmp_path / "data" / "train.json").read_text())
    (tmp_path / "data" / "clean.json").write_text(json.dumps([e for i, e in enumerate(entries) if i != 4]))
    assert load_run_data(recipe).records == load_records(tmp_path / "data" / "clean.json")
