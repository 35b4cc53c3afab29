"""`grace generate DIR --batch IN --out OUT`: a file of requests, one JSON object a line.

A request has an "id" (its line number where it has none), and a "prompt" with "images" or "messages" of "role" and
"content"; settings such as "temperature" override the command line's. OUT gets a line per answer, synced to disk as it
is done, in the order in which they are done. Run again after a kill, the command answers what is missing.
"""

import argparse
import fcntl
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, BinaryIO

from grace.data.records import IMAGE_MARK, Turn
from grace.data.template import Sample
from grace.errors import UserError
from grace.progress import progress
from grace.runtime.engine import Engine, load, question
from grace.runtime.rows import Finished, answers
from grace.runtime.sampling import Sampling

ROWS = 4  # decoded together unless told otherwise
_SETTINGS = {field.name for field in fields(Sampling)}
_ANSWER = b'{"id": '  # what its line begins with
_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Request:
    """One line of the input.

    Attributes:
        mark: changes with the request or its settings.
    """

    id: str
    turns: tuple[Turn, ...]
    images: tuple[str, ...]
    sampling: Sampling
    mark: str


def run_batch(args: argparse.Namespace, sampling: Sampling) -> int:
    """Entry point of `grace generate --batch`."""
    requests = read_requests(args.batch, sampling, args.system)
    if args.out.exists() and args.out.samefile(args.batch):
        raise UserError(f"{args.out} holds the requests: choose another --out")
    with _opened(args.out) as out:
        done = _answered(out, args.out, {request.id: request for request in requests})
        todo = [request for request in requests if request.id not in done]
        if done:
            print(f"{len(done)} of {len(requests)} answers are there already", file=sys.stderr)
        failed = 0
        if todo:
            rows = min(args.rows or ROWS, len(todo))
            engine = load(
                args.directory,
                kernel=args.kernel,
                context=args.context,
                rows=rows,
                device=args.device,
                head=args.head,
            )
            with progress("generate", "requests") as advance:
                failed = answer_all(engine, todo, out, lambda n: advance("", n, len(todo)))
    if args.json:
        print(json.dumps({"requests": len(requests), "answered": len(requests) - failed, "failed": failed}))
    if failed:
        raise UserError(
            f"{failed} of {len(requests)} requests failed: {args.out} says why; run again to retry them"
        )
    return 0


def answer_all(engine: Engine, requests: list[Request], out: BinaryIO, advance: Callable[[int], None]) -> int:
    """Appends an answer or an error for each request; how many failed."""
    failed: list[Finished[Request]] = []

    def encoded() -> Iterator[tuple[Request, Sample, Sampling]]:
        for request in requests:
            try:
                yield request, engine.encode(request.turns, request.images), request.sampling
            except UserError as error:
                failed.append(Finished(request, error=str(error)))

    count = written = 0

    def write(answer: Finished[Request]) -> None:
        nonlocal count
        about = asdict(replace(answer, key=None))  # type: ignore[arg-type]
        about = {name: value for name, value in about.items() if name != "key"}
        if answer.error is None:
            del about["error"]
        else:
            about = {"error": answer.error}
        line = json.dumps({"id": answer.key.id, **about, "request": answer.key.mark}, ensure_ascii=False)
        out.write(line.encode() + b"\n")
        out.flush()
        os.fsync(out.fileno())
        count += 1
        advance(count)

    bad = 0
    for answer in answers(engine, encoded()):
        bad += answer.error is not None
        write(answer)
        while written < len(failed):
            write(failed[written])
            written += 1
    for answer in failed[written:]:
        write(answer)
    return bad + len(failed)


# ---------------------------------------------------------------- input


def read_requests(path: Path, sampling: Sampling, system: str | None = None) -> list[Request]:
    """All requests of a file, checked; no picture is opened.

    Raises:
        UserError: it cannot be read, is empty, or a line is no request; names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # a text may hold other line ends
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise UserError(
            f"{path} cannot be read ({reason}): give a file of JSON lines with --batch"
        ) from error
    found: dict[str, Request] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            request = _request(json.loads(line), str(number), sampling, system)
        except (ValueError, OverflowError, RecursionError, UserError) as error:
            raise UserError(f"{path}, line {number}: {error}") from error
        if request.id in found:
            raise UserError(f"{path}, line {number}: the id {request.id!r} occurs twice: give each its own")
        found[request.id] = request
    if not found:
        raise UserError(f"{path} holds no requests: write one JSON object a line")
    return [*found.values()]


def _request(entry: Any, default_id: str, sampling: Sampling, system: str | None) -> Request:
    if not isinstance(entry, dict):
        raise ValueError("a JSON object is needed")
    json.dumps(entry, ensure_ascii=False).encode()  # half a surrogate pair is no text
    known = {"id", "prompt", "messages", "image", "images", *_SETTINGS}
    if unknown := [name for name in entry if name not in known]:
        raise ValueError(f"unknown field {unknown[0]!r}: known are {', '.join(sorted(known))}")
    request_id = entry.get("id", default_id)
    if isinstance(request_id, bool) or not isinstance(request_id, str | int):
        raise ValueError("its id must be a text or a number")
    images = entry.get("images", entry.get("image", []))
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(
        isinstance(name, str) and name not in ("", "-") for name in images
    ):
        raise ValueError('"images" must be a list of files or URLs')
    settings = {name: entry[name] for name in _SETTINGS & entry.keys()}
    if isinstance(settings.get("stop"), str):
        settings["stop"] = [settings["stop"]]
    own = replace(sampling, **{name: _typed(name, value) for name, value in settings.items()})
    turns = _turns(entry, len(images))
    if system and turns[0].role != "system":
        turns = [Turn("system", system), *turns]
    asked = {"turns": [asdict(turn) for turn in turns], "images": images, "sampling": asdict(own)}
    mark = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]
    return Request(str(request_id), tuple(turns), tuple(images), own, mark)


def _typed(name: str, value: Any) -> Any:
    if name == "stop":
        if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
            raise ValueError('"stop" must be a text or a list of texts')
        return tuple(value)
    whole = name in ("max_new_tokens", "top_k", "seed")
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        raise ValueError(f'"{name}" must be a {"whole " if whole else ""}number')
    return value


def _turns(entry: dict[str, Any], pictures: int) -> list[Turn]:
    if ("prompt" in entry) == ("messages" in entry):
        raise ValueError('give one of "prompt" and "messages"')
    if "prompt" in entry:
        if not isinstance(entry["prompt"], str):
            raise ValueError('"prompt" must be a text')
        return [question(entry["prompt"], pictures)]
    messages = entry["messages"]
    if not isinstance(messages, list) or not messages:
        raise ValueError('"messages" must be a list')
    turns = []
    for message in messages:
        role, content = (
            (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        )
        if role not in _ROLES or not isinstance(content, str):
            raise ValueError(f'a message needs a "role" of {", ".join(_ROLES)} and a text as "content"')
        turns.append(Turn(role, content))
    if turns[-1].role != "user":
        raise ValueError("the last message must be the user's")
    if pictures and not any(IMAGE_MARK in turn.text for turn in turns if turn.role == "user"):
        first = next(index for index, turn in enumerate(turns) if turn.role == "user")
        turns[first] = question(turns[first].text, pictures)
    return turns


# ---------------------------------------------------------------- output


def _opened(path: Path) -> BinaryIO:
    """The output, to read and append to, for this process alone.

    Raises:
        UserError: it cannot be written to, or another run does.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        out = path.open("a+b")
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}): choose another --out") from error
    try:
        fcntl.flock(out, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        out.close()
        raise UserError(f"{path} is in use by another run: wait for it, or choose another --out") from error
    return out


def _answered(out: BinaryIO, path: Path, requests: dict[str, Request]) -> set[str]:
    """Ids that have an answer. A last line that a kill cut off is removed.

    Raises:
        UserError: lines of something else, or answers to requests that have changed since.
    """
    out.seek(0)
    *lines, rest = out.read().split(b"\n")
    done = set()
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            request_id, mark, answered = entry["id"], entry["request"], "error" not in entry
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}, line {number}, is not an answer of this command: choose another --out"
            ) from error
        if answered and request_id in requests:
            if requests[request_id].mark != mark:
                raise UserError(
                    f"{path} holds an answer to another request with the id {request_id!r}, or with other "
                    "settings: choose another --out"
                )
            done.add(request_id)
    if rest and not _is_cut_off(rest):
        raise UserError(f"{path} does not end as a file of answers does: choose another --out")
    out.truncate(sum(len(line) + 1 for line in lines))
    return done


def _is_cut_off(line: bytes) -> bool:
    """Whether a line without an end is the beginning of an answer."""
    try:
        json.loads(line)
    except ValueError:
        return _ANSWER.startswith(line[: len(_ANSWER)])
    return line.startswith(_ANSWER) and b'"request": ' in line  # all but the line's end
