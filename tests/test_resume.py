"""Runs that are killed, asked to stop, or started again otherwise: nothing is lost but steps, and no number changes."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import two_ranks
from safetensors.torch import load_file

from grace.config import load_recipe
from grace.errors import PREEMPTED_CODE, UserError
from grace.resume_checkpoint import checkpoint_paths
from grace.tracking import is_timing
from grace.train import main, train

RECIPE = "small_world/grace_w4.yaml"
STEPS, KILLS = 40, 20


@pytest.fixture
def overrides(
    tiny_world_dir: Path, tiny_student_dir: Path, tiny_teacher_dir: Path
) -> Callable[..., list[str]]:
    def make(out: Path, *extra: str) -> list[str]:
        return [
            f"run.output_dir={out}", f"data.path={tiny_world_dir / 'qat_train.json'}", "data.validation_path=null",
            f"student.path={tiny_student_dir}", f"teacher.path={tiny_teacher_dir}", "optim.batch_size=4",
            "run.micro_batch_size=4", "run.log_every=1", "run.save_every=2", *extra,
        ]  # fmt: skip

    return make


def run_in_child(arguments: list[str], log: str) -> None:
    """A whole process of `python -m grace.train`, for a server that has imported it already."""
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of loaders: as a process that nobody served
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.exit(main([RECIPE, *arguments]))


@pytest.fixture(scope="module")
def start() -> Callable[[list[str], Path], multiprocessing.Process]:
    """Starts a run in a process of its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["grace.train"])

    def begin(arguments: list[str], log: Path) -> multiprocessing.Process:
        process = context.Process(target=run_in_child, args=(arguments, str(log)))
        process.start()
        return process  # type: ignore[return-value]

    return begin


def same_end(one: Path, two: Path) -> None:
    """The same log but for times, and the same weights to the bit."""
    lines = [
        [{k: v for k, v in json.loads(line).items() if not is_timing(k)} for line in text.splitlines()]
        for text in ((path / "metrics.jsonl").read_text() for path in (one, two))
    ]
    assert lines[0] == lines[1]
    states = [load_file(path / "model/grace_qat/state.safetensors") for path in (one, two)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def wait_for(condition: Callable[[], bool], process: multiprocessing.Process, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.0005)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_twenty_kills_change_nothing(tmp_path: Path, overrides, start) -> None:
    """SIGKILL at random moments, every fourth one while a checkpoint is being written; loader processes included."""
    extra = [f"run.max_steps={STEPS}", "data.num_workers=1"]
    log, killed = tmp_path / "log", tmp_path / "killed"
    straight = start(overrides(tmp_path / "straight", *extra), log)
    straight.join(300)
    assert straight.exitcode == 0, log.read_text()[-2000:]
    chance = random.Random(0)
    for kill in range(KILLS):
        process = start(overrides(killed, *extra), log)
        done = (
            len((killed / "metrics.jsonl").read_text().splitlines())
            if (killed / "metrics.jsonl").exists()
            else 0
        )
        # Somewhere in what twenty runs that lose their last steps can do of the forty.
        target = min(STEPS - 1, max(done, int(STEPS * kill / KILLS)) + chance.randrange(3))

        def reached(target: int = target) -> bool:
            path = killed / "metrics.jsonl"
            return path.exists() and path.read_bytes().count(b"\n") >= target

        wait_for(reached, process)
        if kill % 4 == 0:
            wait_for(lambda: any(killed.glob("checkpoints/.step-*")), process, seconds=2)
        else:
            time.sleep(chance.random() * 0.05)
        assert process.pid is not None
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, log.read_text()[-2000:]
    last = start(overrides(killed, *extra), log)
    last.join(300)
    assert last.exitcode == 0, log.read_text()[-2000:]
    same_end(tmp_path / "straight", killed)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_then_one_then_two(tmp_path: Path, overrides, start) -> None:
    """Killed and gone on with on another number of processes: the curve of the run that never stopped."""
    extra = [
        "run.max_steps=12",
        "optim.batch_size=7",
        "run.micro_batch_size=2",
        "run.keep_last=9",
        "optim.lr=3e-5",
    ]
    train(load_recipe(RECIPE, overrides(tmp_path / "straight", *extra)))
    run_dir, log = tmp_path / "run", tmp_path / "log"

    def saved(steps: int) -> Callable[[], bool]:
        return lambda: len(checkpoint_paths(run_dir)) >= steps // 2

    command = ["-m", "grace.train", RECIPE, *overrides(run_dir, *extra)]
    pair = two_ranks.start(command, log, environment={"ACCELERATE_USE_CPU": "true"})
    while not saved(4)() and pair.poll() is None:
        time.sleep(0.01)
    two_ranks.kill(pair)
    assert saved(4)() and not (run_dir / "model").exists(), log.read_text()[-2000:]
    alone = start(overrides(run_dir, *extra), log)
    wait_for(saved(8), alone, 120)
    alone.kill()
    alone.join()
    assert not (run_dir / "model").exists()
    two_ranks.end(two_ranks.start(command, log, environment={"ACCELERATE_USE_CPU": "true"}), log, 200)
    for name in ("loss/total", "loss/gdkd", "loss/rcka", "optim/grad_norm", "ib/beta"):
        curves = [
            [
                json.loads(line)[name]
                for line in (path / "metrics.jsonl").read_text().splitlines()
                if name in line
            ]
            for path in (tmp_path / "straight", run_dir)
        ]
        assert len(curves[0]) == 12 and curves[1] == pytest.approx(curves[0], rel=1e-5), name


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("workers", [0, 1])
def test_asked_to_stop_it_saves_and_goes_on_later(
    tmp_path: Path, overrides, start, number, workers: int
) -> None:
    extra = ["run.max_steps=8", "run.save_every=100", f"data.num_workers={workers}"]
    log, stopped = tmp_path / "log", tmp_path / "stopped"
    straight = start(overrides(tmp_path / "straight", *extra), tmp_path / "straight.log")
    straight.join(120)
    process = start(overrides(stopped, *extra), log)
    wait_for(
        lambda: (stopped / "metrics.jsonl").exists() and bool((stopped / "metrics.jsonl").read_text()),
        process,
    )
    assert process.pid is not None
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == PREEMPTED_CODE, log.read_text()[-2000:]
    text = log.read_text()
    assert f"{number.name}: stopping after this step" in text
    assert "stopped: saved after step" in text and "Traceback" not in text
    assert len(checkpoint_paths(stopped)) == 1 and not (stopped / "model").exists()
    again = start(overrides(stopped, *extra), log)
    again.join(120)
    assert (straight.exitcode, again.exitcode) == (0, 0), log.read_text()[-2000:]
    same_end(tmp_path / "straight", stopped)


def unfinished(run_dir: Path) -> None:
    """Takes the last checkpoint and the model away, as if the run had been killed."""
    shutil.rmtree(checkpoint_paths(run_dir)[-1])
    shutil.rmtree(run_dir / "model")


def test_a_change_is_refused_with_the_diff_unless_allowed(tmp_path: Path, overrides, capfd) -> None:
    run_dir = tmp_path / "run"
    assert main([RECIPE, *overrides(run_dir, "run.max_steps=4")]) == 0
    unfinished(run_dir)
    changed = [RECIPE, *overrides(run_dir, "run.max_steps=4", "optim.lr=1e-4", "optim.weight_decay=0.1")]
    capfd.readouterr()
    assert main(changed) == 2
    error = capfd.readouterr().err
    assert "optim.lr: 0.0003 -> 0.0001" in error and "optim.weight_decay: 0.001 -> 0.1" in error
    assert "--allow-changed optim.lr" in error and error.count("\n") == 1
    assert main([*changed, "--allow-changed", "optim.lr"]) == 2
    assert "weight_decay" in capfd.readouterr().err
    assert main([*changed, "--allow-changed", "optim.lr", "--allow-changed", "optim.weight_decay"]) == 0
    told = capfd.readouterr().err
    assert "goes on with a changed recipe" in told and "continuing from step 2" in told
    assert load_recipe(run_dir / "recipe.yaml").optim.lr == 1e-4
    assert main([*changed, "--allow-changed", "optim.lrr"]) == 2
    assert "unknown key optim.lrr, did you mean optim.lr?" in capfd.readouterr().err


def test_other_records_are_refused(tmp_path: Path, overrides, tiny_world_dir: Path) -> None:
    world, run_dir = Path(shutil.copytree(tiny_world_dir, tmp_path / "world")), tmp_path / "run"
    arguments = overrides(run_dir, "run.max_steps=4", f"data.path={world / 'qat_train.json'}")
    train(load_recipe(RECIPE, arguments))
    unfinished(run_dir)
    entries = json.loads((world / "qat_train.json").read_text())
    (world / "qat_train.json").write_text(json.dumps(entries[:-1]))
    with pytest.raises(UserError, match="the records are not those that .*run began with"):
        train(load_recipe(RECIPE, arguments))
    train(load_recipe(RECIPE, arguments), ["data.path"])


def test_best_checkpoints_are_kept(tmp_path: Path, overrides, tiny_world_dir: Path) -> None:
    validation = f"data.validation_path={tiny_world_dir / 'validation.json'}"
    extra = [
        "run.max_steps=8",
        "run.eval_every=2",
        "run.eval_records=8",
        "run.keep_last=1",
        "run.keep_best=1",
        "optim.lr=1e-3",
    ]
    train(
        load_recipe(
            RECIPE,
            [a for a in overrides(tmp_path / "run", *extra) if not a.startswith("data.validation")]
            + [validation],
        )
    )
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    scores = {line["step"]: line["val/ce"] for line in lines if "val/ce" in line}
    best = min(scores, key=lambda step: (scores[step], -step))
    assert [int(path.name[5:]) for path in checkpoint_paths(tmp_path / "run")] == sorted({best, 8})


def test_a_checkpoint_that_cannot_be_written_stops_with_one_line(
    tmp_path: Path, overrides, monkeypatch, capfd
) -> None:
    def full(*_args, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("grace.checkpoint_saver.write_checkpoint", full)
    assert main([RECIPE, *overrides(tmp_path / "run", "run.max_steps=4")]) == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert error.startswith("error: the checkpoint of step 2 cannot be written") and "No space left" in error
