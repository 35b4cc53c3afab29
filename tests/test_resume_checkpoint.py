"""Resume checkpoints are complete or absent, whatever kills the writer, and garbage is told from data."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from damage import one_bit, truncated
from safetensors.torch import load_file, save_file

from grace.errors import UserError
from grace.files import sha256_of
from grace.resume_checkpoint import checkpoint_paths, load_newest_checkpoint, save_checkpoint


def tensors(step: int) -> dict[str, dict[str, torch.Tensor]]:
    return {
        "trainable": {"a.weight": torch.full((4, 3), float(step)), "b": torch.arange(5) + step},
        "optimizer": {"a.weight.step": torch.tensor(float(step))},
    }


def save(run_dir: Path, step: int, keep_last: int = 3) -> Path:
    return save_checkpoint(run_dir, step, tensors(step), {"beta": step / 7, "none": None}, keep_last)


def assert_is(loaded, step: int) -> None:
    assert loaded.step == step and loaded.state == {"beta": step / 7, "none": None}
    for stem, group in tensors(step).items():
        assert loaded.tensors[stem].keys() == group.keys()
        assert all(torch.equal(loaded.tensors[stem][name], value) for name, value in group.items())


def test_round_trip_of_the_newest(tmp_path: Path) -> None:
    assert load_newest_checkpoint(tmp_path) is None and checkpoint_paths(tmp_path) == []
    for step in (9, 10, 100):
        save(tmp_path, step)
    assert_is(load_newest_checkpoint(tmp_path), 100)
    assert [path.name for path in checkpoint_paths(tmp_path)] == ["step-000009", "step-000010", "step-000100"]


def test_tensors_that_share_memory_or_are_strided_are_saved_as_values(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    leaf = torch.nn.Parameter(base.T)
    save_checkpoint(tmp_path, 1, {"trainable": {"a": leaf, "b": base.T[::2]}}, {}, 1)
    loaded = load_newest_checkpoint(tmp_path)
    assert loaded is not None
    assert torch.equal(loaded.tensors["trainable"]["a"], base.T)
    assert torch.equal(loaded.tensors["trainable"]["b"], base.T[::2])


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in range(1, 6):
        save(tmp_path, step, keep_last=2)
    assert [path.name for path in checkpoint_paths(tmp_path)] == ["step-000004", "step-000005"]


def as_before(newest: Path) -> None:
    """Turns a checkpoint into what was written when checksums were SHA-256 and the library wrote the tensors."""
    record = json.loads((newest / "state.json").read_text())
    record |= {"format_version": 1, "sha256": {}}
    for name in record.pop("xxh3"):
        save_file(load_file(newest / name), newest / name)
        record["sha256"][name] = sha256_of(newest / name)
    (newest / "state.json").write_text(json.dumps(record))


def test_earlier_checkpoints_are_read_and_checked(tmp_path: Path, capsys) -> None:
    save(tmp_path, 1)
    as_before(save(tmp_path, 2))
    assert_is(load_newest_checkpoint(tmp_path), 2)
    one_bit(tmp_path / "checkpoints/step-000002/trainable.safetensors")
    assert_is(load_newest_checkpoint(tmp_path), 1)
    assert "does not match its checksum" in capsys.readouterr().err


def test_a_step_done_again_replaces_its_checkpoint(tmp_path: Path) -> None:
    (save(tmp_path, 5) / "trainable.safetensors").write_bytes(b"damaged")
    save(tmp_path, 5)
    assert_is(load_newest_checkpoint(tmp_path), 5)


KILLED = """
import os, shutil, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
import test_resume_checkpoint as here
from grace import checkpoint_files, files

run_dir, moment = Path(sys.argv[1]), sys.argv[2]
here.save(run_dir, 1, keep_last=2)
here.save(run_dir, 2, keep_last=2)

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def half(target, chunk):
    os.write(target, chunk[: len(chunk) // 2])
    die()

def one_file(path, **_):
    next(path.iterdir()).unlink()
    die()

if moment == "writing tensors":
    checkpoint_files._write_all = half
elif moment == "writing the state":
    Path.write_text = die
elif moment == "syncing":
    files.sync = die
elif moment == "renaming":
    os.rename = die
elif moment == "removing the oldest":
    shutil.rmtree = one_file
here.save(run_dir, 3, keep_last=2)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "newest"),
    [
        ("writing tensors", 2),
        ("writing the state", 2),
        ("syncing", 2),
        ("renaming", 2),
        ("removing the oldest", 3),
    ],
)
def test_kill_leaves_complete_checkpoints_and_harmless_strays(
    tmp_path: Path, moment: str, newest: int, capsys
) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path), moment, str(Path(__file__).parent)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert finished.returncode == -signal.SIGKILL, finished.stderr
    strays = [name for name in os.listdir(tmp_path / "checkpoints") if name.startswith(".")]
    assert len(strays) == (newest == 2)  # the kill did come in the middle
    assert_is(load_newest_checkpoint(tmp_path), newest)
    assert capsys.readouterr().err == ""  # nothing damaged is even looked at
    save(tmp_path, 3)
    save(tmp_path, 4, keep_last=1)
    assert_is(load_newest_checkpoint(tmp_path), 4)
    assert [path.name for path in checkpoint_paths(tmp_path)] == ["step-000004"]


def test_failed_save_leaves_no_trace(tmp_path: Path) -> None:
    save(tmp_path, 1)
    with pytest.raises(TypeError):
        save_checkpoint(tmp_path, 2, tensors(2), {"not": {"json"}}, 3)
    assert os.listdir(tmp_path / "checkpoints") == ["step-000001"]


def replaced(old: str, new: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(path.read_text().replace(old, new))


DAMAGE: dict[str, tuple[str, Callable[[Path], object]]] = {
    "truncated tensors": ("trainable.safetensors", truncated),
    "one bit of a tensor": ("optimizer.safetensors", one_bit),
    "empty tensors": ("trainable.safetensors", lambda path: path.write_bytes(b"")),
    "missing tensors": ("optimizer.safetensors", Path.unlink),
    "truncated state": ("state.json", truncated),
    "missing state": ("state.json", Path.unlink),
    "binary state": ("state.json", lambda path: path.write_bytes(b"\x80\xff\x00")),
    "list for a state": ("state.json", lambda path: path.write_text("[]")),
    "null for a state": ("state.json", lambda path: path.write_text("null")),
    "state without its keys": ("state.json", lambda path: path.write_text("{}")),
    "another value": ("state.json", replaced('"beta": 0.', '"beta": 1.')),
    "another step": ("state.json", replaced('"step": ', '"step": 1')),
    "a key with one bit flipped": ("state.json", replaced('"state"', '"sdate"')),
    "no checksum of itself": ("state.json", replaced('"sha256"', '"sha257"')),
    "of an earlier kind, of another step": (
        "state.json",
        lambda path: path.write_text('{"format_version": 1, "step": 7, "xxh3": {}, "state": {}}'),
    ),
    "list for checksums": (
        "state.json",
        lambda path: path.write_text('{"xxh3": [], "step": 1, "state": {}}'),
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_newest_is_named_and_passed_over(tmp_path: Path, damage: str, capsys) -> None:
    name, spoil = DAMAGE[damage]
    for step in (1, 2):
        save(tmp_path, step)
    newest = checkpoint_paths(tmp_path)[-1]
    spoil(newest / name)
    assert_is(load_newest_checkpoint(tmp_path), 1)
    told = capsys.readouterr().err
    assert str(newest) in told and "damaged" in told and told.count("\n") == 1


@pytest.mark.parametrize("damage", DAMAGE)
def test_nothing_but_damage_is_the_users_error(tmp_path: Path, damage: str) -> None:
    name, spoil = DAMAGE[damage]
    spoil(save(tmp_path, 1) / name)
    with pytest.raises(UserError, match="every checkpoint in .* is damaged: remove the folder"):
        load_newest_checkpoint(tmp_path)
