"""How `w4a16_triton` cuts up a multiplication: a rule, the settings worth timing, and the table of what was fastest.

The table is a file per device and Triton version in `$GRACE_CACHE`, else `$XDG_CACHE_HOME/grace`, else
`~/.cache/grace`. Nothing is timed unless `grace.kernels.w4a16.tune` is called: a multiplication that the table does not
hold goes by the rule.
"""

import dataclasses
import json
import logging
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grace.files import new_file

log = logging.getLogger(__name__)

FORMAT = 1
WAYS = ("vector", "matrix", "expand")
TOKEN_BUCKETS = (1, 16, 32, 64, 128, 256, 512, 1024, 2048)
MAX_SPLITS = 16
# Above so many tokens the rule writes the weights out dense: 2.5 bytes per weight more, which at 4 TB/s is a third of
# the dense product's own time at 700 Tflop/s. An estimate; tuning replaces it.
EXPAND_TOKENS = 1024
_WORD = 8  # columns


@dataclass(frozen=True)
class Config:
    """How one multiplication is cut up.

    Attributes:
        way: `vector`, `matrix` or `expand`.
        words: of 8 columns, per program.
        rows: of the weights, per step; at most the group size.
        tokens: per program (`matrix`: a power of two from 16).
        splits: programs that share a column, each with its part of the input.
        warps, stages: as Triton takes them.
    """

    way: str
    words: int
    rows: int
    tokens: int = 1
    splits: int = 1
    warps: int = 4
    stages: int = 1

    def __post_init__(self) -> None:
        numbers = [value for name, value in dataclasses.asdict(self).items() if name != "way"]
        if self.way not in WAYS or any(type(value) is not int or value < 1 for value in numbers):
            raise ValueError(f"{self} is no way to multiply")
        if any(value & (value - 1) for value in (self.words, self.rows, self.tokens, self.warps)):
            raise ValueError(f"{self} has a size that is no power of two")
        if self.way == "matrix" and (self.tokens < 16 or self.rows < 16):
            raise ValueError(f"{self}: tensor cores take 16 tokens and rows at least")


# No register spills on sm_90 with any of these (tests/kernels/test_w4a16_compiled.py). A group's product stands beside
# the total until it is scaled, so 128 tokens by 128 columns is the largest product.
VECTOR_TILES = (
    Config("vector", words=8, rows=32),
    Config("vector", words=16, rows=16),
    Config("vector", words=16, rows=32, warps=8),
    Config("vector", words=32, rows=16),
    Config("vector", words=64, rows=8),
)
MATRIX_TILES = (
    Config("matrix", words=8, rows=128, tokens=16, stages=3),
    Config("matrix", words=16, rows=128, tokens=16, stages=3),
    Config("matrix", words=32, rows=64, tokens=16, stages=4),
    Config("matrix", words=16, rows=64, tokens=32, stages=4),
    Config("matrix", words=16, rows=64, tokens=64, stages=4),
    Config("matrix", words=32, rows=64, tokens=64, warps=8, stages=3),
    Config("matrix", words=16, rows=64, tokens=128, warps=8, stages=3),
)
EXPAND_TILE = Config("expand", words=16, rows=32)


@dataclass(frozen=True)
class Problem:
    """One multiplication, with the number of tokens that its settings are kept under.

    Attributes:
        tokens: one of `TOKEN_BUCKETS`.
        dtype: of the activations, `bfloat16` or `float16`.
    """

    tokens: int
    inputs: int
    outputs: int
    group_size: int
    dtype: str

    @property
    def key(self) -> str:
        return f"{self.dtype} {self.tokens}x{self.inputs}x{self.outputs} g{self.group_size}"


def bucket(tokens: int) -> int:
    """The smallest of `TOKEN_BUCKETS` that holds so many, or the largest."""
    return next((size for size in TOKEN_BUCKETS if tokens <= size), TOKEN_BUCKETS[-1])


def rule(problem: Problem, processors: int) -> Config:
    """Settings from the shape alone, which every card can run.

    Args:
        processors: multiprocessors of the device; two programs are wanted for each.
    """
    if problem.tokens > EXPAND_TOKENS:
        return fitted(EXPAND_TILE, problem)
    if problem.tokens == 1:
        tile = VECTOR_TILES[2]
    else:
        tile = MATRIX_TILES[0] if problem.tokens <= 16 else MATRIX_TILES[3 if problem.tokens <= 32 else 4]
    programs = _programs(tile, problem)
    return fitted(
        dataclasses.replace(tile, splits=max(1, min(MAX_SPLITS, 2 * processors // programs))), problem
    )


def candidates(problem: Problem, processors: int) -> list[Config]:
    """The settings worth timing, the rule's first: no fewer programs than half the multiprocessors where splitting
    can mend that, no more parts than keep eight programs on each."""
    tiles = [tile for tile in MATRIX_TILES if tile.tokens <= max(16, problem.tokens)]
    found = [rule(problem, processors)]
    for tile in [*(VECTOR_TILES if problem.tokens == 1 else ()), *tiles]:
        programs = _programs(tile, problem)
        for splits in (1, 2, 4, 8, 16):
            enough = programs * splits * 2 >= processors or splits == MAX_SPLITS
            if enough and (splits == 1 or programs * splits <= 8 * processors):
                found.append(fitted(dataclasses.replace(tile, splits=splits), problem))
    if problem.tokens >= 128:
        found.append(fitted(EXPAND_TILE, problem))
    return list(dict.fromkeys(found))


def fitted(config: Config, problem: Problem) -> Config:
    """The same within the bounds of a shape: no step crosses a group, no part is without one."""
    groups = problem.inputs // problem.group_size
    return dataclasses.replace(
        config, rows=min(config.rows, problem.group_size), splits=min(config.splits, groups)
    )


def _programs(tile: Config, problem: Problem) -> int:
    return -(-problem.outputs // (_WORD * tile.words)) * -(-problem.tokens // tile.tokens)


class Table:
    """The fastest settings found on one device, kept in a file.

    Args:
        path: need not exist. A file that cannot be read, or is not of this device and version, is reported and
            replaced at the next `put`.
    """

    def __init__(self, path: Path, device: str, triton: str):
        self.path, self.head = path, {"format": FORMAT, "device": device, "triton": triton}
        self._entries = self._read()

    def get(self, problem: Problem) -> Config | None:
        entry = self._entries.get(problem.key)
        return entry and entry[0]

    def put(self, problem: Problem, config: Config, seconds: float) -> None:
        """Keeps an entry, and what other processes have written since."""
        self._entries = {**self._read(), **self._entries, problem.key: (config, seconds)}
        settings = {
            key: {**dataclasses.asdict(config), "microseconds": 1e6 * seconds}
            for key, (config, seconds) in sorted(self._entries.items())
        }
        try:
            with new_file(self.path) as scratch:
                scratch.write_text(json.dumps({**self.head, "settings": settings}, indent=1) + "\n")
        except OSError as error:
            log.warning("kernel settings are not kept: cannot write %s (%s)", self.path, error.strerror)

    def _read(self) -> dict[str, tuple[Config, float]]:
        try:
            stored = json.loads(self.path.read_text(encoding="utf-8"))
            if {name: stored[name] for name in self.head} != self.head:
                raise ValueError("it is of another device or version")
            return {key: _entry(**fields) for key, fields in stored["settings"].items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("kernel settings in %s are ignored (%s): they are timed anew", self.path, error)
            return {}


def _entry(microseconds: float, **fields: Any) -> tuple[Config, float]:
    return Config(**fields), float(microseconds) / 1e6


def table_path(device: str, triton: str) -> Path:
    """Where the table of a device is kept, by its name and Triton's version."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(os.environ.get("GRACE_CACHE") or Path(home) / "grace")
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return folder / f"w4a16-{slug}-triton-{triton}.json"


def fastest(configs: Iterable[Config], seconds: Callable[[Config], float]) -> tuple[Config, float]:
    """The setting with the least time, and that; one that does not fit the device counts as never done.

    Args:
        seconds: times one setting; infinity for one that does not fit.

    Raises:
        RuntimeError: none fits.
    """
    timed = [(seconds(config), index, config) for index, config in enumerate(configs)]
    best, _, config = min(timed)
    if best == float("inf"):
        raise RuntimeError("no setting of the W4A16 kernels fits this device")
    return config, best
