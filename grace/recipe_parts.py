"""Parts of a recipe: its annotation files, one or several of which an epoch takes different shares; its benchmarks."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from grace.recipe_check import number

EXPECTED = "expected a file, or files and weights, such as {a.json: 1, b.json: {weight: 0.1, cap: 5000}}"
MOST = 1000  # times that an epoch may take a file: more is a slip of the pen


@dataclass(frozen=True, kw_only=True)
class EvalTasks:
    """Benchmarks of which a run asks a few questions whenever it validates; see `grace eval`."""

    eval_tasks: tuple[str, ...] = ()
    eval_data: tuple[str, ...] = ()  # TASK=PATH; a task without one comes from the Hub
    eval_limit: int = number("[1, inf)", default=64)  # questions of each


@dataclass(frozen=True)
class Part:
    """An annotation file, and how much of it an epoch takes.

    Attributes:
        weight: how many times as many records as the file has.
        cap: of that at most so many; None is no limit.
    """

    path: str
    weight: float = 1.0
    cap: int | None = None


def parts_of(value: Any) -> str | tuple[Part, ...]:
    """The value of `data.path`: a path, or a mapping of paths to weights, or a list of parts as `Part` has them.

    A weight may also be a mapping of `weight` and `cap`, either of which may be absent.

    Raises:
        ValueError: something else; says what was expected.
    """
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, dict):
        value = [
            {"path": path, **(one if isinstance(one, dict) else {"weight": one})}
            for path, one in value.items()
        ]
    if not isinstance(value, list | tuple) or not value:
        raise ValueError(EXPECTED)
    parts = tuple(_part(one) for one in value)
    paths = [part.path for part in parts]
    if twice := {path for path in paths if paths.count(path) > 1}:
        raise ValueError(f"expected each file once: {min(twice)} is there twice, give it a weight of 2")
    return parts


def paths_of(value: Any) -> list[str]:
    """The files that a recipe's `data.path` names.

    Raises:
        ValueError: as `parts_of`.
    """
    parts = parts_of(value)
    return [parts] if isinstance(parts, str) else [part.path for part in parts]


def _part(value: Any) -> Part:
    if isinstance(value, str):
        value = {"path": value}
    known = [field.name for field in dataclasses.fields(Part)]
    if not isinstance(value, dict) or not {"path"} <= set(value) <= set(known):
        raise ValueError(EXPECTED)
    path, weight, cap = value["path"], value.get("weight", 1.0), value.get("cap")
    if not isinstance(path, str) or not path.strip():
        raise ValueError(EXPECTED)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight <= MOST:
        raise ValueError(f"expected a weight above 0 and at most {MOST} for {path}, got {weight!r}")
    if cap is not None and (isinstance(cap, bool) or not isinstance(cap, int) or cap < 1):
        raise ValueError(f"expected a cap of at least 1 record for {path}, got {cap!r}")
    return Part(path, float(weight), cap)
