"""The small world on disk: pictures and ShareGPT4V files, the same bytes for the same seed.

    DIR/<split>.json, DIR/images/<split>/<id>.png, DIR/world.json

| split | scans | turns | for |
| --- | --- | --- | --- |
| teacher_see, teacher_answer | all training scans | 1, 1-6 | the teacher: first to see, then to answer |
| student_see, student_answer | the student's part of them | 1, 1-6 | the same for the full-precision student; 30 % of its answers are wrong |
| qat_train | the student's part | 1-6 | training at low precision; 30 % of the answers are wrong |
| validation, test | their own | 1 | measuring; the id ends in the kind of question |
"""

import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from grace.data.questions import (
    KINDS,
    LONG_KINDS,
    SHORT_KINDS,
    Asked,
    ask,
    ask_without_picture,
    majority_rate,
    scene_with_question,
    wrong_answer,
)
from grace.data.scenes import Painter, Scene, random_scene, scan_pools
from grace.errors import UserError
from grace.files import new_directory, write_text

__all__ = ["SPLITS", "SPLIT_SIZES", "majority_rate", "write_small_world"]

DESCRIBED = 0.3  # share of training conversations with a long answer in them
WITHOUT_PICTURE = 0.05  # share of training records of text alone
MOST_TURNS = 6
WRONG = 0.3  # share of wrong answers in what the student learns from: a teacher has something to give


@dataclass(frozen=True)
class Split:
    """How one split is made."""

    size: int
    pool: str
    training: bool = True
    wrong: float = 0.0  # share of answers that are wrong
    only_descriptions: bool = False  # one description a record: what a new tower learns to see from
    close_ups: float = 0.0  # share of records that show one cell alone


SPLITS = {
    "teacher_see": Split(16000, "teacher", only_descriptions=True, close_ups=0.5),
    "teacher_answer": Split(12000, "teacher"),
    "student_see": Split(16000, "student", only_descriptions=True, close_ups=0.5),
    "student_answer": Split(6000, "student", wrong=WRONG),
    "qat_train": Split(2000, "student", wrong=WRONG),
    "validation": Split(1000, "validation", training=False),
    "test": Split(3000, "test", training=False),
}
SPLIT_SIZES = {name: split.size for name, split in SPLITS.items()}


def write_small_world(out_dir: str | Path, seed: int = 0, splits: dict[str, int] | None = None) -> Path:
    """Writes the asked splits into a new directory and returns its path.

    Each record depends on (seed, split, its number) alone: not on which other splits are
    written, nor on the split's size.

    Args:
        splits: number of records per split; None writes all of `SPLIT_SIZES`.

    Raises:
        UserError: unknown split, a size below 1, or `out_dir` in use.
    """
    sizes = SPLIT_SIZES if splits is None else splits
    for name, size in sizes.items():
        if name not in SPLITS or size < 1:
            raise UserError(
                f"cannot make split {name!r} of {size} records: at least 1 of {', '.join(SPLITS)}"
            )
    out_dir = Path(out_dir)
    pools = scan_pools(seed)
    with new_directory(out_dir) as folder:
        for name, size in sizes.items():
            painter = Painter(pools[SPLITS[name].pool])
            (folder / "images" / name).mkdir(parents=True)
            records = [_write_record(folder, name, index, seed, painter) for index in range(size)]
            lines = ",\n".join(json.dumps(record) for record in records)
            write_text(folder / f"{name}.json", f"[\n{lines}\n]\n")
        about = {"seed": seed, "splits": sizes, "scans": {name: len(pool) for name, pool in pools.items()}}
        write_text(folder / "world.json", json.dumps(about, indent=2) + "\n")
    return out_dir


def _write_record(folder: Path, name: str, index: int, seed: int, painter: Painter) -> dict[str, Any]:
    """Paints one record's picture and returns the record."""
    split = SPLITS[name]
    code = zlib.crc32(name.encode())
    rng = np.random.default_rng([seed, code, index])
    if split.training:
        record_id = f"{name}-{index:06d}"
        if split.only_descriptions:
            scene, exchanges = _description(rng, rng.random() < split.close_ups)
        else:
            scene, exchanges = _conversation(rng)
    else:
        kind = KINDS[index % len(KINDS)]
        record_id = f"{name}-{index:06d}-{kind}"
        scene, asked = scene_with_question(kind, rng)
        exchanges = [asked]
    record: dict[str, Any] = {"id": record_id}
    if scene is not None:
        record["image"] = f"images/{name}/{record_id}.png"
        painter.paint(scene, rng).save(folder / record["image"], format="PNG", compress_level=1)
    # A stream of its own: a world with and one without wrong answers have the same questions.
    answers = _answers(scene, exchanges, split.wrong, np.random.default_rng([seed, code, index, 1]))
    record["conversations"] = [
        {"from": speaker, "value": value}
        for exchange, answer in zip(exchanges, answers, strict=True)
        for speaker, value in (("human", exchange.question), ("gpt", answer))
    ]
    if scene is not None:
        record["conversations"][0]["value"] = "<image>\n" + exchanges[0].question
    return record


def _description(rng: np.random.Generator, close_up: bool) -> tuple[Scene, list[Asked]]:
    """A scene, or one cell of it, and the one request to describe it."""
    scene = random_scene(rng)
    if close_up:
        scene = scene.close_up(scene.occupied[rng.integers(len(scene.occupied))])
    return scene, [_long_question(scene, rng, LONG_KINDS[:1] if close_up else LONG_KINDS)]


def _long_question(scene: Scene, rng: np.random.Generator, kinds: tuple[str, ...] = LONG_KINDS) -> Asked:
    """One of the questions that every scene can answer."""
    asked = ask(kinds[rng.integers(len(kinds))], scene, rng)
    assert asked is not None
    return asked


def _conversation(rng: np.random.Generator) -> tuple[Scene | None, list[Asked]]:
    """A training conversation: one scene with 1 to 5 questions, or a few sums without a picture."""
    turns = int(rng.integers(1, MOST_TURNS + 1))
    if rng.random() < WITHOUT_PICTURE:
        return None, [ask_without_picture(rng) for _ in range(turns)]
    kinds = [SHORT_KINDS[i] for i in rng.integers(len(SHORT_KINDS), size=turns)]
    scene, first = scene_with_question(kinds[0], rng)
    exchanges = [first]
    for kind in kinds[1:]:
        asked = ask(kind, scene, rng)
        if asked is not None and asked.question not in [exchange.question for exchange in exchanges]:
            exchanges.append(asked)
    if rng.random() < DESCRIBED:
        exchanges[rng.integers(len(exchanges))] = _long_question(scene, rng)
    return scene, exchanges


def _answers(
    scene: Scene | None, exchanges: list[Asked], wrong: float, rng: np.random.Generator
) -> list[str]:
    """The answers as told: a share `wrong` of them is false."""
    return [
        wrong_answer(exchange, scene, rng) if rng.random() < wrong else exchange.answer
        for exchange in exchanges
    ]
