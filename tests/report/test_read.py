"""Runs read back: whole, half-written, damaged, or none at all."""

import json
from pathlib import Path

import pytest

from grace.errors import UserError
from grace.report.read import number, read_lines, read_run, read_runs, short_names


def write_run(folder: Path, steps: int = 3, **values: object) -> Path:
    folder.mkdir(parents=True)
    lines = [
        {"step": step, "loss/total": 4.0 / step, "loss/ce": 1.0, **values} for step in range(1, steps + 1)
    ]
    lines.append(
        {"step": steps, "quant/snr/layers.0.mlp.up_proj": 20.5, "quant/snr/layers.1.mlp.up_proj": None}
    )
    lines.append({"step": steps, "val/ce": 1.5, "val/exact_match": 0.5})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "recipe.yaml").write_text("optim:\n  lr: 0.1\nrun:\n  max_steps: 9\n")
    return folder


def test_finished_run(tmp_path):
    folder = write_run(tmp_path / "a")
    (folder / "model").mkdir()
    run = read_run(folder)
    assert (run.name, run.finished, run.last_step, run.total_steps, run.unreadable) == ("a", True, 3, 9, 0)
    assert [line["loss/total"] for line in run.steps] == [4.0, 2.0, pytest.approx(4 / 3)]
    assert run.validation == [{"step": 3, "val/ce": 1.5, "val/exact_match": 0.5}]
    assert run.snr == {"layers.0.mlp.up_proj": 20.5}


@pytest.mark.parametrize("cut", [1, 2, 10, 30])
def test_half_a_last_line_is_counted_and_left_out(tmp_path, cut):
    folder = write_run(tmp_path / "a")
    log = folder / "metrics.jsonl"
    log.write_bytes(log.read_bytes()[:-cut])
    run = read_run(folder)
    whole = cut == 1  # only the line's end is missing
    assert len(run.steps) == 3 and run.unreadable == (0 if whole else 1)
    assert len(run.validation) == (1 if whole else 0) and not run.finished


def test_garbage_between_the_lines(tmp_path):
    log = tmp_path / "metrics.jsonl"
    good = b'{"step": 1, "loss/total": 1.0}\n'
    bad = [
        b"\xff\xfe\x00\n",
        b"[1, 2]\n",
        b'"text"\n',
        b"{}\n",
        b'{"step": "x"}\n',
        b'{"step": true}\n',
        b"[" * 99999 + b"\n",
    ]
    log.write_bytes(good + b"\n" + b"".join(bad) + good)
    lines, unreadable = read_lines(log)
    assert len(lines) == 2 and unreadable == len(bad)


def test_numbers_that_no_plot_takes(tmp_path):
    huge = 10**400
    (tmp_path / "metrics.jsonl").write_text(
        f'{{"step": 1, "loss/total": {huge}, "a": NaN, "b": true, "c": 2}}\n'
    )
    (run,) = read_runs([tmp_path])
    assert [number(run.steps[0][name]) for name in ("loss/total", "a", "b", "c")] == [None, None, None, 2.0]


def test_audit_of_several_files(tmp_path):
    (tmp_path / "recipe.yaml").write_text(
        f"data: {{path: {{{tmp_path}/a.json: 1, {tmp_path}/b.json: 0.1}}}}\n"
    )
    (tmp_path / "a+1.audit.summary.json").write_text('{"records": 7}')
    assert read_run(tmp_path).audit == {"records": 7}


def test_last_of_two_lines_of_a_step_counts(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 2, "loss/total": 1}\n{"step": 1, "loss/total": 2}\n{"step": 2, "loss/total": 3}\n'
    )
    assert [(line["step"], line["loss/total"]) for line in read_run(tmp_path).steps] == [(1, 2), (2, 3)]


def test_run_that_has_not_logged_yet(tmp_path):
    (tmp_path / "recipe.yaml").write_text("run: {max_steps: 4}\n")
    run = read_run(tmp_path)
    assert (run.steps, run.last_step, run.total_steps, run.written) == ([], 0, 4, None)


@pytest.mark.parametrize("recipe", ["", "[1]", "run: 7", "a: [", "\x00"])
def test_recipe_that_cannot_be_read_is_done_without(tmp_path, recipe):
    folder = write_run(tmp_path / "a")
    (folder / "recipe.yaml").write_text(recipe)
    run = read_run(folder)
    assert len(run.steps) == 3 and run.total_steps is None


def test_what_is_no_run_is_named(tmp_path):
    write_run(tmp_path / "demo" / "arms" / "grace")
    with pytest.raises(UserError, match="there is no"):
        read_run(tmp_path / "absent")
    with pytest.raises(UserError, match="is a file"):
        read_run(tmp_path / "demo" / "arms" / "grace" / "metrics.jsonl")
    with pytest.raises(UserError, match=r"is no run.*there are runs in it: .*grace"):
        read_run(tmp_path / "demo")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="is no run"):
        read_run(tmp_path / "empty")


def test_runs_are_named_apart(tmp_path):
    one, two = write_run(tmp_path / "a" / "run"), write_run(tmp_path / "b" / "run")
    assert [run.name for run in read_runs([one, two])] == ["a/run", "b/run"]
    assert short_names([Path("/x/1"), Path("/x/2")]) == ["1", "2"]
    with pytest.raises(UserError, match="given twice"):
        read_runs([one, one / ".." / "run"])
