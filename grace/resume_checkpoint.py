"""Resume checkpoints: what a killed run goes on from.

`checkpoints/step-000100/` holds the trainable parameters, the optimizer state and a small JSON state, with a checksum of
each tensor file and of itself. It is written under a temporary name and renamed: a kill leaves the one before.
"""

import hashlib
import json
import math
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from grace.checked_files import TOKENIZER_LIMIT, read_json, safetensors_header, shown
from grace.checkpoint_files import FileInMemory, files_of, xxh3_of
from grace.errors import UserError
from grace.files import new_directory, sha256_of

FORMAT_VERSION = 2  # 1 had no checksum of the state itself
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, SafetensorError)


@dataclass(frozen=True)
class Checkpoint:
    """A resume checkpoint read back: tensors by file stem, and the JSON state."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def save_checkpoint(
    run_dir: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    keep_last: int,
    keep_best: int = 0,
    score: float | None = None,
) -> Path:
    """Writes `checkpoints/step-NNNNNN`, then removes all but the newest `keep_last` and the best `keep_best`.

    Args:
        tensors: one safetensors file per key.
        state: JSON-able values.
        score: of this step, the lower the better; None was not measured, and is never among the best.
    """
    files = files_of(tensors, {})
    return write_checkpoint(run_dir, step, files, state, keep_last, keep_best, score)


def write_checkpoint(
    run_dir: Path,
    step: int,
    files: Mapping[str, FileInMemory],
    state: Mapping[str, Any],
    keep_last: int,
    keep_best: int = 0,
    score: float | None = None,
) -> Path:
    """`save_checkpoint` of tensors that are copied already."""
    target = run_dir / "checkpoints" / _name(step)
    if target.exists():  # a damaged one that resume passed over: this step is being done again
        shutil.rmtree(target)
    with new_directory(target) as scratch:
        names = {stem: f"{stem}.safetensors" for stem in files}
        checksums = {names[stem]: file.write(scratch / names[stem]) for stem, file in files.items()}
        record = {"format_version": FORMAT_VERSION, "step": step, "score": score}
        record |= {"xxh3": checksums, "state": dict(state)}
        record["sha256"] = _digest(record)
        (scratch / "state.json").write_text(json.dumps(record, indent=1))
    kept = {*checkpoint_paths(run_dir)[-keep_last:], *_best(run_dir, keep_best)}
    for old in set(checkpoint_paths(run_dir)) - kept:
        shutil.rmtree(old)
    return target


def _name(step: int) -> str:
    return f"step-{step:06d}"


def _digest(record: Mapping[str, Any]) -> str:
    """Of the values, however they are written: sorted keys, and numbers as they are read back."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _best(run_dir: Path, count: int) -> list[Path]:
    """The checkpoints of the lowest scores, at most `count`; among equals the newer."""
    scores = [(score, -at, path) for at, path in enumerate(checkpoint_paths(run_dir)) if (score := _score(path)) is not None]  # fmt: skip
    return [path for *_, path in sorted(scores)[:count]]


def _score(path: Path) -> float | None:
    try:
        score = read_json(path / "state.json", TOKENIZER_LIMIT, finite=False).get("score")
    except _UNREADABLE:
        return None
    return score if isinstance(score, float) and math.isfinite(score) else None


def checkpoint_paths(run_dir: Path) -> list[Path]:
    """Complete checkpoint directories of a run, oldest first."""
    return sorted((run_dir / "checkpoints").glob("step-[0-9]*"))


def load_newest_checkpoint(run_dir: Path, tell: bool = True) -> Checkpoint | None:
    """The newest undamaged checkpoint; damaged ones are passed over, and named on stderr if `tell`.

    Raises:
        UserError: there are checkpoints and every one is damaged.
    """
    paths = checkpoint_paths(run_dir)
    for path in reversed(paths):
        try:
            return _read_checkpoint(path)
        except _UNREADABLE as error:
            if tell:
                print(f"checkpoint {path} is damaged ({error}); trying the one before it", file=sys.stderr)
    if paths:
        raise UserError(
            f"every checkpoint in {run_dir / 'checkpoints'} is damaged: remove the folder to start over"
        )
    return None


def _read_checkpoint(path: Path) -> Checkpoint:
    record = read_json(path / "state.json", TOKENIZER_LIMIT, finite=False)
    if record.get("format_version") != 1 and record.pop("sha256") != _digest(record):
        raise ValueError("state.json does not match its checksum")
    if path.name != _name(record["step"]):
        raise ValueError(f"state.json is that of step {record['step']}")
    tensors = {}
    checksum_of, checksums = (xxh3_of, record["xxh3"]) if "xxh3" in record else (sha256_of, record["sha256"])
    for name, checksum in checksums.items():  # SHA-256 was that of earlier ones
        if Path(name).name != name or checksum_of(path / name) != checksum:
            raise ValueError(f"{shown(name)} does not match its checksum")
        safetensors_header(path / name)
        tensors[Path(name).stem] = load_file(path / name)
    return Checkpoint(record["step"], tensors, record["state"])
