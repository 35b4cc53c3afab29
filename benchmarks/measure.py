"""What every benchmark here needs: the machine's facts, and the peak memory of a piece of work."""

import ctypes
import datetime
import gc
import json
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def cpu_name() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def report(result: dict[str, Any], out: Path | None) -> None:
    """Prints the closing line of JSON, and writes the same to `out`."""
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


def machine(device: str = "cpu") -> dict[str, Any]:
    """Device, versions, load and date, for the line of JSON."""
    name = cpu_name() if device == "cpu" else torch.cuda.get_device_name(device)
    return {
        "device": name,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    }


def peak_gb(work: Callable[[], Any], device: str = "cpu") -> tuple[float, Any]:
    """Peak memory in 1e9 bytes that `work` adds to what was there before, its result included, and the result.

    On a CPU (Linux) the kernel's high-water mark of resident memory, reset beforehand.
    """
    gc.collect()
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = work()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 1e9, result
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    result = work()
    return (high_water() - before) / 1e9, result


def high_water() -> int:
    """Bytes of this process resident at the most, since its start or the last reset (Linux).

    Not `ru_maxrss`, into which the parent's memory counts.
    """
    return _status("VmHWM")


def _status(key: str) -> int:
    """Bytes of one line of /proc/self/status."""
    text = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith(f"{key}:")) * 1024
