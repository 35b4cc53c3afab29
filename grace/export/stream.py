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
from safetensors import safe_open
from torch import Tensor

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

    Raises:
        SafetensorError: the file is damaged.
        OSError: it cannot be read.
        ValueError: it holds a type that this class does not know.
    """

    def __init__(self, path: Path):
        with safe_open(path, framework="pt") as file:  # checks header, offsets and length
            names = list(file.keys())
        self.path = path
        with path.open("rb") as raw:
            length = int.from_bytes(raw.read(8), "little")
            header = json.loads(raw.read(length))
        unknown = {header[name]["dtype"] for name in names} - set(_DTYPES)
        if unknown:
            raise ValueError(f"tensors of type {', '.join(sorted(unknown))}")
        self.dtypes = {name: _DTYPES[header[name]["dtype"]] for name in names}
        self.shapes = {name: tuple(header[name]["shape"]) for name in names}
        self._starts = {name: 8 + length + header[name]["data_offsets"][0] for name in names}

    def read(self, name: str) -> Tensor:
        """One whole tensor."""
        return self._read(self._starts[name], self.shapes[name], self.dtypes[name])

    def pieces(self, name: str) -> Iterator[Tensor]:
        """One tensor in slices of its first dimension, none of more than some 32 MB."""
        shape, dtype = self.shapes[name], self.dtypes[name]
        if not shape or 0 in shape:
            yield self.read(name)
            return
        row_bytes = dtype.itemsize * torch.Size(shape[1:]).numel()
        step = max(1, _PIECE_BYTES // row_bytes)
        for row in range(0, shape[0], step):
            rows = min(step, shape[0] - row)
            yield self._read(self._starts[name] + row * row_bytes, (rows, *shape[1:]), dtype)

    def _read(self, start: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        tensor = torch.empty(shape, dtype=dtype)
        with self.path.open("rb", buffering=0) as file:
            file.seek(start)
            room = memoryview(raw_bytes(tensor))
            while room:
                count = file.readinto(room)
                if not count:
                    raise OSError(f"{self.path.name} ends early")
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
