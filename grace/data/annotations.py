"""The entries of an annotation file as texts, with an index of what every process needs to know of all of them.

A file is read once, entry by entry (`grace.data.json_list`). A small one is then held in memory as it is; a large
one lies in an Arrow table that is mapped from disk (`grace.data.arrow_table`), where `datasets` is installed. Either
way an entry is understood when it is asked for, and the same things come out.

Shape suffixes: N entries, 8 bytes, F faults.
"""

import array
import hashlib
import importlib.util
import itertools
import json
import stat
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from grace.data.faults import CLASSES, Policies
from grace.data.json_list import NotAList, stream_entries
from grace.data.record_key import TEXT_BYTES, text_key
from grace.data.record_parse import Parsed, entry_id, parse_entry
from grace.errors import UserError

IN_MEMORY = 16_000_000  # bytes of a file that is not worth a table
KINDS = tuple(CLASSES)  # a class of fault by its number in the index
DUPLICATE = KINDS.index("duplicate_id")

Advance = Callable[[int, int], None]  # bytes read, bytes in all


class Texts(Protocol):
    """The entries' texts, in order."""

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> list[str]:
        """Those of `start` up to, not including, `stop`."""
        ...


@dataclass(frozen=True)
class Index:
    """What is known of all entries of a file.

    Attributes:
        keys_N8: uint8, `text_key` of each record; 0 where training could not use it.
        checks_N: uint32, CRC-32 of each text.
        usable_N: bool, whether it could, as far as the entry shows.
        repeats_N: bool, whether an earlier entry has the same id.
        fault_rows_F, fault_kinds_F: int64 entry and uint8 number in `KINDS` of each fault but duplicate ids,
            in the order in which `parse_entry` finds them.
    """

    keys_N8: np.ndarray
    checks_N: np.ndarray
    usable_N: np.ndarray
    repeats_N: np.ndarray
    fault_rows_F: np.ndarray
    fault_kinds_F: np.ndarray

    def skipped_N(self, policies: Policies) -> np.ndarray:
        """For each entry the number of the class for which it is left out, -1 if it is not."""
        numbers = [i for i, kind in enumerate(KINDS) if policies.of(kind) == "skip"]
        found_N = np.full(len(self.keys_N8), -1, dtype=np.int16)
        matters_F = np.isin(self.fault_kinds_F, numbers)
        rows, first = np.unique(self.fault_rows_F[matters_F], return_index=True)
        found_N[rows] = self.fault_kinds_F[matters_F][first]
        if DUPLICATE in numbers:  # found before the others
            found_N[self.repeats_N] = DUPLICATE
        return found_N


@dataclass(frozen=True)
class Annotations:
    """A file's entries.

    Attributes:
        origin: what to remove when the entries turn out to be damaged; None where they are read from `path` itself.
        note: a line for people about how the file is held, if it should be known.
    """

    path: Path
    texts: Texts
    index: Index
    origin: Path | None = None
    note: str | None = None

    def __len__(self) -> int:
        return len(self.texts)

    def read(self, start: int, stop: int) -> list[str]:
        """The texts of entries `start` up to, not including, `stop`.

        Raises:
            UserError: what was kept of them is damaged.
        """
        try:
            texts = self.texts.read(start, stop)
        except ValueError as error:  # not UTF-8
            raise self.damaged() from error
        if [zlib.crc32(text.encode()) for text in texts] != self.index.checks_N[start:stop].tolist():
            raise self.damaged()
        return texts

    def parsed(self, i: int, root: Path) -> Parsed:
        """Entry number `i` with its faults.

        Raises:
            UserError: what was kept of it is damaged.
        """
        (text,) = self.read(i, i + 1)
        return parse_entry(json.loads(text), root, bool(self.index.repeats_N[i]))

    def damaged(self) -> UserError:
        """What to raise where an entry is not what it was."""
        return UserError(f"what was kept of {self.path} is damaged: remove {self.origin}, it is made again")


def open_annotations(path: Path, advance: Advance = lambda done, total: None) -> Annotations:
    """The entries of a ShareGPT4V file.

    Args:
        advance: told of the reading of a large file that is not in a table yet.

    Raises:
        UserError: not a readable, non-empty JSON list; or no table can be written.
    """
    try:
        status = path.stat()
    except OSError:  # reading says what is wrong with it
        size = 0
    else:
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):  # a pipe would be waited for
            raise UserError(f"{path} is no regular file: give the JSON file itself")
        size = status.st_size
    if size <= IN_MEMORY:
        return in_memory(path, lambda done: None)
    if importlib.util.find_spec("datasets") is None:
        note = f"{path} is held in memory ({size / 1e6:,.0f} MB): with `pip install datasets` it is mapped from disk"
        return in_memory(path, lambda done: advance(done, size), note)
    from grace.data.arrow_table import open_table

    return open_table(path, lambda done: advance(done, size))


# ---------------------------------------------------------------- reading


@dataclass(frozen=True)
class TextsInMemory:
    """The texts one after the other, as UTF-8: no object for each, which processes could not share."""

    blob: bytes
    ends_N: np.ndarray

    def __len__(self) -> int:
        return len(self.ends_N)

    def read(self, start: int, stop: int) -> list[str]:
        """Those of `start` up to, not including, `stop`."""
        bounds = [int(self.ends_N[start - 1]) if start else 0, *self.ends_N[start:stop].tolist()]
        return [self.blob[a:b].decode() for a, b in itertools.pairwise(bounds)]


def in_memory(path: Path, advance: Callable[[int], None], note: str | None = None) -> Annotations:
    """The entries of a file, all of them held.

    Raises:
        UserError: as `read_texts`.
    """
    builder, blob, ends = IndexBuilder(), bytearray(), array.array("q")
    for text in read_texts(path, builder, advance):
        blob += text.encode()
        ends.append(len(blob))
    return Annotations(path, TextsInMemory(bytes(blob), np.array(ends)), builder.index(), note=note)


def read_texts(path: Path, builder: "IndexBuilder", advance: Callable[[int], None]) -> Iterator[str]:
    """Each entry's text, as it is added to the index.

    Raises:
        UserError: not a readable, non-empty JSON list.
    """
    count = 0
    try:
        for text, value in stream_entries(path, advance):
            builder.add(text, value)
            count += 1
            yield text
    except NotAList as error:
        raise UserError(f"{path} holds a JSON {error.kind}: a list of records is needed") from error
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist: set data.path to a ShareGPT4V JSON file") from error
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}): set data.path to a ShareGPT4V JSON file"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not readable JSON ({error}): download or write it again") from error
    if not count:
        raise UserError(f"{path} holds no records: a non-empty list is needed")


class IndexBuilder:
    """Makes an `Index` of entries that come one by one; about 30 bytes each."""

    def __init__(self) -> None:
        self.keys, self.ids = bytearray(), bytearray()
        self.usable, self.checks = bytearray(), array.array("I")
        self.fault_rows, self.fault_kinds = array.array("q"), bytearray()

    def add(self, text: str, value: Any) -> None:
        """The next entry: its text and its value."""
        parsed = parse_entry(value, Path())
        name = entry_id(value)
        # An entry without an id repeats none: its number stands for one, spelled as no id is.
        self.ids += _id_hash(f"{len(self.usable)}" if name is None else f"={name}")
        self.keys += bytes(TEXT_BYTES) if parsed.record is None else text_key(parsed.record)
        for fault in parsed.faults:
            self.fault_rows.append(len(self.usable))
            self.fault_kinds.append(KINDS.index(fault.kind))
        self.checks.append(zlib.crc32(text.encode()))
        self.usable.append(parsed.record is not None)

    def index(self) -> Index:
        """That of what was added."""
        ids_N2 = np.frombuffer(bytes(self.ids), dtype=np.uint64).reshape(-1, 2)
        order = np.lexsort((ids_N2[:, 0], ids_N2[:, 1]))  # stable: of equal ones the earliest comes first
        repeats_N = np.zeros(len(ids_N2), dtype=bool)
        repeats_N[order[1:]] = (ids_N2[order[1:]] == ids_N2[order[:-1]]).all(1)
        return Index(
            np.frombuffer(bytes(self.keys), dtype=np.uint8).reshape(-1, TEXT_BYTES),
            np.array(self.checks, dtype=np.uint32),
            np.frombuffer(bytes(self.usable), dtype=bool),
            repeats_N,
            np.array(self.fault_rows, dtype=np.int64),
            np.frombuffer(bytes(self.fault_kinds), dtype=np.uint8),
        )


def _id_hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
