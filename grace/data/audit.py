"""Every record of a file checked before training: what is wrong with it, and how long it is.

The work is cut into chunks that worker processes share; results come back in the file's order, so
they do not depend on the number of workers.
"""

import json
import multiprocessing
import os
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from grace.data.annotations import Annotations, open_annotations
from grace.data.faults import CLASSES, Fault, Policies
from grace.data.image_check import check_image
from grace.data.record_parse import Parsed, parse_entry
from grace.data.template import count_tokens, image_token_count

CHUNK = 64  # records at a time: enough to share out the tokenizer's overhead
RECORDS_PER_WORKER = (
    20_000  # starting the processes takes some five seconds: below that it costs more than it saves
)
COUNTS = ("images", "turns", "tokens", "image_tokens", "supervised")
TEXT_ONLY, VIDEO, MALFORMED = "text only", "video", "malformed"


@dataclass(frozen=True)
class Finding:
    """A fault and the record it was found in; `index` is the record's place in its file, from 0."""

    index: int
    id: str | None
    source: str
    kind: str
    detail: str


@dataclass(frozen=True)
class FileAudit:
    """What a file holds.

    Attributes:
        path: the annotation file.
        sources: of each record, the folder of its first image.
        findings: in the order of the records.
        counts_NC: int32, for each record the columns `COUNTS`; 0 where training could not use it.
    """

    path: Path
    sources: list[str]
    findings: list[Finding]
    counts_NC: np.ndarray

    def column(self, name: str) -> np.ndarray:
        """One of `COUNTS` for every record."""
        return self.counts_NC[:, COUNTS.index(name)]

    def left_out(self, policies: Policies) -> dict[int, str]:
        """Index of each record that the policies leave out -> the class of fault that decides it."""
        chosen: dict[int, str] = {}
        for finding in self.findings:
            if policies.of(finding.kind) == "skip":
                chosen.setdefault(finding.index, finding.kind)
        return chosen

    def errors(self, policies: Policies) -> list[Finding]:
        """What stands in the way of training: faults under "error" in records that are not left out."""
        left_out = self.left_out(policies)
        return [f for f in self.findings if f.index not in left_out and policies.of(f.kind) == "error"]

    def used(self, policies: Policies) -> np.ndarray:
        """Indices of the records that training can use and is to use."""
        unusable = {finding.index for finding in self.findings if not CLASSES[finding.kind].usable}
        without = np.array(sorted(unusable | set(self.left_out(policies))), dtype=np.int64)
        return np.setdiff1d(np.arange(len(self.sources)), without)


def audit_file(
    path: str | Path,
    image_root: str | Path | None,
    processor: Any,
    max_length: int,
    deep: bool = False,
    workers: int | None = None,
    advance: Callable[[int, int], None] = lambda done, total: None,
    annotations: Annotations | None = None,
) -> FileAudit:
    """Checks every record of a ShareGPT4V file and every picture it names.

    Args:
        path: the JSON file.
        image_root: folder that image paths start from; None is the file's own.
        processor: counts the tokens.
        max_length: tokens beyond which a record is over-long.
        deep: decodes every picture, where otherwise headers and tails are read.
        workers: processes; None takes what the machine has and the records are worth.
        advance: called with the number of records done and their total.
        annotations: of the file, if they are open already.

    Raises:
        UserError: the file itself cannot be read.
    """
    path = Path(path)
    annotations = annotations or open_annotations(path)
    root = path.parent if image_root is None else Path(image_root)
    checker = Checker(root, processor, max_length, deep)
    total = len(annotations)
    count = workers or min(_cores(), max(1, total // RECORDS_PER_WORKER))
    chunks: dict[int, Chunk] = {}
    done = 0
    for start, chunk in _results(checker, tasks_of(annotations), count):
        chunks[start] = chunk
        done += len(chunk.sources)
        advance(done, total)
    ordered = [chunks[start] for start in sorted(chunks)]
    return FileAudit(
        path,
        [source for chunk in ordered for source in chunk.sources],
        [finding for chunk in ordered for finding in chunk.findings],
        np.concatenate([chunk.counts_NC for chunk in ordered]),
    )


# ---------------------------------------------------------------- one chunk

Task = tuple[int, list[str], list[bool]]  # place of the first entry, entries, whether their ids repeat


def tasks_of(annotations: Annotations) -> Iterator[Task]:
    """The entries of a file, `CHUNK` at a time, as they stand there."""
    for start in range(0, len(annotations), CHUNK):
        stop = min(start + CHUNK, len(annotations))
        repeats_N = annotations.index.repeats_N[start:stop]
        yield start, annotations.read(start, stop), repeats_N.tolist()


@dataclass(frozen=True)
class Chunk:
    """The part of a `FileAudit` that one task makes."""

    sources: list[str]
    findings: list[Finding]
    counts_NC: np.ndarray


@dataclass(frozen=True)
class Checker:
    """Checks chunks; all that a worker process needs to know."""

    root: Path
    processor: Any
    max_length: int
    deep: bool

    def check(self, task: Task) -> Chunk:
        """Faults, sources and counts of the entries of a task."""
        start, texts, repeats = task
        entries = [json.loads(text) for text in texts]
        parsed = [
            parse_entry(entry, self.root, repeat) for entry, repeat in zip(entries, repeats, strict=True)
        ]
        faults = [list(one.faults) for one in parsed]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, about what is reported as a fault here
            pictures = [self.pictures(one, faults[i]) for i, one in enumerate(parsed)]
        counts_NC = np.zeros((len(entries), len(COUNTS)), dtype=np.int32)
        conversations = {
            i: (one.record.turns, tokens)
            for i, (one, tokens) in enumerate(zip(parsed, pictures, strict=True))
            if one.record is not None and tokens is not None
        }
        counts = count_tokens(list(conversations.values()), self.processor)
        for (i, (turns, images)), one in zip(conversations.items(), counts, strict=True):
            if one.tokens > self.max_length:
                clause = f" has {one.tokens} tokens, more than data.max_length={self.max_length}"
                faults[i].append(Fault("over_long", clause))
            counts_NC[i] = (len(images), len(turns), one.tokens, one.image, one.supervised)
        sources = [source_of(entry, one) for entry, one in zip(entries, parsed, strict=True)]
        findings = [
            Finding(start + i, one.id, sources[i], fault.kind, fault.detail.lstrip(" ,:"))
            for i, one in enumerate(parsed)
            for fault in faults[i]
        ]
        return Chunk(sources, findings, counts_NC)

    def pictures(self, parsed: Parsed, faults: list[Fault]) -> list[int] | None:
        """Tokens of each picture of a record, None where one cannot be used; adds to `faults`."""
        if any(fault.kind == "url" for fault in faults):  # no file's name
            return None
        tokens: list[int] = []
        for name in parsed.image_names:
            picture = check_image(self.root / name, self.deep)
            faults += picture.faults
            if picture.size is None:
                continue
            try:
                tokens.append(image_token_count(picture.size, self.processor))
            except ValueError as error:
                faults.append(Fault("extreme_aspect", f"image {self.root / name} cannot be used ({error})"))
        return tokens if len(tokens) == len(parsed.image_names) else None


def source_of(entry: Any, parsed: Parsed) -> str:
    """Where a record comes from: the folder of its first image, at most two deep or down to `images`."""
    if parsed.image_names:
        parts = [part for part in PurePosixPath(parsed.image_names[0]).parent.parts if part != "/"]
        deep = parts.index("images") + 1 if "images" in parts else 2
        return "/".join(parts[:deep]).encode(errors="replace").decode() or "."
    if isinstance(entry, dict) and entry.get("video") is not None:
        return VIDEO
    return MALFORMED if not isinstance(entry, dict) or entry.get("image") else TEXT_ONLY


# ---------------------------------------------------------------- many chunks

_checker: Checker | None = None  # of a worker process


def _start_worker(checker: Checker) -> None:
    global _checker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _checker = checker


def _end_with_parent() -> None:
    """Ends this worker when the process it works for is gone, killed or not: nobody else would."""
    parent = multiprocessing.parent_process()
    assert parent is not None  # this is a worker
    parent.join()
    os._exit(1)


def _work(task: Task) -> Chunk:
    assert _checker is not None
    return _checker.check(task)


def _results(checker: Checker, tasks: Iterator[Task], workers: int) -> Iterator[tuple[int, Chunk]]:
    """Each task's place and result, in the order in which they are done."""
    if workers == 1:
        for task in tasks:
            yield task[0], checker.check(task)
        return
    context = multiprocessing.get_context("forkserver")  # forking this process would copy its threads' locks
    context.set_forkserver_preload([__name__, type(checker.processor).__module__])
    pool = ProcessPoolExecutor(workers, context, _start_worker, (checker,))
    try:
        running: dict[Future, int] = {}
        for task in tasks:
            running[pool.submit(_work, task)] = task[0]
            if len(running) >= 4 * workers:  # bounds what waits in the queue
                yield from _finished(running)
        while running:
            yield from _finished(running)
    finally:
        pool.shutdown(cancel_futures=True)


def _finished(running: dict[Future, int]) -> Iterator[tuple[int, Chunk]]:
    done, _ = wait(running, return_when=FIRST_COMPLETED)
    for future in done:
        yield running.pop(future), future.result()


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def by_source(audits: Sequence[FileAudit]) -> dict[str, Counter[str]]:
    """Source -> records that have each class of fault; every source is there, with its records under ""."""
    table: dict[str, Counter[str]] = {}
    for audit in audits:
        for source in audit.sources:
            table.setdefault(source, Counter())[""] += 1
        for source, kind, _ in {(f.source, f.kind, f.index) for f in audit.findings}:
            table[source][kind] += 1
    return dict(sorted(table.items()))
