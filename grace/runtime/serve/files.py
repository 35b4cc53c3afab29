"""Files below one directory, whatever a URL says: no `..`, no link out of it, no pipe, no race."""

import os
import stat
from pathlib import Path
from urllib.parse import unquote, urlsplit


class FileRefused(Exception):
    """The file is not to be had. The message does not tell what exists outside the root."""


_REFUSAL = "the file is no picture below this server's image root"


def read_below(root: Path, url: str, limit: int) -> bytes:
    """The bytes of the file that a `file:` URL names.

    Links are followed first; then the path is opened step by step without following any, so that none put there
    in between leads elsewhere.

    Raises:
        FileRefused: outside of the root, missing, not a regular file, too large or not readable.
    """
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise FileRefused(_REFUSAL) from error
    if parts.netloc not in ("", "localhost"):
        raise FileRefused("a file URL names no host: file:///path")
    try:
        top = root.resolve(strict=True)
        relative = (top / unquote(parts.path, errors="strict")).resolve(strict=True).relative_to(top)
        data = _read(top, relative, limit)
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: links in a circle
        raise FileRefused(_REFUSAL) from error
    if len(data) > limit:
        raise FileRefused(f"the file has more than {limit:,} bytes")
    return data


def _read(top: Path, relative: Path, limit: int) -> bytes:
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    descriptor = os.open(top, flags | os.O_DIRECTORY)
    for part in relative.parts:
        folder, descriptor = descriptor, -1
        try:
            descriptor = os.open(part, flags, dir_fd=folder)
        finally:
            os.close(folder)
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError("not a regular file")
        return file.read(limit + 1)
