"""A mistake that one process finds ends all of them: exit code 2 in each, one line in all, no trace, nobody waits.

Run as a script on two ranks, this file makes one mistake after the other.
"""

import errno
import json
import os
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from planted_faults import JPEG, entry
from two_ranks import launch_two

from grace import checkpoint_saver, tracking, train
from grace.agreement import agreed, same_in_all
from grace.config import load_recipe
from grace.errors import Preempted, Told, UserError, run_command
from grace.parallel import leave
from grace.resume_checkpoint import checkpoint_paths

RECIPE = "small_world/qat_w4.yaml"
TIMEOUT = 280


def no_room(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


class Mistakes:
    """The runs that two ranks make; each returns the overrides of `rank`."""

    def __init__(self, rank: int, folder: Path, student: Path):
        self.rank, self.folder, self.student = rank, folder, student

    def settings(self, name: str, *extra: str, data: str = "good.json") -> list[str]:
        return [
            f"student.path={self.student}", f"data.path={self.folder / data}", "data.validation_path=null",
            f"run.output_dir={self.folder / name}", "optim.batch_size=4", "run.max_steps=3", "run.micro_batch_size=2",
            "run.save_every=1", "run.log_every=1", *extra,
        ]  # fmt: skip

    def place_is_taken(self, patch: pytest.MonkeyPatch) -> list[str]:
        """Only the first rank looks at the run's directory."""
        if self.rank == 0:
            (self.folder / "place_is_taken").write_text("a file")
        return self.settings("place_is_taken")

    def other_data(self, patch: pytest.MonkeyPatch) -> list[str]:
        return self.settings("other_data", data="good.json" if self.rank == 0 else "short.json")

    def damaged_weights(self, patch: pytest.MonkeyPatch) -> list[str]:
        broken = self.folder / "broken_student"
        return self.settings("damaged_weights", *([f"student.path={broken}"] if self.rank else []))

    def missing_picture(self, patch: pytest.MonkeyPatch) -> list[str]:
        """One of sixteen records: it comes up in the share of one rank."""
        return self.settings("missing_picture", "run.max_steps=8", data="missing.json")

    def missing_validation_picture(self, patch: pytest.MonkeyPatch) -> list[str]:
        validation = f"data.validation_path={self.folder / 'missing.json'}"
        return self.settings("missing_validation_picture", validation, "run.eval_every=1")

    def no_room_for_a_checkpoint(self, patch: pytest.MonkeyPatch) -> list[str]:
        patch.setattr(checkpoint_saver, "write_checkpoint", no_room)
        return self.settings("no_room_for_a_checkpoint")

    def no_room_for_the_log(self, patch: pytest.MonkeyPatch) -> list[str]:
        patch.setattr(tracking, "METRICS_FILE", "no folder/metrics.jsonl")
        return self.settings("no_room_for_the_log")

    def no_room_for_the_model(self, patch: pytest.MonkeyPatch) -> list[str]:
        patch.setattr("grace.checkpoint.save_model", no_room)
        return self.settings("no_room_for_the_model")

    def every_checkpoint_damaged(self, patch: pytest.MonkeyPatch) -> list[str]:
        return self.settings("every_checkpoint_damaged")

    def other_recipe(self, patch: pytest.MonkeyPatch) -> list[str]:
        return self.settings("every_checkpoint_damaged", "optim.lr=1e-9")

    def newest_damaged(self, patch: pytest.MonkeyPatch) -> list[str]:
        return self.settings("newest_damaged")


TOLD = {
    "place_is_taken": "set run.output_dir", "other_data": "read different records",
    "damaged_weights": "broken_student", "missing_picture": "image .* does not exist",
    "missing_validation_picture": "image .* does not exist", "no_room_for_a_checkpoint": "checkpoint of step 1 cannot be",
    "no_room_for_the_log": "metrics.jsonl cannot be written", "no_room_for_the_model": "model cannot be written",
    "every_checkpoint_damaged": "every checkpoint in .* is damaged", "other_recipe": "another recipe",
}  # fmt: skip


def both_ranks(folder: Path, student: Path) -> None:
    rank = int(os.environ["RANK"])
    mistakes = Mistakes(rank, folder, student)
    codes = {}
    for name in (*TOLD, "newest_damaged"):
        with pytest.MonkeyPatch.context() as patch:
            settings = getattr(mistakes, name)(patch)

            def command(settings: list[str] = settings) -> int:
                train.train(load_recipe(RECIPE, settings))
                return 0

            codes[name] = run_command(command)
        torch.distributed.barrier()
        if rank == 0:
            print(f"--- end of {name}", file=sys.stderr, flush=True)
        torch.distributed.barrier()
    (folder / f"codes-{rank}.json").write_text(json.dumps(codes))


def make_files(folder: Path, student: Path) -> None:
    """Data, a student with damaged weights, and runs whose checkpoints are damaged."""
    (folder / "pictures").mkdir(parents=True)
    records = [entry(f"r{i}", f"pictures/{i}.jpg") for i in range(16)]
    for i in range(16):
        (folder / f"pictures/{i}.jpg").write_bytes(JPEG)
    (folder / "good.json").write_text(json.dumps(records))
    (folder / "short.json").write_text(json.dumps(records[:-1]))
    (folder / "missing.json").write_text(json.dumps([*records[:-1], entry("r15", "pictures/absent.jpg")]))
    shutil.copytree(student, folder / "broken_student")
    (folder / "broken_student/model.safetensors").write_bytes(b"damaged")
    mistakes = Mistakes(0, folder, student)
    train.train(load_recipe(RECIPE, mistakes.settings("newest_damaged", "run.keep_last=9")))
    shutil.rmtree(folder / "newest_damaged/model")
    shutil.copytree(folder / "newest_damaged", folder / "every_checkpoint_damaged")
    recipe = folder / "every_checkpoint_damaged/recipe.yaml"
    recipe.write_text(recipe.read_text().replace("newest_damaged", "every_checkpoint_damaged"))
    newest = checkpoint_paths(folder / "newest_damaged")[-1:]
    for path in (*newest, *checkpoint_paths(folder / "every_checkpoint_damaged")):
        (path / "trainable.safetensors").write_bytes(b"damaged")


@pytest.mark.slow
def test_two_ranks_end_together_with_one_line(tmp_path: Path, tiny_student_dir: Path) -> None:
    folder = tmp_path / "files"
    make_files(folder, tiny_student_dir)
    launch_two([__file__, str(folder), str(tiny_student_dir)], tmp_path / "log", TIMEOUT)
    told = (tmp_path / "log").read_text()
    assert "Traceback" not in told, told
    codes = [json.loads((folder / f"codes-{rank}.json").read_text()) for rank in (0, 1)]
    assert codes[0] == codes[1] == {**dict.fromkeys(TOLD, 2), "newest_damaged": 0}, told
    parts = dict(zip([*TOLD, "newest_damaged"], told.split("--- end of "), strict=False))
    for name, words in TOLD.items():
        lines = [line for line in parts[name].splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, parts[name]
        assert re.search(words, lines[0]), lines[0]
    assert parts["newest_damaged"].count("is damaged") == 1
    assert "continuing from step 2 of 3" in parts["newest_damaged"]


def test_alone_it_is_the_error_itself() -> None:
    alone: Any = SimpleNamespace(num_processes=1)
    with pytest.raises(UserError, match="wrong") as caught, agreed(alone):
        raise UserError("wrong")
    assert not isinstance(caught.value, Told)
    with agreed(alone):
        pass
    with pytest.raises(ZeroDivisionError), agreed(alone):  # a fault of ours is no matter of agreement
        _ = 1 / 0


@pytest.mark.parametrize(("rank", "lines"), [("0", 1), ("1", 0)])
def test_what_all_find_is_said_once(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, rank: str, lines: int
) -> None:
    monkeypatch.setenv("RANK", rank)

    def command() -> int:
        with same_in_all():
            raise UserError("wrong")

    def stopped() -> int:
        raise Preempted("saved")

    assert run_command(command) == 2
    assert run_command(stopped) == 75
    assert train.main([RECIPE, "nonsense=1"]) == 2
    assert capsys.readouterr().err.count("\n") == 3 * lines
    with pytest.raises(SystemExit) as caught:
        train.main([RECIPE, "--nonsense"])
    assert caught.value.code == 2 and capsys.readouterr().err.count("\n") == lines


if __name__ == "__main__":
    both_ranks(Path(sys.argv[1]), Path(sys.argv[2]))
    leave(0)
