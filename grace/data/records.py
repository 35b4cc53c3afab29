"""Training records in the ShareGPT4V schema, checked before anything is computed from them.

A file is a JSON list of
    {"id": ..., "image": "path" | ["path", ...] | absent,
     "conversations": [{"from": "human" | "gpt" | "system", "value": "..."}, ...]}
and every `<image>` in a human turn stands for the next picture of the record.
"""

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from grace.errors import UserError

IMAGE_MARK = "<image>"
Role = Literal["user", "assistant", "system"]
_ROLES: dict[str, Role] = {"human": "user", "gpt": "assistant", "system": "system"}


@dataclass(frozen=True)
class Turn:
    """One utterance. `text` keeps its `<image>` marks; they count in user turns only."""

    role: Role
    text: str


@dataclass(frozen=True)
class Record:
    """One conversation about zero or more pictures, in the order of their `<image>` marks."""

    id: str
    images: tuple[Path, ...]
    turns: tuple[Turn, ...]


def load_records(path: str | Path, image_root: str | Path | None = None) -> list[Record]:
    """Reads and checks a ShareGPT4V file; pictures are not opened.

    Args:
        path: the JSON file.
        image_root: folder that relative image paths start from; None is the file's own folder.

    Raises:
        UserError: the file or a record is malformed; the message names both.
    """
    path = Path(path)
    root = path.parent if image_root is None else Path(image_root)
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist: set data.path to a ShareGPT4V JSON file") from error
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}): set data.path to a ShareGPT4V JSON file"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not readable JSON ({error}): download or write it again") from error
    if not isinstance(entries, list):
        raise UserError(f"{path} holds a JSON {type(entries).__name__}: a list of records is needed")
    if not entries:
        raise UserError(f"{path} holds no records: a non-empty list is needed")
    return [_record(entry, index, root, path) for index, entry in enumerate(entries)]


def open_image(path: Path, record_id: str) -> Image.Image:
    """Opens and fully decodes a picture as RGB.

    Raises:
        UserError: missing, unreadable or truncated; the message names the file and the record.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError as error:
        raise UserError(
            f"record {record_id}: image {path} does not exist: restore it or drop the record"
        ) from error
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError) as error:
        raise UserError(
            f"record {record_id}: image {path} cannot be decoded ({error}): replace it or drop the record"
        ) from error


def read_image(path: Path, record_id: str) -> bytes:
    """The bytes of a picture's file.

    Raises:
        UserError: missing or unreadable; the message names the file and the record.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(
            f"record {record_id}: image {path} cannot be read ({error.strerror}): restore it or drop the record"
        ) from error


def text_length(record: Record) -> int:
    """Characters of a conversation: a cheap stand-in for its number of text tokens."""
    return sum(len(turn.text) for turn in record.turns)


def check_marks(turns: tuple[Turn, ...], images: int) -> str | None:
    """What is wrong between `<image>` marks and pictures, or None."""
    marks = sum(turn.text.count(IMAGE_MARK) for turn in turns if turn.role == "user")
    if marks == images:
        return None
    return f"{marks} {IMAGE_MARK} mark{'s' * (marks != 1)} in its human turns but {images} image{'s' * (images != 1)}"


def _record(entry: Any, index: int, root: Path, path: Path) -> Record:
    """One checked record of `path`, the `index`-th from 0."""
    where = f"{path}: record number {index}"
    if not isinstance(entry, dict):
        raise UserError(f"{where} is a JSON {type(entry).__name__}: an object is needed")
    record_id = entry.get("id")
    if isinstance(record_id, bool) or not isinstance(record_id, str | int) or record_id == "":
        raise UserError(f'{where} has no "id": give every record a text or a number')
    where = f"{path}: record {record_id}"
    if "conversations" not in entry:
        raise UserError(f'{where} has no "conversations": a list of turns is needed')
    turns = _turns(entry["conversations"], where)
    images = tuple(root / name for name in _image_names(entry.get("image"), where))
    if fault := check_marks(turns, len(images)):
        raise UserError(f"{where} has {fault}: write one {IMAGE_MARK} for each image")
    return Record(str(record_id), images, turns)


def _image_names(value: Any, where: str) -> list[str]:
    names = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise UserError(f'{where} has an "image" that is neither a path nor a list of paths')
    return names


def _turns(conversation: Any, where: str) -> tuple[Turn, ...]:
    """Checked turns: an optional system turn, then human and gpt in alternation, gpt last."""
    if not isinstance(conversation, list) or not conversation:
        raise UserError(
            f'{where} has an empty or malformed "conversations": a non-empty list of turns is needed'
        )
    turns = tuple(_turn(entry, f"{where}, turn {index}") for index, entry in enumerate(conversation))
    spoken = turns[1:] if turns[0].role == "system" else turns
    for index, turn in enumerate(spoken):
        expected = "assistant" if index % 2 else "user"
        if turn.role != expected:
            raise UserError(
                f"{where} has a {turn.role} turn where a {expected} turn must stand: "
                "after an optional system turn, human and gpt alternate"
            )
    if not spoken or spoken[-1].role != "assistant":
        raise UserError(
            f"{where} does not end with a gpt turn: there is nothing to learn from its last question"
        )
    return turns


def _turn(entry: Any, where: str) -> Turn:
    if not isinstance(entry, dict) or "from" not in entry or "value" not in entry:
        raise UserError(f'{where} is not an object with "from" and "value"')
    role = _ROLES.get(entry["from"]) if isinstance(entry["from"], str) else None
    if role is None:
        raise UserError(f"{where} is from {entry['from']!r}: only {', '.join(_ROLES)} are known")
    if not isinstance(entry["value"], str) or not entry["value"].strip():
        raise UserError(f"{where} has no text: drop the turn or the record")
    return Turn(role, entry["value"])
