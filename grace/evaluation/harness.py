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
from grace.evaluation.question import HARNESS, Question, Sample, Task
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
    digest = hashlib.sha256("".join(question.prompt_sha256 for question in questions).encode()).hexdigest()
    data = {"source": table.origin, "sha256": digest, "left_out": dict(left_out), "limit": limit}
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
    groups = checked_groups(task, todo, asked.pictures, advance)
    for batch in batched(todo, batch_size):
        needed = not isinstance(answerer, FileAnswerer)
        images = [
            [asked.pictures.image(picture) for picture in question.pictures if needed] for question in batch
        ]
        outputs = answerer.answer(batch, images)
        samples = [judged(q, output, groups[q.id]) for q, output in zip(batch, outputs, strict=True)]
        file.add(samples)
        done |= {sample.id: sample for sample in samples}
        advance(task.name, len(done), len(asked.questions))
    return entry(task, [done[question.id] for question in asked.questions], asked.data)


def checked_groups(
    task: Task, questions: Sequence[Question], pictures: Pictures, advance: Advance
) -> dict[str, str]:
    """The group of each question; every picture is decoded once, so that a damaged one is found before the first answer.

    Raises:
        UserError: one cannot be.
    """
    digests: dict[Any, str] = {}
    groups = {}
    for number, question in enumerate(questions):
        for picture in question.pictures:
            if picture not in digests:
                digests[picture] = pictures.digest(picture)
        first = digests[question.pictures[0]] if question.pictures else question.id
        groups[question.id] = first if question.group is None else question.group
        advance(f"{task.name} pictures", number + 1, len(questions))
    return groups


def batched(questions: Sequence[Question], size: int) -> Iterator[list[Question]]:
    """Lists of at most `size`."""
    rest = iter(questions)
    while batch := list(itertools.islice(rest, size)):
        yield batch


def entry(task: Task, samples: Sequence[Sample], data: Mapping[str, Any]) -> dict[str, Any]:
    """A task's part of results.json."""
    return {
        **scores(task, samples),
        "title": task.title,
        "source": task.source,
        "spec": task.spec(),
        "spec_sha256": task.spec_sha256,
        "data": dict(data),
    }


def about_harness() -> dict[str, Any]:
    """What measured, for the results."""
    import importlib.metadata

    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "pillow")}
    return {"name": "grace eval", "version": HARNESS, "grace": __version__, **versions}
