"""Writing so that a crash leaves either the old file or the new one, never half of either."""

import contextlib
import errno
import fcntl
import glob
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from grace.checked_files import open_regular
from grace.errors import UserError


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file's bytes; what is no file (a pipe, a device) raises `DamagedFile`."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Forces a file's bytes, or a directory's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yields a temporary sibling to write to; on success it is synced and replaces `path` in one step.

    On any failure the temporary file is removed and `path` is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.tmp-", dir=path.parent)
    os.close(descriptor)
    try:
        yield Path(name)
        os.chmod(name, 0o644)
        sync(Path(name))
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Replaces `path` with `text` in one step: temporary name, fsync, rename."""
    with new_file(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


def remove_leftovers(folder: Path) -> None:
    """Removes what a killed `write_text` or `new_directory` left in a folder that nobody else writes to."""
    for path in folder.glob(".*.tmp-*"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


@contextlib.contextmanager
def locked(directory: Path, field: str) -> Iterator[None]:
    """Holds a directory, made if need be, for one writer.

    Args:
        field: what the user would set to choose another.

    Raises:
        UserError: another process holds it, or it cannot be written to.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = (directory / ".lock").open("w")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(f"{directory} is in use by another run: wait for it, or set {field}") from error
    except OSError as error:
        raise UserError(f"cannot write to {directory} ({error.strerror}): set {field}") from error
    _held.add(lock)
    try:
        with lock:
            yield
    finally:
        _held.discard(lock)


@contextlib.contextmanager
def writing_to(directory: Path, field: str) -> Iterator[None]:
    """Turns what the disk refuses in the block into the user's error.

    Args:
        field: what the user would set to choose another directory.

    Raises:
        UserError: no room, no permission, or the like.
    """
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write to {directory} ({error.strerror or error}): make room, or set {field}"
        ) from error


def _let_go() -> None:
    """In a forked child: its copy would keep a lock that died with its parent, for as long as the child lives on."""
    while _held:
        _held.pop().close()


_held: set[TextIO] = set()
os.register_at_fork(after_in_child=_let_go)


def require_free(path: Path, flag: str = "--out") -> Path:
    """`path` as it will be written, links and dots followed, if a new directory can take its place.

    Raises:
        UserError: it already holds something that would be overwritten, or cannot be replaced.
    """
    try:
        place = path.resolve()
        kind = place.lstat().st_mode if os.path.lexists(place) else None
        if kind is not None and (not stat.S_ISDIR(kind) or any(place.iterdir())):
            raise UserError(f"{path} already exists and is not empty: choose another {flag} or remove it")
        if place == Path.cwd():  # whose shell would stay in the old one
            raise UserError(
                f"{path} is the current directory: set {flag} to a folder in it, or to one elsewhere"
            )
        if kind is not None and place.is_mount():
            raise UserError(
                f"{path} is a mount point, which nothing can replace: set {flag} to a folder below it"
            )
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links is a RuntimeError
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot write to {path} ({reason}): choose another {flag}") from error
    return place


@contextlib.contextmanager
def new_directory(path: Path, flag: str = "--out") -> Iterator[Path]:
    """Yields a temporary sibling of `path`; on success it is synced and renamed to `path`.

    On any failure the temporary directory is removed and `path` is as it was. What a writer of the same
    `path` left that was killed, and could remove nothing itself, is removed first.

    Raises:
        UserError: `path` already holds files, its parent cannot be written to, or the disk refuses a file.
    """
    path = require_free(path, flag)
    lock = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path)
        # It gets the name that others look for once it is locked.
        made = Path(tempfile.mkdtemp(prefix=f".{path.name}.new-", dir=path.parent))
        lock = _lock_of(made)
        scratch = made.with_name(f".{path.name}.tmp-{made.name.rpartition('-')[2]}")
        made.rename(scratch)
    except OSError as error:
        raise UserError(f"cannot write to {path.parent} ({error.strerror}): choose another {flag}") from error
    try:
        yield scratch
        _settle(scratch)
        _show(scratch, path, flag)
    except BaseException as error:
        shutil.rmtree(scratch, ignore_errors=True)
        if isinstance(error, OSError) and error.errno is not None:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            raise UserError(
                f"{path.parent} is full ({error.strerror}): free some space, or choose another {flag}"
                if full
                else f"cannot write to {path.parent} ({error}): mend that, or choose another {flag}"
            ) from error
        raise
    finally:
        if lock is not None:
            os.close(lock)
    sync(path.parent)


def _settle(scratch: Path) -> None:
    """Everything in a directory on disk, for all to read."""
    for folder, _, names in os.walk(scratch, topdown=False):
        for name in names:
            os.chmod(Path(folder) / name, 0o644)  # some libraries write for the owner alone
            sync(Path(folder) / name)
        sync(Path(folder))
    os.chmod(scratch, 0o755)


def _show(scratch: Path, path: Path, flag: str) -> None:
    """Gives a finished directory its name, which an empty one may have.

    Raises:
        UserError: another process has written there meanwhile.
    """
    try:
        os.rename(scratch, path)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        raise UserError(f"{path} was written by another process meanwhile: choose another {flag}") from error


def _remove_abandoned(path: Path) -> None:
    """Removes the temporary directories of `path` whose writers are no more: nobody holds their locks."""
    for scratch in path.parent.glob(f".{glob.escape(path.name)}.tmp-*"):
        lock = _lock_of(scratch)
        if lock is not None:
            shutil.rmtree(scratch, ignore_errors=True)
            os.close(lock)


def _lock_of(directory: Path) -> int | None:
    """A descriptor that holds a directory's lock; None where another process holds it or there are no locks."""
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor
