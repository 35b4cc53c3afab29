"""Reads the header of a GGUF file without believing it: counts, lengths and positions are held against the file.

Layout (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), little-endian: magic, version, number of
tensors and of metadata entries, the entries, the tensors' names, shapes, types and positions, then their
bytes from the next multiple of the alignment on.
"""

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from grace.checked_files import DamagedFile, open_regular, shown

HEADER_LIMIT = 2**25  # bytes before the tensors; a vocabulary of 152k with its merges has some 6 MB
_MAX_ENTRIES, _MAX_TENSORS = 2**12, 2**16
_MAX_NAME, _MAX_DIMENSIONS = 2**10, 4
_STRING, _ARRAY = 8, 9
_SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
# Elements and bytes of a block, by ggml's number of the type; the types that GRACE writes.
KINDS = {0: "F32", 1: "F16", 2: "Q4_0", 8: "Q8_0", 30: "BF16"}
_BLOCKS = {"F32": (1, 4), "F16": (1, 2), "BF16": (1, 2), "Q4_0": (32, 18), "Q8_0": (32, 34)}


@dataclass(frozen=True)
class GgufEntry:
    """One tensor: its type, its shape in torch's order, and where its bytes are in the file."""

    path: Path
    kind: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


@dataclass(frozen=True)
class GgufHeader:
    """What a file says: scalars and texts of its metadata (of lists only the length), and its tensors."""

    metadata: dict[str, Any]
    tensors: dict[str, GgufEntry]


def gguf_header(path: Path) -> GgufHeader:
    """The header of a GGUF file, checked.

    Raises:
        DamagedFile: not GGUF of version 2 or 3, or a header that its file contradicts.
        OSError: the file cannot be read.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        cursor = _Cursor(file, path.name, min(size, HEADER_LIMIT))
        if cursor.take(4) != b"GGUF" or cursor.number("<I") not in (2, 3):
            raise DamagedFile(f"{path.name} is not GGUF of version 2 or 3")
        tensor_count, entry_count = cursor.count(_MAX_TENSORS), cursor.count(_MAX_ENTRIES)
        metadata: dict[str, Any] = {}
        for _ in range(entry_count):
            name = cursor.text(_MAX_NAME)
            if name in metadata:
                raise DamagedFile(f"{path.name}: {shown(name)} is given twice")
            metadata[name] = cursor.value(cursor.number("<I"))
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment not in [2**power for power in range(3, 17)]:
            raise DamagedFile(f"{path.name}: an alignment of {shown(alignment)}")
        listed = [_listed(cursor, path) for _ in range(tensor_count)]
        start = -(-cursor.position // alignment) * alignment
    tensors: dict[str, GgufEntry] = {}
    for name, kind, shape, offset, nbytes in listed:
        if name in tensors or offset % alignment:
            raise DamagedFile(f"{path.name}: {shown(name)} is given twice or not aligned")
        tensors[name] = GgufEntry(path, kind, shape, start + offset, nbytes)
    end = start
    for name, entry in sorted(tensors.items(), key=lambda item: item[1].start):
        if entry.start < end or entry.start + entry.nbytes > size:
            raise DamagedFile(f"{path.name}: {shown(name)} overlaps its neighbour or the end of the file")
        end = entry.start + entry.nbytes
    return GgufHeader(metadata, tensors)


def _listed(cursor: "_Cursor", path: Path) -> tuple[str, str, tuple[int, ...], int, int]:
    """One line of the table of tensors: name, type, shape, offset, bytes."""
    name = cursor.text(_MAX_NAME)
    dimensions = cursor.number("<I")
    if not 1 <= dimensions <= _MAX_DIMENSIONS:
        raise DamagedFile(f"{path.name}: {shown(name)} has {dimensions} dimensions")
    shape = tuple(cursor.number("<Q") for _ in range(dimensions))[::-1]
    kind = KINDS.get(cursor.number("<I"))
    offset = cursor.number("<Q")
    if kind is None:
        raise DamagedFile(f"{path.name}: {shown(name)} is of none of the types {', '.join(KINDS.values())}")
    elements, block_bytes = _BLOCKS[kind]
    if 0 in shape or shape[-1] % elements or math.prod(shape) > 2**48:
        raise DamagedFile(f"{path.name}: the shape of {shown(name)} makes no sense")
    return name, kind, shape, offset, math.prod(shape) // elements * block_bytes


class _Cursor:
    """Walks through a header and stops at its bound."""

    def __init__(self, file: BinaryIO, name: str, limit: int):
        self.file, self.name, self.limit, self.position = file, name, limit, 0

    def take(self, count: int) -> bytes:
        self.reserve(count)
        content = self.file.read(count)
        self.position += count
        if len(content) != count:
            raise DamagedFile(f"{self.name} ends early")
        return content

    def reserve(self, count: int) -> None:
        """Raises `DamagedFile` if fewer bytes are left."""
        if count > self.limit - self.position:
            raise DamagedFile(
                f"{self.name}: its header speaks of more than the file holds, or than {HEADER_LIMIT} bytes"
            )

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def count(self, most: int) -> int:
        value = self.number("<Q")
        if value > most:
            raise DamagedFile(f"{self.name}: its header speaks of {value} entries")
        return value

    def text(self, most: int = HEADER_LIMIT) -> str:
        length = self.number("<Q")
        if length > most:
            raise DamagedFile(f"{self.name}: a text of {length} bytes")
        try:
            return self.take(length).decode()
        except UnicodeDecodeError as error:
            raise DamagedFile(f"{self.name}: a text that is not UTF-8") from error

    def value(self, kind: int) -> Any:
        """A metadata value; of an array its length."""
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            raise DamagedFile(f"{self.name}: metadata of the unknown type {kind}")
        inner, length = self.number("<I"), self.number("<Q")
        if inner in _SCALARS:
            self.reserve(length * struct.calcsize(_SCALARS[inner]))
            self.take(length * struct.calcsize(_SCALARS[inner]))
        elif inner == _STRING:
            self.reserve(length * 8)
            for _ in range(length):
                self.take(self.number("<Q"))
        else:
            raise DamagedFile(f"{self.name}: a list of the unknown type {inner}")
        return length
