"""What the ways of launching (`recipes/accelerate/`) mean for the memory of one process.

Weights, gradients and optimizer state are exact, and held to what lies in the processes by tests/test_parallel.py; what
is whole for a moment follows from the libraries' defaults (DeepSpeed 0.19: buckets of 5e8 values, 1e9 values whole at
a time).

Rows are (name, bytes, formula); P is the student's parameters with its scales, n the processes.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grace.errors import UserError
from grace.parallel_fsdp import units

MODES = ("ddp", "fsdp2", "zero2", "zero3", "zero3_offload")
BUCKET, WHOLE = 500_000_000, 1_000_000_000  # values: reduce_bucket_size, stage3_max_live_parameters
Row = tuple[str, int, str]


def launched_mode(world_size: int, environment: Mapping[str, str] = os.environ) -> str:
    """The way in which this process was launched: one of `MODES`, or "single".

    Raises:
        UserError: the launcher names a DeepSpeed configuration that cannot be read.
    """
    if environment.get("ACCELERATE_USE_DEEPSPEED") == "true":
        stage = environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
        offload = environment.get("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "none")
        if (file := environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")) != "none":
            stage, offload = _of_file(Path(file))
        return "zero2" if stage != "3" else "zero3_offload" if offload == "cpu" else "zero3"
    if environment.get("ACCELERATE_USE_FSDP") == "true":
        return "fsdp2"
    return "ddp" if world_size > 1 else "single"


def _of_file(path: Path) -> tuple[str, str]:
    try:
        zero = json.loads(path.read_text())["zero_optimization"]
        return str(zero["stage"]), zero.get("offload_param", {}).get("device", "none")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"the DeepSpeed configuration {path} cannot be read ({error}): mend it") from error


def state_rows(mode: str, student: Any, trained: int, scales: int, n: int) -> tuple[list[Row], list[Row]]:
    """What a process holds of the student and its training: on its own device, and in the machine's memory.

    Args:
        student: skeleton, without scales.
        trained: its trained parameters, without scales.
    """
    parameters = sum(p.numel() for p in student.parameters())
    learned, share = trained + scales, "" if mode in ("single", "ddp") else " / n"
    part = 1 if not share else n
    whole_weights = 1 if mode == "zero2" else part
    state: list[Row] = [
        ("student weights", 4 * parameters // whole_weights, f"4 bytes x parameters{share * (mode != 'zero2')} (float32 latents)"),
        ("theta", 4 * scales // whole_weights, f"4 bytes x scales{share * (mode != 'zero2')}"),
        ("gradients", 4 * learned // part, f"4 bytes x trained{share}"),
        ("Adam moments", 8 * learned // part, f"8 bytes x trained{share}"),
    ]  # fmt: skip
    if mode == "ddp":
        state.append(("DDP buckets", 4 * learned, "4 bytes x trained (gradients in flight)"))
    if mode.startswith("zero"):
        state.append(("optimizer's copy", 4 * learned // part, f"4 bytes x trained{share}, DeepSpeed's own"))
    passing = _passing(mode, student, trained, parameters, scales)
    return (passing, state) if mode == "zero3_offload" else (state + passing, [])


def _passing(mode: str, student: Any, trained: int, parameters: int, scales: int) -> list[Row]:
    """What is whole or in flight for a moment."""
    if mode == "fsdp2":
        layers = [sum(p.numel() for p in layer.parameters()) for layer in units(student)]
        rest, largest = parameters - sum(layers), max(layers)
        size = 4 * (2 * rest + 3 * largest)  # gradients of the rest and of one layer too
        return [("whole at a time", size, "4 bytes x (rest of the model + 2 layers, gradients of rest + 1)")]
    if not mode.startswith("zero"):
        return []
    bucket = "bucket", 4 * min(BUCKET, trained + scales), "4 bytes x at most 5e8 gradients in flight"
    if mode == "zero2":
        return [bucket]
    return [("whole at a time", 4 * min(WHOLE, parameters + scales), "4 bytes x at most 1e9 weights"), bucket]
