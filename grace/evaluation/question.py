"""What a benchmark asks, how it is asked, and what its answers are worth: the shapes that the other files share.

A `Task` makes `Question`s of a dataset; a model's answer to one becomes a `Sample`; a task's `measure` makes `Unit`s of
all samples, whose mean is a score. Everything that a score depends on but model and data is in the task's `spec`.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from grace.evaluation.dataset import Table

# Goes up whenever a rule of this package changes that can change a score: of extraction, of counting, of a prompt.
HARNESS = 2
MCQ_RULES = "grace-letter-1"
YES_NO_RULES = "grace-yes-no-1"
OPEN_RULES = "mmmu-open-1"
EXACT_RULES = "exact-text-1"

# What lmms-eval gives Qwen3-VL (lmms_eval/models/simple/qwen3_vl.py at 75571cfe): 256 and 2048 tiles of 28 x 28.
MIN_PIXELS, MAX_PIXELS = 256 * 28 * 28, 1605632


@dataclass(frozen=True)
class Question:
    """One prompt and what counts as its answer.

    Attributes:
        id: unique within the task.
        prompt: with one `<image>` where each picture goes.
        pictures: where each picture is found: row and column, and its place in a list there.
        choices: texts of the options A, B, ...; empty where an answer is no letter.
        gold: a letter, "yes", "no", or the text; several texts where any of them is right.
        group: samples with the same group are no independent evidence; None takes the first picture's digest.
        labels: names that scores are broken down by, or counted together by.
        kind: how an answer is read.
        row: of the dataset, from 0, where that may stand for the id.
    """

    id: str
    prompt: str
    pictures: tuple["Picture", ...]
    choices: tuple[str, ...]
    gold: tuple[str, ...]
    group: str | None = None
    labels: Mapping[str, str] = dataclasses.field(default_factory=dict)
    kind: Literal["letter", "yes_no", "open", "exact"] = "letter"
    row: int | None = None

    @property
    def prompt_sha256(self) -> str:
        """Digest of all that the model is asked but the pictures, and of the gold answer."""
        parts = (self.prompt, self.choices, self.gold, self.kind)
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


@dataclass(frozen=True)
class Picture:
    """Where a picture is found: a cell of a table, and a place in the list there, if it is one."""

    row: int
    column: str
    place: int | None = None


@dataclass(frozen=True)
class Sample:
    """A judged answer, one line of a task's JSONL.

    Attributes:
        output: what the model said.
        extracted: what was read from it; None where nothing could be.
        pictures: short digests of the question's pictures, with a space between.
    """

    id: str
    prompt_sha256: str
    output: str
    extracted: str | None
    gold: str
    correct: bool
    group: str
    labels: Mapping[str, str]
    pictures: str = ""


@dataclass(frozen=True)
class Unit:
    """What a score is the mean of: a question, or several that count together.

    Attributes:
        key: unique within the metric.
        group: units of one group are drawn together by the bootstrap.
    """

    key: str
    value: float
    group: str
    labels: Mapping[str, str]


@dataclass(frozen=True)
class Decoding:
    """Greedy decoding, and how large pictures are; None keeps what the model's own processor says."""

    max_new_tokens: int
    min_pixels: int | None = MIN_PIXELS
    max_pixels: int | None = MAX_PIXELS


@dataclass(frozen=True)
class Hub:
    """A dataset on the Hugging Face Hub, at one commit."""

    repo: str
    revision: str
    split: str
    config: str | None = None


@dataclass(frozen=True)
class Task:
    """A benchmark.

    Attributes:
        source: where prompt and rules are published, and what was changed.
        prompts: the templates that `questions` fills in.
        rules: how answers are read.
        questions: all questions of a dataset, and how many rows were left out, by reason.
        measure: the metrics of a complete set of samples, `primary` among them.
        breakdown: labels by which the primary metric is broken down.
        family: of a question, what must be kept together when a run is limited to some.
    """

    name: str
    title: str
    source: str
    hub: Hub | None
    decoding: Decoding
    prompts: Mapping[str, str]
    rules: str
    primary: str
    questions: Callable[[Table], tuple[list[Question], Mapping[str, int]]]
    measure: Callable[[Sequence[Sample]], Mapping[str, list[Unit]]]
    breakdown: tuple[str, ...] = ()
    family: Callable[[Question], str] = lambda question: question.id

    def spec(self) -> dict[str, Any]:
        """Everything that a score depends on besides the model, its kernels and the data."""
        return {
            "task": self.name,
            "harness": HARNESS,
            "prompts": dict(self.prompts),
            "extraction": self.rules,
            "metric": self.primary,
            "decoding": {"greedy": True, **dataclasses.asdict(self.decoding)},
        }

    @property
    def spec_sha256(self) -> str:
        """Digest of `spec`: two scores with the same one were measured alike."""
        return hashlib.sha256(json.dumps(self.spec(), sort_keys=True).encode()).hexdigest()


def accuracy(samples: Sequence[Sample]) -> Mapping[str, list[Unit]]:
    """The metric of most tasks: each question counts by itself."""
    return {"accuracy": [Unit(s.id, float(s.correct), s.group, s.labels) for s in samples]}


def together(samples: Sequence[Sample], key: Callable[[Sample], str]) -> list[Unit]:
    """Units that are right where all their samples are; labels and group are those of the first."""
    families: dict[str, list[Sample]] = {}
    for sample in samples:
        families.setdefault(key(sample), []).append(sample)
    return [
        Unit(name, float(all(s.correct for s in family)), family[0].group, family[0].labels)
        for name, family in families.items()
    ]
