"""Model files that anybody may have written, looked at before a library touches them.

Damage and malice cost one line: what is opened is a regular file (a pipe would hang), what is parsed has a
bounded size, and a safetensors header (https://github.com/huggingface/safetensors: 8 bytes of length, JSON,
then the tensors without gaps) is compared with the file behind it before anything is allocated.
"""

import contextlib
import json
import math
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, NoReturn

from grace.errors import UserError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MEND = "restore it or export it again"
CONFIG_LIMIT = 2**22  # bytes of a config; real ones have some thousand
TOKENIZER_LIMIT = 2**26  # of any other text file; Qwen's tokenizer.json has 11 MB
HEADER_LIMIT = 2**23  # of a safetensors header; a 2B model's has 90 kB
_TEXTS = (".json", ".jinja", ".txt", ".model")
_BINARIES = (".safetensors", ".gguf", ".bin")
_MAX_DIMENSIONS = 16
_MAX_ELEMENTS = 2**48
TYPE_BYTES = {
    "F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4,
    "U16": 2, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip


class DamagedFile(ValueError):
    """A file that cannot be what its name says. The message is one line that names it."""


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in its file: `start` and `end` are positions in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def reason_of(error: BaseException) -> str:
    """The first line of a message, or the kind of error where there is none."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


@contextlib.contextmanager
def damage_of(what: str | Path, mend: str) -> Iterator[None]:
    """Turns what reading a damaged file raises into a `UserError`: WHAT is damaged (why): MEND."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else reason_of(error)
        raise UserError(f"{what} is damaged ({reason}): {mend}") from error


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns what the system refuses while a directory is looked at into a `UserError`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be read ({reason_of(error)}): give one that you may read") from error


def shown(text: Any) -> str:
    """A name out of a file, fit to be printed."""
    whole = repr(str(text))
    return whole if len(whole) <= 120 else f"{whole[:117]}..."


# ---------------------------------------------------------------- files


def open_regular(path: Path) -> BufferedReader:
    """Opens a file for reading, if it is one.

    Raises:
        DamagedFile: a pipe, device, socket or directory.
        OSError: it is not there, cannot be read, or is a loop of links.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise DamagedFile(f"{path.name} is not a regular file")
    return os.fdopen(descriptor, "rb")


def read_text(path: Path, limit: int = CONFIG_LIMIT) -> str:
    """The text of a small file.

    Raises:
        DamagedFile: more than `limit` bytes, not UTF-8, or not a regular file.
        OSError: see `open_regular`.
    """
    with open_regular(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise DamagedFile(f"{path.name} has more than {limit} bytes")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise DamagedFile(f"{path.name} is not UTF-8 text") from error


def read_json(path: Path, limit: int = CONFIG_LIMIT, finite: bool = True) -> dict[str, Any]:
    """The object that a JSON file holds.

    Args:
        finite: refuse NaN and infinities, which JSON does not have but Python writes.

    Raises:
        DamagedFile: too large, too deep, names given twice, or anything but an object.
        OSError: see `open_regular`.
    """
    return parse_json(read_text(path, limit), path.name, finite)


def parse_json(text: str, name: str, finite: bool = True) -> dict[str, Any]:
    """The object that a JSON text holds; errors as of `read_json`."""

    def constant(value: str) -> float:
        if finite:
            raise DamagedFile(f"{value} is no number")
        return float(value)

    def number(digits: str) -> float:
        value = float(digits)
        return value if math.isfinite(value) else constant(digits[:40])

    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=constant, parse_float=number)
    except DamagedFile as error:
        raise DamagedFile(f"{name}: {error}") from error
    except RecursionError as error:
        raise DamagedFile(f"{name} is nested too deeply") from error
    except ValueError as error:
        raise DamagedFile(f"{name} is not JSON: {reason_of(error)}") from error
    if not isinstance(value, dict):
        raise DamagedFile(f"{name} holds a {type(value).__name__}, not an object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise DamagedFile(f"{shown(name)} is given twice")
        found[name] = value
    return found


# ---------------------------------------------------------------- safetensors


def safetensors_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, each checked against its type, its shape and the file's length.

    Raises:
        DamagedFile: the header and the bytes behind it do not fit each other.
        OSError: see `open_regular`.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, HEADER_LIMIT):
            raise DamagedFile(f"{path.name}: a header of {length} bytes in a file of {size}")
        text = file.read(length)
    try:
        header = parse_json(text.decode(), path.name)
    except UnicodeDecodeError as error:
        raise DamagedFile(f"{path.name}: its header is not text") from error
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise DamagedFile(f"{path.name}: its metadata is no table of texts")
    start = 8 + length
    tensors = {name: _stored_tensor(path, name, entry, start) for name, entry in header.items()}
    _require_cover(path, tensors, start, size)
    return tensors


def _stored_tensor(path: Path, name: str, entry: Any, start: int) -> StoredTensor:
    def wrong(what: str) -> NoReturn:
        raise DamagedFile(f"{path.name}: the {what} of {shown(name)} makes no sense")

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        wrong("entry")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in TYPE_BYTES:
        wrong("type")
    if not _counts(shape) or len(shape) > _MAX_DIMENSIONS or math.prod(shape) > _MAX_ELEMENTS:
        wrong("shape")
    if not _counts(offsets) or len(offsets) != 2:
        wrong("position")
    if offsets[1] - offsets[0] != math.prod(shape) * TYPE_BYTES[dtype]:
        wrong("length")
    return StoredTensor(dtype, tuple(shape), start + offsets[0], start + offsets[1])


def _counts(value: Any) -> bool:
    """Whether this is a list of whole numbers from 0 to 2^63."""
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _require_cover(path: Path, tensors: dict[str, StoredTensor], start: int, size: int) -> None:
    """The tensors must lie one behind the other, to the last byte."""
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if tensor.start != start:
            raise DamagedFile(f"{path.name}: {shown(name)} overlaps its neighbour or leaves a gap")
        start = tensor.end
    if start != size:
        raise DamagedFile(f"{path.name} has {size} bytes where its header speaks of {start}")


# ---------------------------------------------------------------- directories


def weight_files(directory: Path) -> dict[str, dict[str, StoredTensor]]:
    """The weight files that loaders find in a directory, and what each holds.

    Raises:
        DamagedFile: a damaged file, an index that leads elsewhere or does not describe the files beside it.
        OSError: a file is not there or cannot be read.
    """
    whole, index = os.path.lexists(directory / WEIGHTS), os.path.lexists(directory / INDEX)
    if not whole and not index:
        raise DamagedFile(f"it has no {WEIGHTS}")
    if whole:
        return {WEIGHTS: safetensors_header(directory / WEIGHTS)}
    listed = read_json(directory / INDEX, HEADER_LIMIT).get("weight_map")
    if (
        not isinstance(listed, dict)
        or not listed
        or not all(isinstance(name, str) for name in listed.values())
    ):
        raise DamagedFile(f"{INDEX} has no weight_map")
    names = sorted(set(listed.values()))
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors") or "\0" in name:
            raise DamagedFile(f"{INDEX} names {shown(name)}, which is no file beside it")
    files = {name: safetensors_header(directory / name) for name in names}
    held = [(tensor, name) for name, tensors in files.items() for tensor in tensors]
    if len(held) != len(listed) or dict(held) != listed:
        raise DamagedFile(f"{INDEX} and the files beside it disagree")
    return files


def require_regular(directory: Path) -> None:
    """Checks that what a loader might open in a model directory are files, and its texts no larger than they can be.

    Raises:
        UserError: one is not.
    """
    with damage_of(directory, MEND):
        for entry in os.scandir(directory):
            suffix = Path(entry.name).suffix
            if suffix in _TEXTS or suffix in _BINARIES:
                with open_regular(Path(entry.path)) as file:
                    size = os.fstat(file.fileno()).st_size
                limit = CONFIG_LIMIT if entry.name == "config.json" else TOKENIZER_LIMIT
                if suffix in _TEXTS and size > limit:
                    raise DamagedFile(f"{entry.name} has more than {limit} bytes")


def model_tensors(directory: Path) -> dict[str, StoredTensor]:
    """The tensors of a model directory by name, after every file in it that a loader might open was checked.

    Raises:
        UserError: a file is damaged, too large, or no file at all.
    """
    require_regular(directory)
    with damage_of(directory, MEND):
        return {name: tensor for held in weight_files(directory).values() for name, tensor in held.items()}
