"""Training records in the ShareGPT4V schema, checked before anything is computed from them.

A file is a JSON list of
    {"id": ..., "image": "path" | ["path", ...] | absent,
     "conversations": [{"from": "human" | "gpt" | "system", "value": "..."}, ...]}
and every `<image>` in a human turn stands for the next picture of the record.

Shape suffixes: N records.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np

from grace.data.annotations import KINDS, Advance, Annotations, open_annotations
from grace.data.faults import CLASSES, Policies
from grace.data.image_file import open_image, read_image
from grace.data.record_key import text_key
from grace.data.record_parse import IMAGE_MARK, Record, Role, Turn, check_marks
from grace.data.sampler import Mixture
from grace.errors import UserError

__all__ = [
    "IMAGE_MARK",
    "Record",
    "Records",
    "Role",
    "Turn",
    "check_marks",
    "load_records",
    "mixture_of",
    "open_image",
    "read_image",
    "text_keys",
    "text_length",
]


@dataclass(frozen=True)
class Source:
    """An annotation file and the folder that its image paths start from."""

    annotations: Annotations
    root: Path


class Records(Sequence[Record]):
    """Records of one file or several; each is made when it is asked for.

    Attributes:
        sources: the files.
        source_N, entry_N: of each record its file, and its place there.
        mixture: how an epoch takes them.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        source_N: np.ndarray,
        entry_N: np.ndarray,
        mixture: Mixture | None = None,
    ):
        self.sources, self.source_N, self.entry_N = tuple(sources), source_N, entry_N
        self.mixture = mixture

    @classmethod
    def joined(cls, parts: Sequence["Records"], takes: Sequence[int]) -> "Records":
        """All records of the parts, one part after the other; `takes` says how many of each an epoch takes."""
        starts = np.cumsum([0, *(len(part.sources) for part in parts)])
        return cls(
            [source for part in parts for source in part.sources],
            np.concatenate([part.source_N + start for part, start in zip(parts, starts, strict=False)]),
            np.concatenate([part.entry_N for part in parts]),
            Mixture(tuple(len(part) for part in parts), tuple(takes)),
        )

    def __len__(self) -> int:
        return len(self.entry_N)

    @overload
    def __getitem__(self, at: int) -> Record: ...
    @overload
    def __getitem__(self, at: slice) -> "Records": ...

    def __getitem__(self, at: int | slice) -> "Record | Records":
        if isinstance(at, slice):
            return self.chosen(np.arange(len(self))[at])
        source = self.sources[self.source_N[at]]
        record = source.annotations.parsed(int(self.entry_N[at]), source.root).record
        if record is None:  # it was one when the file was read
            raise source.annotations.damaged()
        return record

    def chosen(self, at_M: np.ndarray) -> "Records":
        """The records at these places."""
        return Records(self.sources, self.source_N[at_M], self.entry_N[at_M])

    def __iter__(self) -> Iterator[Record]:
        return (self[i] for i in range(len(self)))

    def __eq__(self, other: Any) -> bool:
        return (
            isinstance(other, Sequence)
            and len(self) == len(other)
            and all(a == b for a, b in zip(self, other, strict=True))
        )

    __hash__ = None  # type: ignore[assignment]

    def text_keys(self) -> list[bytes]:
        """`text_key` of every record, without making any."""
        keys_N8 = np.empty((len(self), 8), dtype=np.uint8)
        for i, source in enumerate(self.sources):
            chosen_N = self.source_N == i
            keys_N8[chosen_N] = source.annotations.index.keys_N8[self.entry_N[chosen_N]]
        whole = keys_N8.tobytes()
        return [whole[i : i + 8] for i in range(0, len(whole), 8)]


def load_records(
    path: str | Path,
    image_root: str | Path | None = None,
    policies: Policies | None = None,
    left_out: Collection[int] = (),
    skipped: Counter[str] | None = None,
    advance: Advance = lambda done, total: None,
) -> Records:
    """Reads and checks a ShareGPT4V file; pictures are not opened.

    Args:
        path: the JSON file.
        image_root: folder that relative image paths start from; None is the file's own folder.
        policies: which faults cost a record; by default none does.
        left_out: indices of entries not to use, whatever is wrong with them.
        skipped: counts up, by class of fault, the records that `policies` leave out beyond those.
        advance: as of `open_annotations`.

    Raises:
        UserError: the file or a record that is not left out is malformed, naming both, or none remains.
    """
    path = Path(path)
    root = path.parent if image_root is None else Path(image_root)
    annotations = open_annotations(path, advance)
    wanted_N = np.ones(len(annotations), dtype=bool)
    wanted_N[[i for i in left_out if 0 <= i < len(annotations)]] = False
    skipped_N = annotations.index.skipped_N(policies or Policies())
    if skipped is not None:
        skipped.update(KINDS[kind] for kind in skipped_N[wanted_N] if kind >= 0)
    wanted_N &= skipped_N < 0
    for index in np.flatnonzero(wanted_N & ~annotations.index.usable_N).tolist():
        parsed = annotations.parsed(index, root)
        fault = next(fault for fault in parsed.faults if not CLASSES[fault.kind].usable)
        raise UserError(f"{path}: {name_of(parsed.id, index)}{fault.detail}")
    entry_N = np.flatnonzero(wanted_N)
    if not len(entry_N):
        raise UserError(f"{path}: data.skip leaves no record to train on")
    return Records([Source(annotations, root)], np.zeros(len(entry_N), dtype=np.int16), entry_N)


def name_of(record_id: str | None, index: int) -> str:
    """What to call a record in a message."""
    return f"record number {index}" if record_id is None else f"record {record_id}"


def text_length(record: Record) -> int:
    """Characters of a conversation: a cheap stand-in for its number of text tokens."""
    return sum(len(turn.text) for turn in record.turns)


def mixture_of(records: Sequence[Record]) -> Mixture:
    """How an epoch takes the records: each once, unless they were joined otherwise."""
    mixture = records.mixture if isinstance(records, Records) else None
    return mixture or Mixture.whole(len(records))


def text_keys(records: Sequence[Record]) -> list[bytes]:
    """`text_key` of every record; at once where they come from files."""
    return records.text_keys() if isinstance(records, Records) else [text_key(one) for one in records]
