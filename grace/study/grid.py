"""Which trials a study consists of, which of them are done, and which can be run next.

A row is known by a hash of what decides its numbers: every recipe field that is not at its default, the bytes of the
data and of the weights that it starts from, the quantizer. Paths, the code's revision and new fields at their defaults do
not change it, so a study goes on in another checkout.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grace.config import Recipe
from grace.errors import UserError
from grace.files import sha256_of, write_text
from grace.study.arms import Arm, Table, teacher_trial
from grace.study.data import MOST_TUNING_SEEDS, NOISES, TUNING_SEED
from grace.study.trial import Trial, data_path, model_path, resolved, split_path

ROW_VERSION = 1  # of what a row means: another one makes every row anew
# Recipe fields that do not touch a row's numbers, or are told by what they name.
NOT_IN_KEY = {
    "run": {"output_dir", "log_every", "save_every", "keep_last", "keep_best", "eval_every", "eval_records",
            "eval_samples", "wandb", "wandb_project", "wandb_model"},
    "data": {"path", "validation_path", "expected_records", "expected_tokens_per_record",
             "expected_supervised_per_record", "num_workers", "audit"},
    "student": {"path", "base"},
    "teacher": {"path", "base", "cache"},
}  # fmt: skip

Row = Mapping[str, Any]


@dataclass
class Study:
    """A study's directory: its tables, and the rows that are there.

    Attributes:
        seeds: evaluation seeds, 0 to this.
        only: names of the tables to be filled; none are all.
    """

    out: Path
    tables: Sequence[Table]
    seeds: int
    tuning_seeds: int = MOST_TUNING_SEEDS
    rows: dict[str, Row] = field(default_factory=dict)
    only: Sequence[str] = ()

    def read(self) -> None:
        """Takes over the rows on disk.

        Raises:
            UserError: one is damaged.
        """
        for path in sorted((self.out / "rows").glob("*.json")):
            try:
                self.rows[path.stem] = json.loads(path.read_text())
            except ValueError as error:
                raise UserError(f"{path} is damaged ({error}): remove it, its trial is run again") from error

    def add(self, trial: Trial, row: Row) -> None:
        """Keeps a finished row, on disk first."""
        key = self.key(trial)
        whole = {"trial": dataclasses.asdict(trial), **row}
        write_text(self.out / "rows" / f"{key}.json", json.dumps(whole))
        self.rows[key] = whole

    def row(self, trial: Trial) -> Row | None:
        """The trial's row, if it is there."""
        return self.rows.get(self.key(trial))

    def key(self, trial: Trial) -> str:
        """What the trial's row is called."""
        return _key(trial, self.out)

    # ------------------------------------------------------------ trials

    def tuning_trials(self, arm: Arm, weight: float) -> list[Trial]:
        """One weight of an arm, on the seeds that weights are chosen on."""
        seeds = range(TUNING_SEED, TUNING_SEED + self.tuning_seeds)
        return [arm.weighted(weight, seed, "validation") for seed in seeds]

    def validation(self, arm: Arm) -> dict[float, list[Row]]:
        """The tuning rows there are, by weight."""
        found = {}
        for weight in arm.weights:
            rows = [self.row(trial) for trial in self.tuning_trials(arm, weight)]
            found[weight] = [row for row in rows if row is not None]
        return found

    def chosen(self, arm: Arm) -> float | None:
        """The arm's weight: the best mean exact match on validation (ties: the lower cross-entropy).

        None while trials for it are missing, and for arms without weights.
        """
        if arm.weight_of is not None:
            return self.chosen(self.arm(arm.weight_of))
        rows = self.validation(arm)
        if not rows or any(len(found) < self.tuning_seeds for found in rows.values()):
            return None
        return max(rows, key=lambda weight: _merit(rows[weight]))

    def wanted(self) -> list[Table]:
        """The tables to be filled, in order."""
        return [table for table in self.tables if not self.only or table.name in self.only]

    def arm(self, name: str) -> Arm:
        """An arm by its name, the one that has weights of its own if several tables know it."""
        found = [arm for table in self.tables for arm in table.arms if arm.name == name]
        return next((arm for arm in found if arm.weights), found[0])

    def is_ready(self, arm: Arm) -> bool:
        """Whether its weight is known, if it needs one."""
        tuned = arm.weights or arm.weight_of is not None
        return not tuned or self.chosen(arm) is not None

    def evaluations(self, arm: Arm) -> list[Trial]:
        """Its trials on the test split, seed by seed; one where nothing is trained."""
        weight = self.chosen(arm)
        seeds = range(self.seeds if arm.trial.trained else 1)
        return [arm.weighted(weight, seed, "test") for seed in seeds]

    def results(self, arm: Arm) -> dict[int, Row]:
        """Its test rows by seed."""
        if not self.is_ready(arm):
            return {}
        rows = {trial.seed: self.row(trial) for trial in self.evaluations(arm)}
        return {seed: row for seed, row in rows.items() if row is not None}

    def pending(self) -> Iterator[Trial]:
        """Trials that can be run now, the most wanted first: some arms' weights, then these arms seed by seed."""
        for arms in [unit for table in self.wanted() for unit in table.units()]:
            tuned = [self.arm(arm.weight_of or arm.name) for arm in arms]
            for arm in dict.fromkeys(arm for arm in tuned if arm.weights):
                for weight in arm.weights:
                    yield from self._ready(self.tuning_trials(arm, weight))
            trials = [self.evaluations(arm) for arm in arms if self.is_ready(arm)]
            for seed in range(self.seeds):
                yield from self._ready([of_arm[seed] for of_arm in trials if seed < len(of_arm)])

    def _ready(self, trials: Sequence[Trial]) -> Iterator[Trial]:
        """Those not done; in place of one whose teacher is still to be made, the making of it."""
        for trial in trials:
            noise = next((name for name in (trial.teacher, trial.start) if name in NOISES), None)
            if noise is not None:
                making = teacher_trial(noise)
                if self.row(making) is None or not model_path(self.out, noise).exists():
                    yield making
                    continue
            if self.row(trial) is None:
                yield trial

    def missing(self, everything: bool = False) -> int:
        """How many trials are still to be run, those included that wait for a weight.

        Args:
            everything: of all tables, not only those to be filled.
        """
        if everything and self.only:
            return dataclasses.replace(self, only=()).missing()
        waiting: set[Any] = {self.key(trial) for trial in self.pending()}
        for table in self.wanted():
            for arm in table.arms:
                if not self.is_ready(arm):
                    waiting |= {(arm.name, seed) for seed in range(self.seeds)}
        return len(waiting)


def _merit(rows: Sequence[Row]) -> tuple[float, float]:
    if any("failed" in row for row in rows):
        return (-1.0, 0.0)
    match = sum(row["scores"]["exact_match"] for row in rows) / len(rows)
    return match, -sum(row["scores"]["ce"] for row in rows) / len(rows)


# ---------------------------------------------------------------- keys


@functools.cache
def _key(trial: Trial, out: Path) -> str:
    recipe = resolved(trial, out)
    content = {
        "version": ROW_VERSION, "recipe": told(recipe), "data": _sha256(data_path(out, trial)),
        "scored": _sha256(split_path(out, trial)), "start": _weights(trial.start, out),
        "teacher": _weights(trial.teacher, out) if recipe.distils else None,
        "rest": [trial.kernels, trial.trained, trial.cached, trial.saved_as],
    }  # fmt: skip
    if not trial.trained:  # the data it would be trained on, and in which order, says nothing
        content |= {"data": None}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:20]


def told(recipe: Recipe) -> dict[str, Any]:
    """The fields that are not at their defaults, without those that do not count."""
    values = {}
    for section in dataclasses.fields(recipe):
        part = getattr(recipe, section.name)
        for one in dataclasses.fields(part):
            value = getattr(part, one.name)
            if value != one.default and one.name not in NOT_IN_KEY.get(section.name, ()):
                values[f"{section.name}.{one.name}"] = value
    return values


@functools.cache
def _sha256(path: Path) -> str:
    return sha256_of(path)


def _weights(name: str, out: Path) -> str:
    """A packaged model's bytes; a noisy teacher by what makes it."""
    if name in NOISES:
        return _key(teacher_trial(name), out)
    return _sha256(model_path(out, name) / "model.safetensors")
