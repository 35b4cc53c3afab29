"""Runs tasks: finds the data, asks what is not answered yet, keeps every answer, and counts."""

import dataclasses
import hashlib
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from grace import __version__
from grace.errors import UserError
from grace.evaluation.answers import Answerer, FileAnswerer
from grace.evaluation.dataset import Table, open_hub, open_local
from grace.evaluation.judge import judged, scores
from grace.evaluation.pictures import Pictures
from grace.evaluation.question import HARNESS, Picture, Question, Sample, Task
from grace.evaluation.store import SampleFile, answered
from grace.evaluation.tasks import TASKS

Advance = Callable[[str, int, int | None], None]
FILE_KINDS = ("", ".parquet", ".tsv", ".jsonl", ".json")


@dataclasses.dataclass(frozen=True)
class Asked:
    """A task's questions, ready to be asked.

    Attributes:
        data: what they were made of, for the results.
    """

    task: Task
    questions: list[Question]
    pictures: Pictures
    data: Mapping[str, Any]


def data_paths(items: Sequence[str], flag: str = "--data") -> dict[str, str]:
    """TASK=PATH items as a mapping.

    Raises:
        UserError: another form, an unknown task, or one twice.
    """
    paths: dict[str, str] = {}
    for item in items:
        name, equals, path = item.partition("=")
        if not equals or not path or name not in TASKS or name in paths:
            raise UserError(f"{flag} {item!r} must be TASK=PATH, each name once, of: {', '.join(TASKS)}")
        paths[name] = path
    return paths


def prepare(task: Task, given: Mapping[str, str], root: Path | None, limit: int | None, out: Path) -> Asked:
    """Reads a task's data.

    Args:
        given: local paths by task name; before `root`, before the Hub.
        root: a folder with a file or folder named like the task.
        limit: at most so many questions, from the first on; rotations and pairs count as one and stay together.
        out: where the small world is made, if it is not given.

    Raises:
        UserError: no data, or damaged data.
    """
    table = open_table(task, given, root, limit, out)
    questions, left_out = task.questions(table)
    if not questions:
        raise UserError(f"{table.origin} has no questions for {task.name}: {dict(left_out)} were left out")
    if limit is not None:
        families = list(dict.fromkeys(task.family(question) for question in questions))[:limit]
        kept = set(families)
        questions = [question for question in questions if task.family(question) in kept]
    data = {"source": table.origin, "left_out": dict(left_out), "limit": limit}
    return Asked(task, questions, Pictures(table), data)


def open_table(
    task: Task, given: Mapping[str, str], root: Path | None, limit: int | None, out: Path
) -> Table:
    """The rows of a task, from where they are said to be.

    Raises:
        UserError: they are not there.
    """
    split, config = (task.hub.split, task.hub.config) if task.hub else ("test", None)
    if task.name in given:
        return open_local(Path(given[task.name]), split, config)
    if root is not None:
        path = next((p for kind in FILE_KINDS if (p := root / f"{task.name}{kind}").exists()), None)
        if path is None:
            raise UserError(
                f"{root} has no {task.name}, nor {task.name}.parquet or the like: give --data {task.name}=PATH"
            )
        return open_local(path, split, config)
    if task.hub is not None:
        return open_hub(task.hub.repo, task.hub.revision, split, config)
    return open_local(_made_small_world(out, limit), split)


def _made_small_world(out: Path, limit: int | None) -> Path:
    """The test split in the evaluation's own directory, made if need be."""
    from grace.data.small_world import SPLIT_SIZES, write_small_world

    size = limit or SPLIT_SIZES["test"]
    folder = out / f"small_world_{size}"
    if not folder.exists():
        try:
            write_small_world(folder, splits={"test": size})
        except ModuleNotFoundError as error:
            raise UserError(
                f"the small world is made with {error.name}: pip install 'grace[demo]', or give --data small_world=FILE"
            ) from error
    return folder / "test.json"


def run_task(
    asked: Asked, answerer: Answerer, out: Path, batch_size: int, advance: Advance
) -> dict[str, Any]:
    """Answers what is left of a task, batch by batch, and returns its entry of the results.

    Raises:
        UserError: a picture that cannot be read, or answers of something else in `out`.
    """
    task = asked.task
    file = SampleFile(out / f"{task.name}.jsonl")
    done = answered(file, asked.questions)
    todo = [question for question in asked.questions if question.id not in done]
    if done and todo:
        print(f"{task.name}: {len(done)} of {len(asked.questions)} are already answered", file=sys.stderr)
    pictures = checked_pictures(asked, todo, advance)
    require_same_pictures(file, done, pictures)
    for batch in batched(todo, batch_size):
        images = [[asked.pictures.image(picture) for picture in question.pictures] for question in batch]
        outputs = answerer.answer(batch, images)
        samples = [judged(q, output, pictures[q.id]) for q, output in zip(batch, outputs, strict=True)]
        file.add(samples)
        done |= {sample.id: sample for sample in samples}
        advance(task.name, len(done), len(asked.questions))
    return entry(asked, [done[question.id] for question in asked.questions])


def judge_given(asked: Asked, answerer: FileAnswerer, advance: Advance) -> list[Sample]:
    """The samples of answers that are already there.

    Raises:
        UserError: a picture that cannot be read.
    """
    pictures = checked_pictures(asked, asked.questions, advance)
    outputs = answerer.answer(asked.questions, [])
    return [judged(q, output, pictures[q.id]) for q, output in zip(asked.questions, outputs, strict=True)]


def checked_pictures(asked: Asked, todo: Sequence[Question], advance: Advance) -> dict[str, tuple[str, ...]]:
    """Of each question the digests of its pictures; all of `todo` are decoded once, so that a damaged one is found before
    the first answer.

    Raises:
        UserError: one cannot be.
    """
    needed = {picture for question in todo for picture in question.pictures}
    digests: dict[Picture, str] = {}
    for number, question in enumerate(asked.questions):
        for picture in question.pictures:
            if picture not in digests:
                digests[picture] = asked.pictures.digest(picture)
                if picture in needed:
                    asked.pictures.image(picture)
        advance(f"{asked.task.name} pictures", number + 1, len(asked.questions))
    return {question.id: tuple(digests[p] for p in question.pictures) for question in asked.questions}


def require_same_pictures(
    file: SampleFile, done: Mapping[str, Sample], pictures: Mapping[str, Sequence[str]]
) -> None:
    """What was answered was about these pictures.

    Raises:
        UserError: it was not.
    """
    for sample in done.values():
        if sample.pictures != " ".join(pictures[sample.id]):
            raise UserError(
                f"{file.path} holds the answer to id {sample.id!r} about another picture: choose another --out"
            )


def batched(questions: Sequence[Question], size: int) -> Iterator[list[Question]]:
    """Lists of at most `size`."""
    rest = iter(questions)
    while batch := list(itertools.islice(rest, size)):
        yield batch


def entry(asked: Asked, samples: Sequence[Sample]) -> dict[str, Any]:
    """A task's part of results.json; `data.sha256` is the same where questions, ids and pictures are."""
    task = asked.task
    lines = "".join(f"{sample.id}\0{sample.prompt_sha256}\0{sample.pictures}\n" for sample in samples)
    return {
        **scores(task, samples),
        "title": task.title,
        "source": task.source,
        "spec": task.spec(),
        "spec_sha256": task.spec_sha256,
        "data": {**asked.data, "sha256": hashlib.sha256(lines.encode("utf-8", "replace")).hexdigest()},
    }


def about_harness() -> dict[str, Any]:
    """What measured, for the results."""
    import importlib.metadata

    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "pillow")}
    return {"name": "grace eval", "version": HARNESS, "grace": __version__, **versions}
