"""An annotation file as an Arrow table on disk, mapped by every process that reads it.

HF_DATASETS_CACHE/grace/NAME-KEY/      KEY: of the file's path, size and times, and of FORMAT
    .lock                              held while the table is made
    table/  entries.arrow              one column: the entries' texts
            index.npz                  the `Index`
            table.json                 what the others must be
"""

import ctypes
import fcntl
import hashlib
import json
import mmap
import os
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from grace.data.annotations import Annotations, Index, IndexBuilder, read_texts
from grace.errors import UserError
from grace.files import new_directory, remove_leftovers, sha256_of

if TYPE_CHECKING:  # takes seconds, and a small file does without
    import pyarrow as pa

FORMAT = 2
ENTRIES, INDEX, SUMMARY, COLUMN = "entries.arrow", "index.npz", "table.json", "entry"
BATCH_ROWS, BATCH_BYTES = 4096, 32_000_000  # whichever comes first; few batches are quick to map
READS_HELD = 16  # each maps what the system holds around it, up to 2 MB


class TextsInTable:
    """The texts of a table's file.

    Pages that were read count as this process's memory until they are given back, though they are the system's to
    take: they are given back after `READS_HELD` reads.
    """

    def __init__(self, file: Path):
        self.file, self.reads = file, 0
        self.column = _mapped(file)
        buffers = [buffer for chunk in self.column.chunks for buffer in chunk.buffers() if buffer]
        first = min(buffer.address for buffer in buffers)
        self.start = first - first % mmap.PAGESIZE
        self.size = max(buffer.address + buffer.size for buffer in buffers) - self.start

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as the name of its file."""
        return TextsInTable, (self.file,)

    def __len__(self) -> int:
        return len(self.column)

    def read(self, start: int, stop: int) -> list[str]:
        """Those of `start` up to, not including, `stop`."""
        self.reads += 1
        if self.reads % READS_HELD == 0:  # advice, so that nothing depends on whether it is taken
            ctypes.CDLL(None).madvise(
                ctypes.c_void_p(self.start), ctypes.c_size_t(self.size), mmap.MADV_DONTNEED
            )
        return self.column.slice(start, stop - start).to_pylist()


def open_table(path: Path, advance: Callable[[int], None]) -> Annotations:
    """The table of an annotation file, made if it is not there; by one process, while others wait.

    Args:
        advance: told the number of bytes read while it is made.

    Raises:
        UserError: not a readable, non-empty JSON list; or the table cannot be written.
    """
    folder = table_folder(path)
    found = _opened(path, folder / "table")
    if found is not None:
        return found
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            found = _opened(path, folder / "table")  # another process may have made it meanwhile
            if found is None:
                remove_leftovers(folder)
                _remove(folder / "table")
                _make(path, folder / "table", advance)
                found = _opened(path, folder / "table")
    except OSError as error:
        raise UserError(
            f"cannot keep a table of {path} in {folder} ({error.strerror or error}): set HF_DATASETS_CACHE"
        ) from error
    if found is None:
        raise UserError(f"the table of {path} in {folder} is damaged as soon as it is made: check the disk")
    return found


def table_folder(path: Path) -> Path:
    """Where the table of a file, as it is now, belongs."""
    from datasets import config

    status = path.stat()
    known = (
        os.path.realpath(path), status.st_size, status.st_mtime_ns, status.st_ctime_ns, FORMAT,
    )  # fmt: skip
    key = hashlib.sha256(json.dumps(known).encode("utf-8", "surrogateescape")).hexdigest()[:16]
    return Path(config.HF_DATASETS_CACHE) / "grace" / f"{path.stem[:80]}-{key}"


def _make(path: Path, out: Path, advance: Callable[[int], None]) -> None:
    import pyarrow as pa

    schema = pa.schema([(COLUMN, pa.string())])
    builder = IndexBuilder()
    with new_directory(out, "HF_DATASETS_CACHE") as scratch:
        with pa.OSFile(str(scratch / ENTRIES), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            for rows in _batches(read_texts(path, builder, advance)):
                writer.write_batch(pa.record_batch([rows], schema=schema))
        index = builder.index()
        np.savez(scratch / INDEX, **vars(index))
        summary = {
            "format": FORMAT,
            "of": str(path.absolute()),
            "records": len(index.keys_N8),
            "bytes": (scratch / ENTRIES).stat().st_size,
            "index_sha256": sha256_of(scratch / INDEX),
        }
        (scratch / SUMMARY).write_text(json.dumps(summary, indent=1) + "\n")


def _batches(texts: Iterator[str]) -> Iterator[list[str]]:
    rows: list[str] = []
    size = 0
    for text in texts:
        rows.append(text)
        size += len(text)
        if len(rows) == BATCH_ROWS or size >= BATCH_BYTES:
            yield rows
            rows, size = [], 0
    if rows:
        yield rows


def _opened(path: Path, table: Path) -> Annotations | None:
    """What is in a table; None where it is absent or not what was written."""
    try:
        summary: Any = json.loads((table / SUMMARY).read_text())
        whole = (
            summary["bytes"] == (table / ENTRIES).stat().st_size
            and summary["index_sha256"] == sha256_of(table / INDEX)
        )  # fmt: skip
        if not whole:
            return None
        with np.load(table / INDEX) as arrays:
            index = Index(**arrays)
        texts = TextsInTable(table / ENTRIES)
        if not len(texts) == summary["records"] == len(index.keys_N8) or not _in_bounds(texts.column):
            return None
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile):
        return None
    return Annotations(path, texts, index, origin=table.parent)


def _mapped(file: Path) -> "pa.ChunkedArray":
    from datasets import Dataset

    return Dataset.from_file(str(file)).data.column(COLUMN)


def _in_bounds(column: "pa.ChunkedArray") -> bool:
    """Whether every text lies within its batch: Arrow itself takes that on trust."""
    for chunk in column.chunks:
        _, offsets, data = chunk.buffers()
        ends = np.frombuffer(offsets, dtype=np.int32)[: len(chunk) + 1]
        if (np.diff(ends) < 0).any() or ends[0] < 0 or ends[-1] > (data.size if data is not None else 0):
            return False
    return True


def _remove(table: Path) -> None:
    """Removes a damaged table."""
    for name in (SUMMARY, ENTRIES, INDEX):
        (table / name).unlink(missing_ok=True)
