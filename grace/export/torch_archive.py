"""Reads tensors out of what `torch.save` wrote, without running any of it and without holding it whole.

Such a file is a zip archive with a pickle in it. Before torch sees it, the archive must be one that torch
writes (nothing compressed, so that no small file unfolds into a large one) and every name in the pickle one
of those that rebuild a plain tensor. Then torch maps it with `weights_only=True`, and each tensor is copied
out when it is asked for; the map is renewed now and then, since pages that were looked at stay resident.
"""

import os
import pickletools
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grace.checked_files import DamagedFile, open_regular, reason_of, shown

_PICKLE_LIMIT = 2**24  # bytes; 600 tensors take some 80 kB
_DIRECTORY_LIMIT = 2**24
_MAX_ENTRIES = 2**16
_RESIDENT_LIMIT = 2**28  # bytes copied out before the map is renewed
_NAMES = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    *(f"torch {kind}Storage" for kind in ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte")),
}  # fmt: skip


@dataclass(frozen=True)
class ArchivedTensor:
    """What is known of a tensor without reading it."""

    dtype: torch.dtype
    shape: tuple[int, ...]


class TorchFile:
    """The tensors of a dictionary saved by `torch.save`, each read when asked for.

    Raises:
        DamagedFile: not such a file, or anything in it but plain tensors by name.
        OSError: it cannot be read.
    """

    def __init__(self, path: Path):
        self.path = path
        _require_archive(path)
        self._mapped, self._read_bytes = _mapped(path), 0
        self.entries = {
            name: ArchivedTensor(tensor.dtype, tuple(tensor.shape)) for name, tensor in self._mapped.items()
        }

    def read(self, name: str) -> Tensor:
        """One whole tensor."""
        if self._read_bytes > _RESIDENT_LIMIT:
            self._mapped, self._read_bytes = _mapped(self.path), 0
        tensor = self._mapped[name]
        self._read_bytes += tensor.nbytes
        return tensor.clone()


def _mapped(path: Path) -> dict[str, Tensor]:
    """The tensors, none of them read yet.

    Raises:
        DamagedFile: there is something else among them, or one that its bytes do not make up.
    """
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises whatever the pickle made it do
        raise DamagedFile(f"{path.name} cannot be read ({reason_of(error)})") from error
    if not isinstance(loaded, Mapping):
        raise DamagedFile(f"{path.name} holds a {type(loaded).__name__}, not tensors by name")
    for name, value in loaded.items():
        if not isinstance(name, str) or not isinstance(value, Tensor) or value.layout != torch.strided:
            raise DamagedFile(f"{path.name} holds {shown(name)}, a {type(value).__name__}, not a tensor")
        end = value.storage_offset() * value.element_size() + value.nbytes
        if not value.is_contiguous() or end > value.untyped_storage().nbytes():
            raise DamagedFile(f"{path.name}: {shown(name)} does not fit its bytes")
    return dict(loaded)


def _require_archive(path: Path) -> None:
    """Raises `DamagedFile` unless a file is an archive that torch writes, with tensors alone in its pickle."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        _require_small_directory(path, file, size)
        try:
            with zipfile.ZipFile(file) as archive:
                entries = archive.infolist()
                plain = all(
                    entry.compress_type == zipfile.ZIP_STORED
                    and entry.compress_size == entry.file_size
                    and not entry.flag_bits & 1
                    for entry in entries
                )
                total = sum(entry.file_size for entry in entries)
                if not plain or total > size or len(entries) > _MAX_ENTRIES:
                    raise DamagedFile(f"{path.name} is compressed, or speaks of more bytes than it has")
                pickles = [entry for entry in entries if entry.filename.lower().endswith("data.pkl")]
                if len(pickles) != 1 or pickles[0].file_size > _PICKLE_LIMIT:
                    raise DamagedFile(f"{path.name} is not what torch.save writes")
                _require_tensors_only(path, archive.read(pickles[0]))
        except DamagedFile:
            raise
        except (zipfile.BadZipFile, OSError, ValueError, EOFError, RuntimeError, struct.error) as error:
            raise DamagedFile(f"{path.name} is not what torch.save writes ({reason_of(error)})") from error


def _require_small_directory(path: Path, file: Any, size: int) -> None:
    """The archive's table of contents is read whole: its size is looked at first."""
    file.seek(max(0, size - 2**16 - 22))
    tail = file.read()
    at = tail.rfind(b"PK\5\6")
    if at < 0 or len(tail) - at < 22:
        raise DamagedFile(f"{path.name} is not what torch.save writes (no zip archive)")
    length = struct.unpack("<I", tail[at + 12 : at + 16])[0]
    wide = tail.rfind(b"PK\6\6")
    if length == 2**32 - 1 and wide >= 0 and len(tail) - wide >= 56:
        length = struct.unpack("<Q", tail[wide + 40 : wide + 48])[0]
    if length > _DIRECTORY_LIMIT:
        raise DamagedFile(f"{path.name} has a table of contents of {length} bytes")
    file.seek(0)


def _require_tensors_only(path: Path, pickled: bytes) -> None:
    """Raises `DamagedFile` if a pickle calls for anything but the pieces of plain tensors."""
    try:
        for opcode, argument, _ in pickletools.genops(pickled):
            if opcode.name == "GLOBAL" and argument not in _NAMES:
                raise DamagedFile(
                    f"{path.name} holds {shown(argument)}, which is no tensor; nothing of it was run"
                )
            if opcode.name in ("STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4"):
                raise DamagedFile(
                    f"{path.name} holds objects ({opcode.name}), not tensors; nothing of it was run"
                )
    except DamagedFile:
        raise
    except Exception as error:  # genops raises several types for what is no pickle
        raise DamagedFile(f"{path.name} is not what torch.save writes ({reason_of(error)})") from error
