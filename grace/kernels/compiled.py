"""The C sources beside this file as one library, compiled on this machine at its first use (gcc, a few seconds).

They need Linux, a processor with AVX512-BF16 and gcc; `obstacle` says what is missing.
"""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from grace.files import new_file

_SOURCES = tuple(Path(__file__).with_name(name) for name in ("int4_cpu.c", "layer_cpu.c", "head_cpu.c"))
_FLAGS = (
    "-O3", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16", "-mf16c", "-mfma",
    "-fopenmp", "-shared", "-fPIC",
)  # fmt: skip


@functools.cache
def obstacle() -> str | None:
    """Why the library cannot run on this machine, or None if it can. Compiles it the first time."""
    if not sys.platform.startswith("linux"):
        return "the compiled kernel runs on Linux only"
    if not torch.cpu._is_avx512_bf16_supported():
        return "the compiled kernel needs a processor with AVX512-BF16"
    try:
        library()
    except (OSError, subprocess.SubprocessError) as error:
        return f"the kernel cannot be compiled ({' '.join(str(error).split())[:200]})"
    return None


@functools.cache
def library() -> ctypes.CDLL:
    """The library; compiled where these sources and this compiler have not met before.

    It shares torch's OpenMP, and so its threads: both ask for the same file by name.

    Raises:
        OSError: no compiler, or nowhere to put the result.
        subprocess.SubprocessError: the compiler fails.
    """
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        raise OSError("gcc is not installed")
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=60).stdout
    parts = [*(source.read_bytes() for source in _SOURCES), version, " ".join(_FLAGS).encode()]
    path = cache_folder() / f"cpu-kernels-{hashlib.sha256(b''.join(parts)).hexdigest()[:16]}.so"
    if not path.is_file():
        with new_file(path) as scratch:
            command = [compiler, *_FLAGS, "-o", str(scratch), *map(str, _SOURCES), "-lm"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=300)
            if done.returncode:
                raise subprocess.SubprocessError(f"{compiler}: {done.stderr.strip() or done.returncode}")
    return ctypes.CDLL(str(path))


def cache_folder() -> Path:
    """Where compiled kernels are kept; a folder of this process alone where that cannot be written."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(os.environ.get("GRACE_CACHE") or Path(home) / "grace")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return Path(tempfile.mkdtemp(prefix="grace-"))
    return folder if os.access(folder, os.W_OK) else Path(tempfile.mkdtemp(prefix="grace-"))
