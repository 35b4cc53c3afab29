"""A training run read back from its directory: finished, going on, or left half-way."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from grace.data.audit_list import list_path, summary_path
from grace.errors import UserError
from grace.recipe_parts import paths_of
from grace.run_files import ENVIRONMENT_FILE, METRICS_FILE, RECIPE_FILE

LAYER = "quant/snr/"  # before a layer's name
SHOWN_RUNS = 5  # in the hint of what else to give


@dataclass(frozen=True)
class RunLog:
    """What a run left on disk.

    Attributes:
        path: its directory; `name` is how it is called among those of a report.
        steps: the lines of log windows, by step; validation: those of validations.
        snr: quantization SNR by layer, dB, as last measured.
        recipe, environment, audit: as written; empty where absent or unreadable.
        unreadable: lines that hold no JSON object, such as half a last one.
        finished: its model is there.
        written: when the log was last added to, None without a log.
    """

    path: Path
    name: str
    steps: list[dict[str, Any]] = field(default_factory=list)
    validation: list[dict[str, Any]] = field(default_factory=list)
    snr: dict[str, float] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    audit: dict[str, Any] = field(default_factory=dict)
    unreadable: int = 0
    finished: bool = False
    written: datetime | None = None

    @property
    def last_step(self) -> int:
        """The last step that was logged; 0 for none."""
        return max((int(line["step"]) for line in (*self.steps, *self.validation)), default=0)

    @property
    def total_steps(self) -> int | None:
        """The steps it is to have, where that is known."""
        total = self.environment.get("total_steps")
        return total if isinstance(total, int) else section(self.recipe, "run").get("max_steps")


def read_runs(paths: Iterable[Path]) -> list[RunLog]:
    """Reads several runs, named as shortly as tells them apart.

    Raises:
        UserError: a directory is no run's, or is given twice.
    """
    given = list(paths)
    real = [path.resolve() for path in given]
    for index, path in enumerate(real):
        if path in real[:index]:
            raise UserError(f"{given[index]} is given twice: give each run once")
    return [read_run(path, name) for path, name in zip(given, short_names(real), strict=True)]


def short_names(paths: list[Path]) -> list[str]:
    """As many of the last parts of each path as make all of them different."""
    for count in range(1, max((len(path.parts) for path in paths), default=1) + 1):
        names = ["/".join(path.parts[-count:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def read_run(path: Path, name: str | None = None) -> RunLog:
    """Reads one run.

    Raises:
        UserError: the directory is no run's.
    """
    require_run(path)
    log, recipe = path / METRICS_FILE, _mapping(path / RECIPE_FILE)
    lines, unreadable = read_lines(log)
    data = section(recipe, "data")
    try:
        audit = _mapping(summary_path(list_path(paths_of(data.get("path")), data.get("audit"))))
    except (ValueError, TypeError):  # a recipe that somebody wrote something else into
        audit = {}
    by_step = {line["step"]: line for line in lines if "loss/total" in line}
    validation = {line["step"]: line for line in lines if any(key.startswith("val/") for key in line)}
    layers = [line for line in lines if any(key.startswith(LAYER) for key in line)]
    snr = {k.removeprefix(LAYER): v for k, v in (layers[-1] if layers else {}).items() if k.startswith(LAYER)}
    return RunLog(
        path=path,
        name=name or path.resolve().name,
        steps=[by_step[step] for step in sorted(by_step)],
        validation=[validation[step] for step in sorted(validation)],
        snr={name: value for name, value in snr.items() if number(value) is not None},
        recipe=recipe,
        environment=_mapping(path / ENVIRONMENT_FILE),
        audit=audit,
        unreadable=unreadable,
        finished=(path / "model").is_dir(),
        written=datetime.fromtimestamp(log.stat().st_mtime, UTC) if log.is_file() else None,
    )


def require_run(path: Path) -> None:
    """Raises UserError unless a directory is a run's: it holds a log, or at least a recipe."""
    if not path.exists():
        raise UserError(f"there is no {path}: give a run directory (run.output_dir of a training)")
    if not path.is_dir():
        raise UserError(f"{path} is a file: give the run directory that it is in")
    if (path / METRICS_FILE).is_file() or (path / RECIPE_FILE).is_file():
        return
    below = sorted(str(log.parent) for depth in ("*", "*/*") for log in path.glob(f"{depth}/{METRICS_FILE}"))
    hint = f"; there are runs in it: {', '.join(below[:SHOWN_RUNS])}" if below else ""
    raise UserError(
        f"{path} is no run, it holds no {METRICS_FILE}: give a run.output_dir of a training{hint}"
    )


def read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The objects of a log that have a step, and how many lines are something else."""
    if not path.is_file():
        return [], 0
    try:
        text = path.read_bytes().decode("utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): make it readable") from error
    lines, unreadable = [], 0
    for line in text.split("\n"):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = None
        step = value.get("step") if isinstance(value, dict) else None
        if isinstance(step, int) and not isinstance(step, bool):
            lines.append(value)
        else:
            unreadable += 1
    return lines, unreadable


def number(value: Any) -> float | None:
    """A finite number as it is, anything else as None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        found = float(value)
    except OverflowError:  # a whole number of hundreds of digits
        return None
    return found if math.isfinite(found) else None


def series(lines: Iterable[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of the lines that have a number of this name."""
    pairs = [(line["step"], value) for line in lines if (value := number(line.get(key))) is not None]
    return [step for step, _ in pairs], [value for _, value in pairs]


def section(recipe: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A section of a recipe, empty if it is absent or something else."""
    found = recipe.get(name)
    return found if isinstance(found, dict) else {}


def _mapping(path: Path) -> dict[str, Any]:
    """A YAML or JSON file's mapping; empty where there is none: a report does without."""
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return value if isinstance(value, dict) else {}
