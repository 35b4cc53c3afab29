"""Up to how many tokens ATen's int4 matmul beats dequantizing first, on this processor: timed once per shape, and kept.

Shape suffixes: M tokens, I input features, O output features.
"""

import functools
import json
import logging
import math
import re
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch

from grace.files import new_file
from grace.kernels import aten, dequant
from grace.kernels.compiled import cache_folder

log = logging.getLogger(__name__)

# Small layers are not worth timing. At the linear shapes of the 2B model, one core of an AVX-512 EPYC with bfloat16
# arithmetic, the two meet at 133 and 136 tokens in two runs of benchmarks/int4_cpu.py; held to AVX2 at about 130.
DEFAULT_TOKENS = 128
_TIMED_WEIGHTS = 1 << 20
_TOKENS = (16, 64, 128, 256, 512)
_REPEATS = 3


@functools.cache
def aten_tokens(in_features: int, out_features: int, group_size: int) -> int:
    """Tokens up to which ATen is faster for a layer of this shape with the threads that torch has now."""
    if in_features * out_features < _TIMED_WEIGHTS:
        return DEFAULT_TOKENS
    path, key = _path(), f"{in_features}x{out_features}/{group_size}"
    known = _read(path)
    if key not in known:
        known = {**known, key: measured(in_features, out_features, group_size)}
        try:
            with new_file(path) as scratch:
                scratch.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
        except OSError as error:
            log.warning("the crossover is not kept: cannot write %s (%s)", path, error.strerror)
    return known[key]


def measured(in_features: int, out_features: int, group_size: int) -> int:
    """Times both on random weights; where they meet, log-linear between the numbers of tokens tried."""
    generator = torch.Generator().manual_seed(0)

    def words(rows: int) -> torch.Tensor:
        ends = -(1 << 31), (1 << 31) - 1
        return torch.randint(*ends, (rows, out_features // 8), dtype=torch.int32, generator=generator)

    groups = in_features // group_size
    stored = words(in_features), words(groups), torch.rand(groups, out_features, generator=generator).half()
    weight = aten.prepare(*stored, group_size)
    ratios: list[float] = []
    for tokens in _TOKENS:
        x_MI = torch.randn(tokens, in_features, generator=generator).bfloat16()
        fused = _seconds(lambda x_MI=x_MI: aten.matmul(x_MI, weight))
        ratios.append(fused / _seconds(lambda x_MI=x_MI: dequant.matmul(x_MI, *stored, group_size)))
        if ratios[-1] >= 1:
            break
    return meeting_point(ratios)


def meeting_point(ratios: list[float]) -> int:
    """Tokens at which times over those of the other way reach 1; beyond what was tried counts as its end."""
    if ratios[0] >= 1:
        return _TOKENS[0]
    for (low, before), (high, after) in pairwise(zip(_TOKENS, ratios, strict=False)):
        if before < 1 <= after:
            share = math.log(before) / (math.log(before) - math.log(after))
            return int(low * (high / low) ** share)
    return _TOKENS[len(ratios) - 1]


def _seconds(work: Callable[[], object]) -> float:
    work()
    times = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def _path() -> Path:
    """By processor, torch and threads."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.*)$", info.read_text(), re.MULTILINE) if info.is_file() else []
    name = f"{names[0] if names else 'cpu'}-{torch.backends.cpu.get_cpu_capability()}"
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return (
        cache_folder() / f"crossover-{slug}-torch-{torch.__version__}-{torch.get_num_threads()}-threads.json"
    )


def _read(path: Path) -> dict[str, int]:
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        if not all(isinstance(tokens, int) and tokens > 0 for tokens in known.values()):
            raise ValueError("not numbers of tokens")
        return known
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError) as error:
        log.warning("%s is ignored (%s): timed anew", path, error)
        return {}
