"""Archives of pictures unpacked so that nothing lands outside the folder and nothing is left half written."""

import gzip
import os
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from grace.errors import UserError

_BUFFER = 1 << 20


@dataclass(frozen=True)
class _Member:
    name: str
    size: int
    is_file: bool  # neither a directory nor a link
    is_folder: bool
    open: Callable[[], IO[bytes] | None]


def unpack(archive: Path, folder: Path, advance: Callable[[int], None] = lambda files: None) -> int:
    """Unpacks a zip or tar file; files that are there with the right size stay. Returns the number of files.

    Every file is written under a temporary name and renamed.

    Raises:
        UserError: not an archive, damaged, too large for the disk, or with a member that is a link or
            leads out of the folder: then nothing of that member is written.
    """
    try:
        files = 0
        for member in _checked(archive, folder):
            target = folder / member.name
            if not (target.is_file() and target.stat().st_size == member.size):
                _write(member, target)
            files += 1
            advance(files)
        return files
    except (
        zipfile.BadZipFile,
        gzip.BadGzipFile,
        tarfile.TarError,
        EOFError,
        zlib.error,
        NotImplementedError,
        RuntimeError,
    ) as error:
        raise UserError(f"{archive} is damaged or cannot be unpacked ({error}): fetch it again") from error
    except OSError as error:
        raise UserError(f"cannot unpack {archive} into {folder} ({error.strerror or error})") from error


def _checked(archive: Path, folder: Path) -> Iterator[_Member]:
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as file:
            _require_space(sum(info.file_size for info in file.infolist()), folder)
            for info in file.infolist():
                kind = stat.S_IFMT(info.external_attr >> 16)
                regular = not info.is_dir() and kind in (0, stat.S_IFREG)
                member = _Member(
                    info.filename, info.file_size, regular, info.is_dir(), lambda info=info: file.open(info)
                )
                yield from _if_file(member, archive)
    elif tarfile.is_tarfile(archive):
        with tarfile.open(archive) as file:
            for info in file:
                member = _Member(
                    info.name,
                    info.size,
                    info.isfile(),
                    info.isdir(),
                    lambda info=info: file.extractfile(info),
                )
                yield from _if_file(member, archive)
    else:
        raise UserError(f"{archive} is neither a zip nor a tar file: fetch it again")


def _if_file(member: _Member, archive: Path) -> Iterator[_Member]:
    """The member, if it is a file; folders come with their files."""
    parts = PurePosixPath(member.name).parts
    if not parts or parts[0] == "/" or ".." in parts or "\\" in member.name or "\0" in member.name:
        raise UserError(
            f"{archive} holds {member.name!r}, which leads out of its folder: it is not to be trusted"
        )
    if not member.is_file and not member.is_folder:
        raise UserError(f"{archive} holds {member.name!r}, a link or device: it is not to be trusted")
    if member.is_file:
        yield member


def _require_space(size: int, folder: Path) -> None:
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if (free := shutil.disk_usage(existing).free) < size:
        raise UserError(f"{size / 1e9:.1f} GB do not fit into {folder}: {free / 1e9:.1f} GB are free")


def _write(member: _Member, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(f".{target.name}.part"[-255:])
    source = member.open()
    assert source is not None  # regular files have contents
    try:
        with source, scratch.open("wb") as out:
            shutil.copyfileobj(source, out, _BUFFER)
        os.replace(scratch, target)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
