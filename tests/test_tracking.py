"""What a run tells: JSONL, the progress line, W&B; and that W&B can break without harm."""

import json
import re
import struct
import sys
import types
from pathlib import Path

import pytest
from PIL import Image

from grace.run_files import METRICS_FILE
from grace.tracking import Tracker, is_timing, rewind_metrics


def lines(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / METRICS_FILE).read_text().splitlines()]


def started(
    run_dir: Path, total: int = 5, every: int = 2, step: int = 0, window: dict | None = None
) -> Tracker:
    tracker = Tracker(run_dir, total, every, is_main=True)
    tracker.start(step, window)
    return tracker


def without_speed(records: list[dict]) -> list[dict]:
    return [{key: value for key, value in record.items() if key != "tokens_per_s"} for record in records]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The tracker's clock: its only element is the time."""
    now = [100.0]
    monkeypatch.setattr("grace.tracking.time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    return now


def test_log_holds_window_means(tmp_path: Path, clock: list[float]) -> None:
    tracker = started(tmp_path)
    for step, loss in enumerate([1.0, 2.0, 5.0, 8.0, 3.0], start=1):
        clock[0] += 2.0
        tracker.add(step, {"loss/total": loss, "optim/lr": 0.1}, tokens=10 * step)
    assert lines(tmp_path) == [
        {"step": 2, "loss/total": 1.5, "optim/lr": 0.1, "tokens_per_s": 30 / 4},
        {"step": 4, "loss/total": 6.5, "optim/lr": 0.1, "tokens_per_s": 70 / 4},
        {"step": 5, "loss/total": 3.0, "optim/lr": 0.1, "tokens_per_s": 50 / 2},  # the rest, at the end
    ]


def test_continued_window_gives_the_same_means_and_an_honest_speed(
    tmp_path: Path, clock: list[float]
) -> None:
    losses = [1.0, 2.0, 4.0, 8.0]
    straight, first = started(tmp_path / "a", 4, 4), started(tmp_path / "b", 4, 4)
    for step, loss in enumerate(losses, start=1):
        clock[0] += 1.0
        straight.add(step, {"loss/total": loss}, 10)
        if step <= 3:
            first.add(step, {"loss/total": loss}, 10)
        if step == 3:
            state = json.loads(json.dumps(first.state()))
    clock[0] += 1000  # the run was down
    second = started(tmp_path / "b", 4, 4, step=3, window=state)
    clock[0] += 1.0
    second.add(4, {"loss/total": losses[3]}, 10)
    assert (
        lines(tmp_path / "b")
        == lines(tmp_path / "a")
        == [{"step": 4, "loss/total": 3.75, "tokens_per_s": 10.0}]
    )


def test_extremes_lists_and_absent_values_of_a_window(tmp_path: Path, clock: list[float]) -> None:
    tracker = started(tmp_path, total=3, every=3)
    steps: list[dict] = [
        {"a_min": 0.5, "a_max": 0.6, "shares": [1.0, 0.0], "sometimes": 4.0},
        {"a_min": 0.2, "a_max": 0.3, "shares": [0.0, 1.0]},
        {"a_min": 0.4, "a_max": 0.9, "shares": [0.5, 0.5], "sometimes": None},
    ]
    for step, values in enumerate(steps, start=1):
        clock[0] += 1.0
        state = json.loads(json.dumps(tracker.state()))
        tracker = started(tmp_path, total=3, every=3, step=step - 1, window=state)  # killed after every step
        tracker.add(step, values, 1, {"at_the_end": float(step), "unknown": None})
    assert without_speed(lines(tmp_path)) == [
        {
            "step": 3,
            "a_min": 0.2,
            "a_max": 0.9,
            "shares": [0.5, 0.5],
            "sometimes": 4.0,
            "at_the_end": 3.0,
            "unknown": None,
        }
    ]


def test_rates_waiting_and_utilisation(tmp_path: Path, clock: list[float]) -> None:
    for peak, mfu in ((None, None), (1000.0, 0.25)):
        tracker = Tracker(tmp_path, 2, 2, is_main=True, peak_flops=peak)
        tracker.start(0, None)
        for step in (1, 2):
            clock[0] += 2.0
            with tracker.aside():
                clock[0] += 100.0  # a validation is not training time
            tracker.add(step, {}, 10, images=3.0, waited=0.5, flops=500.0)
        assert lines(tmp_path) == [
            {"step": 2, "tokens_per_s": 5.0, "perf/images_per_s": 1.5, "perf/data_wait": 0.25,
             "perf/flops_per_s": 250.0, "perf/mfu": mfu}
        ]  # fmt: skip


def test_timings_are_told_from_numbers_that_runs_share() -> None:
    assert is_timing("tokens_per_s") and is_timing("perf/mfu")
    assert not is_timing("loss/total") and not is_timing("data/padding_share")


def test_lines_beyond_the_checkpoint_are_dropped_on_resume(tmp_path: Path) -> None:
    tracker = started(tmp_path, every=1)
    for step in (1, 2, 3):
        tracker.add(step, {"loss/total": step}, 1)
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"step": 4, "loss/to')  # killed while writing
    again = started(tmp_path, every=1, step=2)
    again.add(3, {"loss/total": 30}, 1)
    assert [(r["step"], r["loss/total"]) for r in lines(tmp_path)] == [(1, 1), (2, 2), (3, 30)]


def test_half_a_line_is_dropped_even_when_nothing_else_is(tmp_path: Path) -> None:
    path = tmp_path / METRICS_FILE
    path.write_text('{"step": 1, "x": 1}\n{"step": 2, "x"')
    rewind_metrics(path, 5)
    assert path.read_text() == '{"step": 1, "x": 1}\n'
    path.write_bytes(b'[1]\n\xff\xfe\n{"step": "2"}\nnull\n{"step": 3, "x": 1}\n{"step": 9}\n')
    rewind_metrics(path, 5)
    assert path.read_text() == '{"step": 3, "x": 1}\n'
    rewind_metrics(tmp_path / "absent.jsonl", 5)
    assert not (tmp_path / "absent.jsonl").exists()


def test_new_run_starts_an_empty_log(tmp_path: Path) -> None:
    (tmp_path / METRICS_FILE).write_text('{"step": 7, "x": 1}\n')
    tracker = started(tmp_path, every=1)
    tracker.add(1, {"x": 2.0}, 1)
    assert [record["step"] for record in lines(tmp_path)] == [1]


def test_other_ranks_write_nothing(tmp_path: Path, capsys) -> None:
    tracker = Tracker(tmp_path / "run", 2, 1, is_main=False)
    tracker.start(0, None)
    tracker.start_wandb("offline", "grace", {})
    tracker.add(1, {"loss/total": 1.0}, 1)
    tracker.log(1, {"val/ce": 1.0})
    tracker.finish()
    assert not (tmp_path / "run").exists() and capsys.readouterr() == ("", "")


def test_progress_line_tells_step_losses_speed_and_time_left(
    tmp_path: Path, clock: list[float], capsys
) -> None:
    tracker = started(tmp_path, total=10, every=2, step=4)
    for step in (5, 6):
        clock[0] += 3.0
        tracker.add(step, {"loss/total": 2.5, "loss/ce": 1.25, "ib/beta": 0.5, "optim/lr": 0.1}, 30)
    out, err = capsys.readouterr()
    assert out == ""
    # 3 seconds a step since the resume, 4 steps to go.
    assert re.fullmatch(r"step 6/10  total 2\.5  ce 1\.25  beta 0\.5  tokens_per_s 10  eta 12s\n", err)


def test_terminal_gets_a_progress_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    tracker = started(tmp_path, total=4, every=2, step=1)
    assert tracker.progress is not None
    tracker.add(2, {"loss/total": 2.5}, 30)
    task = tracker.progress.tasks[0]
    assert (task.completed, task.total) == (2, 4) and "total 2.5" in task.fields["note"]
    tracker.finish()
    assert tracker.progress.finished is False
    assert "step 2/4" not in capsys.readouterr().err  # no plain lines beside the bar


# ---------------------------------------------------------------- W&B


def offline_records(run_dir: Path) -> list:
    """Everything in the run's `.wandb` file (a LevelDB log of messages), as W&B's own records."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = run_dir.glob("wandb/offline-run-*/run-*.wandb")
    data, records, parts, place = file.read_bytes(), [], b"", 7
    assert data.startswith(b":W&B")
    while place < len(data):
        left = 32768 - place % 32768  # a piece never crosses a block
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole message, or the last piece of one
            record = Record()
            record.ParseFromString(parts)
            records.append(record)
            parts = b""
    return records


@pytest.mark.slow
def test_offline_run_holds_history_and_a_sample_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_MODE", "WANDB_DIR", "WANDB_RUN_ID", "WANDB_DISABLED"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "staging"))  # else pictures go to the home directory
    import wandb

    tracker = started(tmp_path, total=2, every=1)
    tracker.start_wandb("offline", "grace", {"optim": {"lr": 0.5}})
    assert tracker.run is not None
    tracker.add(1, {"loss/total": 4.0}, 10)
    tracker.add(2, {"loss/total": 3.0}, 10)
    rows = [[Image.new("RGB", (8, 8), "red"), "What colour?", "red", "blue"], [None, "1 + 1?", "2", "2"]]
    tracker.log_samples(2, rows)
    tracker.log(2, {"val/ce": 1.5})
    tracker.finish()
    wandb.teardown()  # its service writes the file out
    records = offline_records(tmp_path)
    history = [
        {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.HasField("history")
    ]
    assert [(row["_step"], row["loss/total"]) for row in history] == [(1, 4.0), (2, 3.0)]
    assert history[1]["val/ce"] == 1.5 and history[1]["samples.nrows"] == 2
    (table_file,) = tmp_path.glob("wandb/offline-run-*/files/media/table/samples*.table.json")
    table = json.loads(table_file.read_text())
    assert table["columns"] == ["image", "question", "answer", "prediction"]
    assert [row[1:] for row in table["data"]] == [row[1:] for row in rows]
    (artifact,) = (record.artifact for record in records if record.HasField("artifact"))
    assert sorted(Path(entry.path).suffix for entry in artifact.manifest.contents) == [".json", ".png"]
    run_id = (tmp_path / "wandb_id.txt").read_text()
    assert next(record.run.run_id for record in records if record.HasField("run")) == run_id
    assert without_speed(lines(tmp_path)) == [
        {"step": 1, "loss/total": 4.0},
        {"step": 2, "loss/total": 3.0},
        {"step": 2, "val/ce": 1.5},
    ]


class FakeRun:
    """A W&B run that remembers its logs and fails where it is told to."""

    def __init__(self, broken: str = ""):
        self.broken, self.logs, self.finished = broken, [], False

    def log(self, values: dict, step: int) -> None:
        if self.broken == "log":
            raise ConnectionError("no route")
        self.logs.append((step, values))

    def finish(self) -> None:
        self.finished = True
        if self.broken == "finish":
            raise ConnectionError("no route")


def fake_wandb(run: FakeRun, calls: list[dict], broken: str = "") -> types.ModuleType:
    module = types.ModuleType("wandb")

    def init(**settings: object) -> FakeRun:
        calls.append(settings)
        if broken == "init":
            raise RuntimeError("not logged in")
        return run

    module.init = init  # type: ignore[attr-defined]
    return module


@pytest.mark.parametrize("broken", ["import", "init", "log", "finish", "table"])
def test_broken_wandb_never_stops_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, broken: str
) -> None:
    # The fake has no Table, so samples always fail.
    module = None if broken == "import" else fake_wandb(FakeRun(broken), [], broken)
    monkeypatch.setitem(sys.modules, "wandb", module)
    tracker = started(tmp_path, total=2, every=1)
    tracker.start_wandb("online", "grace", {})
    tracker.add(1, {"loss/total": 4.0}, 10)
    tracker.log_samples(1, [[None, "q", "a", "p"]])
    tracker.add(2, {"loss/total": 3.0}, 10)
    tracker.finish()
    assert without_speed(lines(tmp_path)) == [{"step": 1, "loss/total": 4.0}, {"step": 2, "loss/total": 3.0}]
    assert "training goes on" in capsys.readouterr().err


def test_continued_run_keeps_its_wandb_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict] = []
    run = FakeRun()
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb(run, calls))
    for step in (0, 1):
        tracker = started(tmp_path, total=2, every=1, step=step)
        tracker.start_wandb("online", "my-project", {"run": {"seed": 3}})
        tracker.add(step + 1, {"loss/total": 4.0}, 10)
        tracker.finish()
    assert len({call["id"] for call in calls}) == 1 and calls[0]["resume"] == "allow"
    assert calls[0]["project"] == "my-project" and calls[0]["config"] == {"run": {"seed": 3}}
    assert [step for step, _ in run.logs] == [1, 2] and run.finished


def test_disabled_wandb_is_not_even_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    tracker = started(tmp_path)
    tracker.start_wandb("disabled", "grace", {})
    assert tracker.run is None and capsys.readouterr().err == ""
