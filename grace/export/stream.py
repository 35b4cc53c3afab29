"""Reads and writes safetensors files piece by piece, so that a model is never in memory as a whole.

The format (https://github.com/huggingface/safetensors): an 8-byte little-endian header length, a JSON
header of names, types, shapes and offsets, then the raw bytes without gaps. The order is by element
size, then name, which keeps every tensor aligned and the bytes the same on every run.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grace.checked_files import DamagedFile, StoredTensor, safetensors_header

_TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.uint32: "U32",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {name: dtype for dtype, name in _TYPES.items()}
_PIECE_BYTES = 2**25


@dataclass(frozen=True)
class Entry:
    """One tensor of the file: what it will be, and how to get it when its turn comes.

    `make` gives the tensor, or its pieces in order along the first dimension.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor | Iterable[Tensor]]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()

    def pieces(self) -> Iterator[Tensor]:
        """What `make` gives, contiguous in main memory, checked against what was announced.

        Raises:
            ValueError: another type, another shape, or not as many elements.
        """
        made = self.make()
        if isinstance(made, Tensor) and tuple(made.shape) != self.shape:
            raise ValueError(f"{self.name} is {tuple(made.shape)}, not as announced")
        elements = 0
        for piece in [made] if isinstance(made, Tensor) else made:
            if piece.dtype != self.dtype or piece.shape[1:] != self.shape[1:]:
                raise ValueError(f"{self.name} is {piece.dtype} {tuple(piece.shape)}, not as announced")
            elements += piece.numel()
            yield piece.contiguous().cpu()
        if elements != torch.Size(self.shape).numel():
            raise ValueError(f"{self.name} has {elements} elements, not as announced")


class TensorFile:
    """A safetensors file read tensor by tensor, each into memory of its own.

    The library maps the file instead, and every page that was looked at stays resident.

    Args:
        header: of the file, where it has been read already.

    Raises:
        DamagedFile: the file is damaged, or holds a type that this class does not know.
        OSError: it cannot be read.
    """

    def __init__(self, path: Path, header: dict[str, StoredTensor] | None = None):
        header = safetensors_header(path) if header is None else header
        unknown = {entry.dtype for entry in header.values()} - set(_DTYPES)
        if unknown:
            raise DamagedFile(f"{path.name} holds tensors of type {', '.join(sorted(unknown))}")
        self.path = path
        self.dtypes = {name: _DTYPES[entry.dtype] for name, entry in header.items()}
        self.shapes = {name: entry.shape for name, entry in header.items()}
        self._starts = {name: entry.start for name, entry in header.items()}

    def read(self, name: str) -> Tensor:
        """One whole tensor."""
        return read_tensor(self.path, self._starts[name], self.shapes[name], self.dtypes[name])

    def pieces(self, name: str) -> Iterator[Tensor]:
        """One tensor in slices of its first dimension, none of more than some 32 MB."""
        return read_pieces(self.path, self._starts[name], self.shapes[name], self.dtypes[name])


def read_pieces(path: Path, start: int, shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[Tensor]:
    """What `read_tensor` gives, in slices of its first dimension, none of more than some 32 MB."""
    if not shape or 0 in shape:
        yield read_tensor(path, start, shape, dtype)
        return
    row_bytes = dtype.itemsize * torch.Size(shape[1:]).numel()
    step = max(1, _PIECE_BYTES // row_bytes)
    for row in range(0, shape[0], step):
        rows = min(step, shape[0] - row)
        yield read_tensor(path, start + row * row_bytes, (rows, *shape[1:]), dtype)


def read_tensor(path: Path, start: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The tensor whose bytes begin at `start`.

    Raises:
        OSError: the file ends before they do.
    """
    tensor = torch.empty(shape, dtype=dtype)
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        room = memoryview(raw_bytes(tensor))
        while room:
            count = file.readinto(room)
            if not count:
                raise OSError(f"{path.name} ends early")
            room = room[count:]
    return tensor


def write_safetensors(
    path: Path,
    entries: Sequence[Entry],
    metadata: dict[str, str],
    advance: Callable[[int], None] = lambda count: None,
) -> None:
    """Writes `entries`; `make` of each is called once, and what it gives is released at once.

    Args:
        advance: told the bytes of every piece as it is written.

    Raises:
        ValueError: duplicate names, or a tensor that is not what its entry announced.
    """
    ordered = sorted(entries, key=lambda entry: (-entry.dtype.itemsize, entry.name))
    if len({entry.name for entry in ordered}) != len(ordered):
        raise ValueError("duplicate tensor names")
    header: dict[str, object] = {"__metadata__": metadata}
    offset = 0
    for entry in ordered:
        end = offset + entry.nbytes
        header[entry.name] = {
            "dtype": _TYPES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for entry in ordered:
            for piece in entry.pieces():
                file.write(raw_bytes(piece).data)
                advance(piece.nbytes)


def raw_bytes(tensor: Tensor) -> Any:
    """The bytes of a contiguous tensor, without a copy."""
    return tensor.reshape(-1).view(torch.uint8).numpy()
