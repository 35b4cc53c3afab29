"""Tensor files of a checkpoint at the least cost to the loop that waits for them, or shares its cores with their writing.

A file is laid out in memory exactly as it will be on disk, one copy of each tensor into memory that the next save uses
again; it is then hashed (XXH3, memory speed) and handed to the disk as it lies there, past the system's page cache
where the file system allows it. The library's own writer gathers the bytes once more, the page cache once more again,
and a checksum would have to read the file back.

    file:  8 bytes, length of the header, little-endian | header, JSON, filled up with spaces | the tensors, end to end
"""

import errno
import fcntl
import json
import mmap
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from grace.memory import private_memory

BLOCK = 4096  # what direct writing wants addresses, offsets and sizes to be multiples of
CHUNK = 1 << 24  # bytes hashed and written at a time
HEADER_ALIGNMENT = 64
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
Layout = tuple[
    tuple[str, torch.dtype, torch.Size], ...
]  # name, type and shape of each tensor, as they are given


class FileInMemory:
    """A safetensors file in memory; filled again and again with tensors of the same names and shapes."""

    def __init__(self) -> None:
        self.layout: Layout = ()
        self.size = 0
        self.memory: mmap.mmap | None = None
        self.slots: list[Tensor] = []

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes over the values of now."""
        layout = tuple((name, tensor.dtype, tensor.shape) for name, tensor in tensors.items())
        if self.memory is None or layout != self.layout:
            self._lay_out(layout)
        for slot, tensor in zip(self.slots, tensors.values(), strict=True):
            slot.copy_(tensor.detach())

    def _lay_out(self, layout: Layout) -> None:
        """Header, memory and a slot for each tensor; the widest types first, so that each lies at a multiple of its size."""
        header, places, at = {}, {}, 0
        for name, dtype, shape in sorted(layout, key=lambda one: -one[1].itemsize):
            places[name] = at, at + shape.numel() * dtype.itemsize
            at = places[name][1]
            header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": places[name]}
        text = json.dumps(header).encode()
        text += b" " * (-(8 + len(text)) % HEADER_ALIGNMENT)
        start = 8 + len(text)
        self.slots.clear()  # of the old memory
        self.memory, self.layout, self.size = _memory(start + at), layout, start + at
        self.memory[:start] = len(text).to_bytes(8, "little") + text
        whole = torch.frombuffer(self.memory, dtype=torch.uint8)
        for name, dtype, shape in layout:
            first, last = places[name]
            self.slots.append(whole[start + first : start + last].view(dtype).view(shape))

    def write(self, path: Path) -> str:
        """Writes the file, and returns its checksum; it is on disk when the caller has synced it.

        Raises:
            OSError: no room, or the like.
        """
        import xxhash

        assert self.memory is not None
        total = xxhash.xxh3_128()
        target = _open_for_writing(
            path, direct=self.size >= CHUNK
        )  # a small one is not worth waiting for the disk
        try:
            with memoryview(self.memory) as view:
                for start in range(0, self.size, CHUNK):
                    with view[start : min(start + CHUNK, self.size)] as chunk:
                        total.update(chunk)
                        _write_all(target, chunk)
        finally:
            os.close(target)
        return total.hexdigest()


def files_of(
    tensors: Mapping[str, Mapping[str, Tensor]], before: Mapping[str, FileInMemory]
) -> dict[str, FileInMemory]:
    """A file for each group, filled with the values of now; in the memory of those before, where they fit."""
    files = {stem: before.get(stem) or FileInMemory() for stem in tensors}
    for stem, group in tensors.items():
        files[stem].fill(group)
    return files


def xxh3_of(path: Path) -> str:
    """The checksum of a file's bytes that `FileInMemory.write` returns."""
    import xxhash

    total = xxhash.xxh3_128()
    buffer = bytearray(CHUNK)
    with path.open("rb", buffering=0) as file, memoryview(buffer) as view:
        while count := file.readinto(buffer):
            total.update(view[:count])
    return total.hexdigest()


def _memory(size: int) -> mmap.mmap:
    """Quick to fill, and none of a loader's workers' business."""
    return private_memory(size, "MADV_HUGEPAGE", "MADV_DONTFORK")


def _open_for_writing(path: Path, direct: bool) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    if direct:
        try:
            return os.open(path, flags | getattr(os, "O_DIRECT", 0), 0o644)
        except OSError as error:
            if error.errno != errno.EINVAL:  # the file system has no direct writing
                raise
    return os.open(path, flags, 0o644)


def _write_all(target: int, chunk: memoryview) -> None:
    """Whole blocks as `target` was opened; what is no whole block, or not taken so, through the page cache."""
    done = 0
    while done < len(chunk):
        left = len(chunk) - done
        if left % BLOCK == left or done % BLOCK:
            _through_cache(target)
        whole = left - left % BLOCK or left
        try:
            done += os.write(target, chunk[done : done + whole])
        except OSError as error:
            if error.errno != errno.EINVAL or not _through_cache(target):
                raise


def _through_cache(target: int) -> bool:
    """Ends direct writing; whether it was direct before."""
    flags, direct = fcntl.fcntl(target, fcntl.F_GETFL), getattr(os, "O_DIRECT", 0)
    fcntl.fcntl(target, fcntl.F_SETFL, flags & ~direct)
    return bool(flags & direct)
