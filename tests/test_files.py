"""A file or directory is there whole, or as it was before."""

import errno
import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from grace.errors import UserError
from grace.files import locked, new_directory, require_free, sha256_of, write_text


def test_text_replaces_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "notes.txt"
    write_text(path, "one")
    write_text(path, "zwei, naïve\n")
    assert path.read_text(encoding="utf-8") == "zwei, naïve\n"
    assert os.listdir(path.parent) == ["notes.txt"]
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("at", ["fsync", "chmod", "replace"])
def test_text_that_cannot_be_written_leaves_the_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    path = tmp_path / "notes.txt"
    write_text(path, "old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, at, fail)
    with pytest.raises(OSError, match="disk full"):
        write_text(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["notes.txt"]


def test_directory_appears_only_when_complete(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "model"
    with new_directory(out) as scratch:
        (scratch / "sub").mkdir()
        (scratch / "sub" / "weights").write_text("1")
        assert scratch.parent == out.parent and not out.exists()
    assert (out / "sub" / "weights").read_text() == "1"
    assert os.listdir(out.parent) == ["model"]
    assert out.stat().st_mode & 0o777 == 0o755


def test_directory_of_a_failed_writer_disappears(tmp_path: Path) -> None:
    out = tmp_path / "model"
    out.mkdir()

    def interrupted() -> None:
        with new_directory(out) as scratch:
            (scratch / "half").write_text("1")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert os.listdir(tmp_path) == ["model"] and os.listdir(out) == []


def test_empty_directory_may_be_taken(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with new_directory(tmp_path / "model") as scratch:
        (scratch / "weights").write_text("1")
    assert (tmp_path / "model" / "weights").exists()


@pytest.mark.parametrize("there", [True, False])
def test_a_link_is_followed(tmp_path: Path, there: bool) -> None:
    if there:
        (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with new_directory(tmp_path / "link") as scratch:
        (scratch / "weights").write_text("1")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "weights").exists()
    assert sorted(os.listdir(tmp_path)) == ["link", "real"]


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_what_is_there_is_never_overwritten(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "model"
    kept = out / "mine" if kind == "directory" else out
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("mine")
    with pytest.raises(UserError, match="choose another --format-dir or remove it"):
        require_free(out, "--format-dir")
    with pytest.raises(UserError, match="already exists"), new_directory(out):
        pass
    assert kept.read_text() == "mine" and os.listdir(tmp_path) == ["model"]


def test_parent_that_cannot_be_written_is_the_users_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose another --out"), new_directory(tmp_path / "file" / "model"):
        pass


@pytest.mark.parametrize("content", [b"", b"abc", bytes(range(256)) * 5000])
def test_sha256(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "data").write_bytes(content)
    assert sha256_of(tmp_path / "data") == hashlib.sha256(content).hexdigest()


HOLDS_A_DIRECTORY = """
import sys, time
from pathlib import Path
from grace.files import new_directory
with new_directory(Path(sys.argv[1])) as scratch:
    (scratch / "half").write_text("1")
    print("ready", flush=True)
    time.sleep(60)
"""


def test_what_a_killed_writer_left_goes_and_that_of_a_living_one_stays(tmp_path: Path) -> None:
    out = tmp_path / "model"
    writers = []
    for _ in range(2):
        writer = subprocess.Popen(
            [sys.executable, "-c", HOLDS_A_DIRECTORY, str(out)], stdout=subprocess.PIPE, text=True
        )
        writers.append(writer)
        assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
    try:
        (tmp_path / ".model.tmp-mine").write_text("a file of that name is not ours")
        assert len(list(tmp_path.glob(".model.tmp-*/half"))) == 2
        writers[0].kill()
        writers[0].wait()
        with new_directory(out) as scratch:
            assert len(list(tmp_path.glob(".model.tmp-*/half"))) == 1
            (scratch / "weights").write_text("1")
        assert (out / "weights").exists() and (tmp_path / ".model.tmp-mine").exists()
    finally:
        for writer in writers:
            writer.kill()
            writer.wait()


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    def fill() -> None:
        with new_directory(tmp_path / "model") as scratch:
            (scratch / "half").write_text("1")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match="is full .No space left on device.: free some space"):
        fill()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("number", [errno.EFBIG, errno.EACCES, errno.EROFS, errno.EIO, errno.ENAMETOOLONG])
def test_a_disk_that_refuses_is_one_line(tmp_path: Path, number: int) -> None:
    def write() -> None:
        with new_directory(tmp_path / "model"):
            raise OSError(number, os.strerror(number), "file")

    with pytest.raises(UserError, match=f"cannot write to .*{os.strerror(number)}.*another --out"):
        write()
    assert os.listdir(tmp_path) == []


def test_a_fault_of_ours_stays_one(tmp_path: Path) -> None:
    def fail() -> None:
        with new_directory(tmp_path / "model"):
            raise OSError("the file ends early")

    with pytest.raises(OSError, match="ends early"):
        fail()


@pytest.mark.parametrize("where", [".", "sub/..", "../here"])
def test_the_current_directory_cannot_be_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UserError, match="is the current directory"):
        require_free(Path(where))
    assert os.listdir(tmp_path) == ["here"]


def test_dots_are_followed(tmp_path: Path) -> None:
    with new_directory(tmp_path / "empty" / "sub" / "..") as scratch:
        (scratch / "weights").write_text("1")
    assert os.listdir(tmp_path / "empty") == ["weights"]


def test_what_no_directory_can_replace_is_refused_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "mounted").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "mounted")
    for out, message in (
        (Path("/dev/null"), "already exists"),
        (tmp_path / "loop", "cannot write to .*loop"),
        (tmp_path / "mounted", "mount point.*a folder below it"),
        (tmp_path / "a\0b", "cannot write"),
    ):
        with pytest.raises(UserError, match=message):
            require_free(out)


def test_the_second_of_two_writers_is_told(tmp_path: Path) -> None:
    def both() -> None:
        with new_directory(tmp_path / "model") as late:
            (late / "weights").write_text("2")
            with new_directory(tmp_path / "model") as early:
                (early / "weights").write_text("1")

    with pytest.raises(UserError, match="written by another process"):
        both()
    assert os.listdir(tmp_path) == ["model"] and (tmp_path / "model" / "weights").read_text() == "1"


def test_a_forked_child_does_not_keep_the_lock_of_a_parent_that_was_killed(tmp_path: Path) -> None:
    script = """
import os, sys, time
from pathlib import Path
from grace.files import locked
with locked(Path(sys.argv[1]), "it"):
    if os.fork() == 0:
        print("ready", flush=True)
        time.sleep(60)
        os._exit(0)
    time.sleep(60)
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert parent.stdout is not None and parent.stdout.readline() == "ready\n"
        with pytest.raises(UserError, match="in use"), locked(tmp_path, "it"):
            pass
        parent.kill()
        parent.wait()
        with locked(tmp_path, "it"):
            pass
    finally:
        os.killpg(parent.pid, signal.SIGKILL)
