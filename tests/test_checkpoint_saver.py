"""Checkpoints written in the background: the values of the moment, one at a time, failures heard of."""

import errno
import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import grace.checkpoint_saver as module
from grace.checkpoint_saver import CheckpointSaver
from grace.errors import UserError
from grace.resume_checkpoint import checkpoint_paths, load_newest_checkpoint


def names(run_dir: Path) -> list[int]:
    return [int(path.name[5:]) for path in checkpoint_paths(run_dir)]


def test_values_are_those_of_the_moment(tmp_path: Path) -> None:
    saver = CheckpointSaver(tmp_path, keep_last=2)
    weight = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3).T)
    saver.save(1, {"trainable": {"w": weight}}, {"beta": 0.5})
    with torch.no_grad():
        weight.zero_()  # as the next optimizer step would
    saver.wait()
    loaded = load_newest_checkpoint(tmp_path)
    assert loaded is not None and loaded.step == 1 and loaded.state == {"beta": 0.5}
    assert torch.equal(loaded.tensors["trainable"]["w"], torch.arange(6.0).reshape(2, 3).T)


def test_the_loop_goes_on_while_one_is_written_and_a_second_waits(tmp_path: Path, monkeypatch) -> None:
    go, saved = threading.Event(), []

    def slow(run_dir, step, *rest):
        go.wait(30)
        saved.append(step)

    monkeypatch.setattr(module, "write_checkpoint", slow)
    saver = CheckpointSaver(tmp_path, keep_last=2)
    saver.save(1, {}, {})  # returns at once: it would wait for ever otherwise
    assert saved == []
    threading.Timer(0.05, go.set).start()
    saver.save(2, {}, {})
    assert saved[0] == 1
    saver.wait()
    assert saved == [1, 2]


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), ValueError("a bug")])
def test_a_failure_is_raised_where_it_is_waited_for_and_once(tmp_path: Path, monkeypatch, failure) -> None:
    saver = CheckpointSaver(tmp_path, keep_last=2)
    saver.save(1, {"t": {"w": torch.ones(2)}}, {})
    saver.wait()

    def fail(*_):
        raise failure

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_checkpoint", fail)
        saver.save(2, {"t": {"w": torch.ones(2)}}, {})
        kind = UserError if isinstance(failure, OSError) else ValueError
        with pytest.raises(kind, match="step 2 cannot be written .*No space left|a bug"):
            saver.wait()
    saver.wait()
    assert names(tmp_path) == [1] and load_newest_checkpoint(tmp_path) is not None
    saver.save(3, {"t": {"w": torch.ones(2)}}, {})
    saver.wait()
    assert names(tmp_path) == [1, 3]


FULL = """
import resource, sys, torch
from pathlib import Path
from grace.checkpoint_saver import CheckpointSaver
from grace.errors import run_command
saver = CheckpointSaver(Path(sys.argv[1]), keep_last=1)
saver.save(1, {"t": {"w": torch.ones(8)}}, {})
saver.wait()
resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))
saver.save(2, {"t": {"w": torch.ones(2**20)}}, {})
sys.exit(run_command(saver.wait))
"""


def test_a_failure_can_be_asked_for_without_waiting(tmp_path: Path, monkeypatch) -> None:
    go = threading.Event()

    def fail(*_):
        go.wait(30)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "write_checkpoint", fail)
    saver = CheckpointSaver(tmp_path, keep_last=2)
    assert saver.failure() is None
    saver.save(2, {}, {})
    assert saver.failure() is None  # still writing
    go.set()
    while (found := saver.failure()) is None:
        pass
    assert "step 2 cannot be written" in str(found) and saver.failure() is None
    saver.wait()


def test_no_room_in_the_middle_of_a_file_is_one_line(tmp_path: Path) -> None:
    """A limit on the size of files stands in for a full disk: writing fails half-way, in the tensor library."""
    result = subprocess.run([sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True)
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("error: the checkpoint of step 2 cannot be written to")
    assert result.stderr.count("\n") == 1
    assert names(tmp_path) == [1] and not list((tmp_path / "checkpoints").glob(".*"))
    assert load_newest_checkpoint(tmp_path) is not None


def test_best_and_newest_are_kept(tmp_path: Path) -> None:
    saver = CheckpointSaver(tmp_path, keep_last=1, keep_best=2)
    for step, score in enumerate([0.5, 0.2, None, float("nan"), 0.2, 0.9], start=1):
        saver.save(step, {"t": {"w": torch.ones(1)}}, {}, score)
        saver.wait()
    assert names(tmp_path) == [2, 5, 6]
    loaded = load_newest_checkpoint(tmp_path)
    assert loaded is not None and loaded.step == 6  # a run goes on from the newest, not from the best


def test_a_damaged_one_is_never_the_best(tmp_path: Path) -> None:
    saver = CheckpointSaver(tmp_path, keep_last=1, keep_best=1)
    saver.save(1, {"t": {"w": torch.ones(1)}}, {}, 0.1)
    saver.wait()
    (tmp_path / "checkpoints/step-000001/state.json").write_text(json.dumps([]))
    for step in (2, 3):
        saver.save(step, {"t": {"w": torch.ones(1)}}, {}, 0.3)
        saver.wait()
    assert names(tmp_path) == [3]
