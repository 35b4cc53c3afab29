"""The data of the study: one small world, a part of its training records for every seed, and teachers' wrong lessons.

    OUT/world/qat_train.json, validation.json, test.json, teacher_answer.json, images/
    OUT/world/train_<seed>.json       the part of qat_train that a seed trains on
    OUT/world/lessons_<noise>.json    teacher_answer with wrong answers to the questions of some kinds

Parts of two seeds have no record in common. Those of the tuning seeds (from 100 on) come first, so that more
evaluation seeds leave every part as it is.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from grace.data.questions import RESULTS, WORDINGS
from grace.data.small_world import write_small_world
from grace.files import write_text

TUNING_SEED = 100  # the first of them
MOST_TUNING_SEEDS = 2
WORLD_SEED = 0  # that of the packaged teacher and student: their scans are not in the test split


@dataclass(frozen=True)
class Sizes:
    """Records: what a seed trains on, what weights are chosen and arms are scored on, what a noisy teacher learns from."""

    part: int
    validation: int
    test: int
    lessons: int
    seeds: int  # most evaluation seeds that there is data for


FULL = Sizes(part=1600, validation=1000, test=2000, lessons=3200, seeds=8)
QUICK = Sizes(part=64, validation=40, test=40, lessons=64, seeds=3)


@dataclass(frozen=True)
class Noise:
    """How a teacher is misled.

    Attributes:
        kinds: the kinds of question whose answers are wrong.
        share: of those answers.
        next: the wrong answer is the next result, always the same; else any other result.
    """

    kinds: tuple[str, ...]
    share: float
    next: bool


# Two of the eight kinds: one that the student knows (.97 before training), one that it does not (.33).
NOISY_KINDS = ("position", "sum")
NOISES: Mapping[str, Noise] = {
    "misled": Noise(NOISY_KINDS, 1.0, next=True),
    "unsure": Noise(NOISY_KINDS, 0.9, next=False),
}


def write_world(out: Path, sizes: Sizes) -> Path:
    """Writes what is missing of the world, and returns its directory."""
    world = out / "world"
    if not world.exists():
        splits = {
            "qat_train": (MOST_TUNING_SEEDS + sizes.seeds) * sizes.part, "validation": sizes.validation,
            "test": sizes.test, "teacher_answer": sizes.lessons,
        }  # fmt: skip
        write_small_world(world, WORLD_SEED, splits)
    records = json.loads((world / "qat_train.json").read_text())
    seeds = [*range(TUNING_SEED, TUNING_SEED + MOST_TUNING_SEEDS), *range(sizes.seeds)]
    for place, seed in enumerate(seeds):
        part = records[place * sizes.part : (place + 1) * sizes.part]
        _write_once(world / f"train_{seed}.json", part)
    lessons = json.loads((world / "teacher_answer.json").read_text())
    for name, noise in NOISES.items():
        _write_once(world / f"lessons_{name}.json", mislead(lessons, noise))
    return world


def _write_once(path: Path, records: Sequence[Any]) -> None:
    if not path.exists():
        write_text(path, "[\n" + ",\n".join(json.dumps(record) for record in records) + "\n]\n")


# ---------------------------------------------------------------- wrong lessons

_QUESTIONS = {
    kind: re.compile("|".join(re.escape(wording).replace(r"\{\}", "(.+)") for wording in WORDINGS[kind]))
    for kind in RESULTS
}


def question_kind(text: str) -> str | None:
    """The kind of a question about a picture by its wording; None for others."""
    text = text.removeprefix("<image>\n")
    return next((kind for kind, pattern in _QUESTIONS.items() if pattern.fullmatch(text)), None)


def mislead(records: Sequence[Mapping[str, Any]], noise: Noise) -> list[dict[str, Any]]:
    """The same records with `noise.share` of the answers of its kinds wrong; the same for the same records."""
    rng = np.random.default_rng(0)
    misled = []
    for record in records:
        turns = [dict(turn) for turn in record["conversations"]]
        for question, answer in zip(turns[0::2], turns[1::2], strict=True):
            kind = question_kind(question["value"])
            if kind in noise.kinds and rng.random() < noise.share:
                answer["value"] = _wrong(answer["value"], RESULTS[kind], noise.next, rng)
        misled.append({**record, "conversations": turns})
    return misled


def _wrong(answer: str, results: Sequence[str], next_one: bool, rng: np.random.Generator) -> str:
    told = re.split(r"[ :]+", answer)[-1]
    step = 1 if next_one else int(rng.integers(1, len(results)))
    return answer.removesuffix(told) + results[(results.index(told) + step) % len(results)]
