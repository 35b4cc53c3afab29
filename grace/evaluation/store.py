"""What an evaluation keeps on disk, so that a kill costs one batch and nothing is mixed up.

OUT/run.json        the model, and the spec of each task that was begun
OUT/TASK.jsonl      a judged sample a line, in the order in which they were answered
OUT/results.json    scores of the finished tasks; OUT/results.md the same for people
"""

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from grace.errors import UserError
from grace.evaluation.question import Question, Sample, Task
from grace.evaluation.tasks import TASKS
from grace.files import sync, write_text

RUN_FILE, RESULTS_FILE, TABLE_FILE = "run.json", "results.json", "results.md"
_FIELDS = {field.name for field in dataclasses.fields(Sample)}


def claim(out: Path, model: Mapping[str, Any], tasks: Sequence[Task]) -> None:
    """Notes model and tasks in a directory that is locked.

    Raises:
        UserError: it holds answers of another model, or to a task as it was asked otherwise.
    """
    known = _begun(out) or {"model": dict(model), "specs": {}}
    before = known["model"]
    if identity(before) != identity(model):
        differ = [name for name in identity(model) if before.get(name) != model[name]]
        raise UserError(
            f"{out} holds answers of another model ({before.get('path')}; {', '.join(differ)} differ): choose another --out"
        )
    for task in tasks:
        before = known["specs"].setdefault(task.name, task.spec_sha256)
        if before != task.spec_sha256:
            raise UserError(
                f"{out} holds answers to {task.name} as asked under other settings (spec {before[:12]}, now "
                f"{task.spec_sha256[:12]}): choose another --out"
            )
    write_text(out / RUN_FILE, json.dumps(known, indent=1) + "\n")


def replace_answers(
    out: Path, model: Mapping[str, Any], answers: Sequence[tuple[Task, Sequence[Sample]]]
) -> None:
    """Puts complete answers in the place of all that are in a directory, but those of the same model to other tasks.

    Raises:
        UserError: the directory cannot be read.
    """
    known = _begun(out)
    if known is None or identity(known["model"]) != identity(model):
        known = {"model": dict(model), "specs": {}}
    (out / RESULTS_FILE).unlink(missing_ok=True)  # first: whatever a kill leaves has no scores
    (out / TABLE_FILE).unlink(missing_ok=True)
    for name in set(TASKS) - set(known["specs"]):
        (out / f"{name}.jsonl").unlink(missing_ok=True)
    for task, samples in answers:
        write_text(out / f"{task.name}.jsonl", "".join(map(_line, samples)))
        known["specs"][task.name] = task.spec_sha256
    write_text(out / RUN_FILE, json.dumps(known, indent=1) + "\n")


def _begun(out: Path) -> dict[str, Any] | None:
    """What run.json says, of tasks that have answers; None where there are none yet."""
    if not (out / RUN_FILE).exists():
        return None
    known = read_json(out / RUN_FILE)
    specs = {name: spec for name, spec in known["specs"].items() if (out / f"{name}.jsonl").exists()}
    return {**known, "specs": specs} if specs else None


def identity(model: Mapping[str, Any]) -> dict[str, Any]:
    """What tells two models apart: all but where they are."""
    return {name: value for name, value in model.items() if name != "path"}


def read_json(path: Path) -> Any:
    """A JSON file of ours.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): evaluate again into another --out") from error


class SampleFile:
    """A task's JSONL: read, mended after a kill, and added to."""

    def __init__(self, path: Path):
        self.path = path

    def read(self) -> dict[str, Sample]:
        """All samples by id; a last line without its end is cut off, on disk too.

        Raises:
            UserError: another line is damaged.
        """
        if not self.path.exists():
            return {}
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            with self.path.open("r+b") as file:
                file.truncate(whole)
            sync(self.path)
        return {sample.id: sample for sample in read_samples(self.path)}

    def add(self, samples: Iterable[Sample]) -> None:
        """Appends samples; they are on disk when this returns."""
        with self.path.open("ab") as file:
            file.writelines(_line(sample).encode() for sample in samples)
            file.flush()
            os.fsync(file.fileno())


def _line(sample: Sample) -> str:
    text = json.dumps(dataclasses.asdict(sample), ensure_ascii=False)
    return text.encode("utf-8", "replace").decode() + "\n"


def read_samples(path: Path) -> list[Sample]:
    """The samples of a task's JSONL.

    Raises:
        UserError: it is not there, or a line is damaged.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): give a directory of `grace eval`") from error
    samples = []
    for number, line in enumerate(lines[:-1] if lines and not lines[-1] else lines):
        try:
            values = json.loads(line)
            samples.append(Sample(**{name: values[name] for name in _FIELDS & values.keys()}))
        except (ValueError, AttributeError, TypeError) as error:
            raise UserError(
                f"{path}: line {number + 1} is damaged ({error}): remove the file to answer again"
            ) from error
    return samples


def answered(file: SampleFile, questions: Sequence[Question]) -> dict[str, Sample]:
    """The samples that are already there, all of them of these questions.

    Raises:
        UserError: one is of another question.
    """
    wanted = {question.id: question.prompt_sha256 for question in questions}
    known = file.read()
    for sample in known.values():
        if wanted.get(sample.id) != sample.prompt_sha256:
            what = "another question with" if sample.id in wanted else "a question that is not asked now,"
            raise UserError(
                f"{file.path} holds the answer to {what} id {sample.id!r} (other data, or a smaller --limit): "
                "choose another --out"
            )
    return known
