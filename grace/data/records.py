"""Training records in the ShareGPT4V schema, checked before anything is computed from them.

A file is a JSON list of
    {"id": ..., "image": "path" | ["path", ...] | absent,
     "conversations": [{"from": "human" | "gpt" | "system", "value": "..."}, ...]}
and every `<image>` in a human turn stands for the next picture of the record.
"""

import json
import os
import stat
import struct
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

from PIL import Image

from grace.data.faults import CLASSES, Policies
from grace.data.record_parse import IMAGE_MARK, Record, Role, Turn, check_marks, parse_entries
from grace.errors import UserError

__all__ = [
    "IMAGE_MARK",
    "Record",
    "Role",
    "Turn",
    "check_marks",
    "load_records",
    "open_image",
    "read_entries",
    "read_image",
    "text_length",
]


def load_records(
    path: str | Path,
    image_root: str | Path | None = None,
    policies: Policies | None = None,
    left_out: Collection[int] = (),
    skipped: Counter[str] | None = None,
) -> list[Record]:
    """Reads and checks a ShareGPT4V file; pictures are not opened.

    Args:
        path: the JSON file.
        image_root: folder that relative image paths start from; None is the file's own folder.
        policies: which faults cost a record; by default none does.
        left_out: indices of entries not to use, whatever is wrong with them.
        skipped: counts up, by class of fault, the records that `policies` leave out beyond those.

    Raises:
        UserError: the file or a record that is not left out is malformed, naming both, or none remains.
    """
    path = Path(path)
    root = path.parent if image_root is None else Path(image_root)
    policies = policies or Policies()
    records = []
    for index, parsed in enumerate(parse_entries(read_entries(path), root)):
        if index in left_out:
            continue
        if (kind := policies.skips(parsed.faults)) is not None:
            if skipped is not None:
                skipped[kind] += 1
            continue
        if parsed.record is None:
            fault = next(fault for fault in parsed.faults if not CLASSES[fault.kind].usable)
            raise UserError(f"{path}: {name_of(parsed.id, index)}{fault.detail}")
        records.append(parsed.record)
    if not records:
        raise UserError(f"{path}: data.skip leaves no record to train on")
    return records


def read_entries(path: Path) -> list[Any]:
    """The entries of a ShareGPT4V file, unchecked.

    Raises:
        UserError: not a readable, non-empty JSON list.
    """
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
    return entries


def name_of(record_id: str | None, index: int) -> str:
    """What to call a record in a message."""
    return f"record number {index}" if record_id is None else f"record {record_id}"


def open_image(path: Path, record_id: str) -> Image.Image:
    """Opens and fully decodes a picture as RGB.

    Raises:
        UserError: missing, unreadable, truncated or too large; the message names the file and the record.
    """
    limit = Image.MAX_IMAGE_PIXELS
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for ever
            raise OSError("it is not a file")
        with Image.open(path) as image:
            if limit is not None and image.width * image.height > limit:  # Pillow itself stops at twice that
                raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels, limit {limit}")
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
