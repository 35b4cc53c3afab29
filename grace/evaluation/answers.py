"""Who answers: a model, or a file of answers that someone else's model gave."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from grace.errors import UserError
from grace.evaluation.question import Question, Task
from grace.evaluation.tasks import TASKS, mmbench
from grace.files import sha256_of

IDS = ("id", "index", "question_id")
OUTPUTS = ("output", "prediction", "response")


class Answerer(Protocol):
    """Answers questions.

    Attributes:
        about: what it is, for results and for telling two apart.
    """

    @property
    def about(self) -> Mapping[str, Any]: ...

    def begin(self, task: Task) -> None:
        """What comes next are questions of this task."""
        ...

    def answer(self, questions: Sequence[Question], images: Sequence[Sequence[Image.Image]]) -> list[str]:
        """An answer to each question about its pictures."""
        ...


class ModelAnswerer:
    """A GRACE, plain or packed checkpoint, on the GPU if there is one.

    Args:
        batch_size: the most questions at a time.

    Raises:
        UserError: it cannot be loaded.
    """

    def __init__(self, directory: Path, kernel: str, batch_size: int):
        import torch
        import transformers

        from grace.runtime.engine import load
        from grace.runtime.int4_linear import describe_kernels

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.directory = directory
        self.engine = load(directory, kernel=kernel, rows=batch_size, device=device)
        self.about = {
            "path": str(directory),
            "kind": self.engine.kind,
            "sha256": directory_sha256(directory),
            "dtype": str(self.engine.model.dtype).removeprefix("torch."),
            "kernels": describe_kernels(self.engine.model),
            "device": device,
        }
        self.processor: Any = self.engine.processor
        self.max_new_tokens = 1

    def begin(self, task: Task) -> None:
        """Takes over the task's pixel budget and length of answers."""
        from grace.models.processor import load_processor

        decoding = task.decoding
        self.processor = load_processor(self.directory, decoding.min_pixels, decoding.max_pixels)
        self.max_new_tokens = decoding.max_new_tokens

    def answer(self, questions: Sequence[Question], images: Sequence[Sequence[Image.Image]]) -> list[str]:
        """Greedy answers."""
        from grace.evaluation.batch_answers import greedy_answers

        prompts = [question.prompt for question in questions]
        return greedy_answers(self.engine.decoder, self.processor, prompts, images, self.max_new_tokens)


def directory_sha256(directory: Path) -> str:
    """Digest of all files of a model, names and contents, but for texts: a card is written after the evaluation."""
    digest = hashlib.sha256()
    for path in sorted(directory.rglob("*")):
        if path.is_file() and path.suffix != ".md" and not path.name.startswith("."):
            digest.update(f"{path.relative_to(directory)}\0{sha256_of(path)}\n".encode())
    return digest.hexdigest()


# ---------------------------------------------------------------- answers from a file


@dataclass(frozen=True)
class Given:
    """A line of a file of answers; `task` is None where it does not say."""

    task: str | None
    id: str
    output: str


class FileAnswerer:
    """Answers that are already there: a JSON object a line, with `id` and `output`, and `task` where there are several.

    Raises:
        UserError: the file cannot be read or has a wrong line.
    """

    def __init__(self, path: Path):
        self.path, self.given = path, read_answers(path)
        self.about = {"path": str(path), "kind": "predictions", "sha256": sha256_of(path)}
        self.outputs: dict[str, str] = {}
        self._unnamed = {one.id for one in self.given if one.task is None}
        self._used: dict[str, str] = {}  # ids of those: the task that took the answer

    def begin(self, task: Task) -> None:
        """Takes the task's answers out of the file.

        Raises:
            UserError: two with the same id.
        """
        self.outputs = {}
        for one in self.given:
            mine = one.task in (None, task.name)
            if mine and self.outputs.setdefault(one.id, one.output) != one.output:
                raise UserError(f"{self.path} has two answers for id {one.id} of {task.name}: leave one")

    def fitting(self, task: Task, questions: Sequence[Question]) -> tuple[Task, list[Question]]:
        """The questions, all of which have an answer. Of MMBench only those without rotation, if no rotation has one.

        Raises:
            UserError: an answer is missing.
        """
        asked = list(questions)
        if task.name == "mmbench":
            base = [question for question in asked if question.id == question.labels["base"]]
            turned = {question.id for question in asked} - {question.id for question in base}
            if turned and turned.isdisjoint(self.outputs):
                task, asked = mmbench.VANILLA, base
        missing = [question.id for question in asked if self._name(question) not in self.outputs]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise UserError(
                f"{self.path} has no answer for id {missing[0]!r} of {task.name}{more}: "
                'give a line {"id": ..., "output": ...} for each'
            )
        for name in self._unnamed.intersection(map(self._name, asked)):
            other = self._used.setdefault(name, task.name)
            if other != task.name:
                raise UserError(
                    f'{self.path}: the answer with id {name!r} may be to {other} or to {task.name}: add "task" to its line'
                )
        return task, asked

    def _name(self, question: Question) -> str:
        """The id under which the file has the answer."""
        return question.id if question.id in self.outputs or question.row is None else str(question.row)

    def answer(self, questions: Sequence[Question], images: Sequence[Sequence[Image.Image]]) -> list[str]:
        """What the file says."""
        return [self.outputs[self._name(question)] for question in questions]


def read_answers(path: Path) -> list[Given]:
    """All lines of a file of answers.

    Raises:
        UserError: it cannot be read, or a line lacks an id or an output.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): give --predictions a JSONL file") from error
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
            name = next(values[key] for key in IDS if key in values)
            output = next(values[key] for key in OUTPUTS if key in values)
            if name is None or values.get("task") not in (None, "", *TASKS):
                raise ValueError("no id, or no such task")
        except (ValueError, TypeError, StopIteration, AttributeError, RecursionError) as error:
            raise UserError(
                f'{path}: line {number} is no answer: write {{"id": ..., "output": "..."}}, and "task" where there are several'
            ) from error
        found.append(Given(values.get("task") or None, str(name), "" if output is None else str(output)))
    if not found:
        raise UserError(f"{path} holds no answers: write a JSON object with id and output a line")
    return found
