"""Downloads against a server that breaks off, changes, lies and refuses."""

import hashlib
import io
import json
import socket
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from grace import cli
from grace.data.download import download
from grace.data.fetch import fetch
from grace.data.manifest import Download, chosen_items, load_manifest
from grace.data.unpack import unpack
from grace.errors import UserError

BODY = bytes(range(256)) * 2000
SHORT = [1000] * 4  # as many broken answers as there are attempts
ROOT = Path(__file__).parents[2]


class Server(ThreadingHTTPServer):
    """Serves `files`; `breaks` says after how many bytes each of the next answers breaks off."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.breaks: list[Any] = []  # None: does not break
        self.codes: list[int] = []  # of the next answers, instead of contents
        self.tags, self.ranges = True, True
        self.asked: list[str | None] = []  # Range of each request

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/{name}"


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        server, wanted = self.server, self.headers.get("Range")
        server.asked.append(wanted)
        body = server.files.get(self.path[1:])
        if body is None or server.codes:
            self.send_error(404 if body is None else server.codes.pop(0))
            return
        tag = f'"{hashlib.sha256(body).hexdigest()[:12]}"'
        start = 0
        if wanted and server.ranges and self.headers.get("If-Range", tag) == tag:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
        if start >= len(body) > 0 and start:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(body)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        if server.tags:
            self.send_header("ETag", tag)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        stop = server.breaks.pop(0) if server.breaks else None
        self.wfile.write(body[start:] if stop is None else body[start : start + stop])
        if stop is not None:
            self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as one:
        threading.Thread(target=one.serve_forever, daemon=True).start()
        one.files["a.bin"] = BODY
        yield one
        one.shutdown()


def get(server: Server, target: Path, name: str = "a.bin", **manifest: Any) -> bool:
    return fetch(Download(server.url(name), name, **manifest), target, pause=0.01)


def test_a_file_arrives_whole_and_is_not_fetched_twice(server: Server, tmp_path: Path) -> None:
    target, seen = tmp_path / "new" / "a.bin", []
    one = Download(server.url("a.bin"), "a.bin")
    assert fetch(one, target, lambda *at: seen.append(at))
    assert target.read_bytes() == BODY and [path.name for path in target.parent.iterdir()] == ["a.bin"]
    assert seen[-1] == (len(BODY), len(BODY))
    assert not fetch(one, target) and len(server.asked) == 1


@pytest.mark.parametrize("tags", [True, False])
def test_a_broken_transfer_goes_on_where_it_stopped(server: Server, tmp_path: Path, tags: bool) -> None:
    server.breaks, server.tags = [100_000, 0, 50_000], tags
    assert get(server, tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == BODY
    assert server.asked == [None, "bytes=100000-", "bytes=100000-", "bytes=150000-"]


def test_the_next_command_goes_on_too(server: Server, tmp_path: Path) -> None:
    server.breaks = [*SHORT]
    with pytest.raises(UserError, match="broke off after 4000 of 512000 bytes.*goes on from there"):
        get(server, tmp_path / "a.bin")
    assert not (tmp_path / "a.bin").exists()
    assert get(server, tmp_path / "a.bin") and server.asked[-1] == "bytes=4000-"
    assert (tmp_path / "a.bin").read_bytes() == BODY


def test_the_last_byte_was_there_already(server: Server, tmp_path: Path) -> None:
    """Killed between the last byte and the renaming."""
    server.breaks = [*SHORT]
    with pytest.raises(UserError):
        get(server, tmp_path / "a.bin")
    (tmp_path / ".a.bin.part").write_bytes(BODY)
    assert get(server, tmp_path / "a.bin") and (tmp_path / "a.bin").read_bytes() == BODY


def test_a_file_that_changed_in_between_starts_anew(server: Server, tmp_path: Path) -> None:
    for tags in (True, False):
        server.files["a.bin"], server.tags, server.breaks = BODY, tags, [*SHORT]
        with pytest.raises(UserError):
            get(server, tmp_path / "a.bin")
        server.files["a.bin"] = b"another, longer file" * 50_000
        assert get(server, tmp_path / "a.bin")
        assert (tmp_path / "a.bin").read_bytes() == server.files["a.bin"]
        (tmp_path / "a.bin").unlink()


def test_a_server_without_ranges_sends_all_again(server: Server, tmp_path: Path) -> None:
    server.breaks, server.ranges = [1000], False
    assert get(server, tmp_path / "a.bin") and (tmp_path / "a.bin").read_bytes() == BODY


def test_bytes_of_unknown_origin_are_not_joined(server: Server, tmp_path: Path) -> None:
    (tmp_path / ".a.bin.part").write_bytes(b"who knows")
    assert get(server, tmp_path / "a.bin") and (tmp_path / "a.bin").read_bytes() == BODY


def test_size_and_checksum(server: Server, tmp_path: Path) -> None:
    good = hashlib.sha256(BODY).hexdigest()
    assert get(server, tmp_path / "a.bin", sha256=good, bytes=len(BODY))
    assert not get(server, tmp_path / "a.bin", sha256=good)
    wrongs: list[dict[str, Any]] = [{"sha256": "0" * 64}, {"bytes": 5}]
    for wrong in wrongs:
        with pytest.raises(UserError, match="remove it to fetch it again"):
            get(server, tmp_path / "a.bin", **wrong)
        with pytest.raises(UserError, match="another file now"):
            get(server, tmp_path / "b.bin", **wrong)
    assert {path.name for path in tmp_path.iterdir()} <= {"a.bin", ".b.bin.part.tag"}


def test_refusals_are_final_and_faults_of_the_server_are_not(server: Server, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="HTTP 404"):
        get(server, tmp_path / "x", name="x")
    assert len(server.asked) == 1
    server.codes = [403]
    with pytest.raises(UserError, match="HTTP 403.*by hand"):
        get(server, tmp_path / "a.bin")
    server.codes = [503, 503]
    assert get(server, tmp_path / "a.bin")
    (tmp_path / "a.bin").unlink()
    server.codes = [500] * 9
    with pytest.raises(UserError, match="HTTP 500"):
        get(server, tmp_path / "a.bin")


def test_nobody_answers(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        one = Download(f"http://127.0.0.1:{taken.getsockname()[1]}/a", "a")
        with pytest.raises(UserError, match="no answer .*check the network"):
            fetch(one, tmp_path / "a", pause=0.01)


def test_a_place_that_cannot_be_written(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="choose another --out"):
        get(server, tmp_path / "file" / "a.bin")


# ---------------------------------------------------------------- archives


def zipped(members: dict[str, bytes], **external: int) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        for name, contents in members.items():
            info = zipfile.ZipInfo(name)
            info.external_attr = external.get("attr", 0o644 << 16)
            file.writestr(info, contents)
    return buffer.getvalue()


def tarred(members: dict[str, bytes], link: str | None = None) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as file:
        for name, contents in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(contents)
            file.addfile(info, io.BytesIO(contents))
        if link:
            info = tarfile.TarInfo("link")
            info.type, info.linkname = tarfile.SYMTYPE, link
            file.addfile(info)
    return buffer.getvalue()


@pytest.mark.parametrize("make", [zipped, tarred])
def test_unpacking(tmp_path: Path, make: Callable[..., bytes]) -> None:
    archive, members = tmp_path / "a", {"top/1.jpg": b"one", "top/sub/2.jpg": b"two", "3.jpg": b""}
    archive.write_bytes(make(members))
    for _ in range(2):  # again: nothing to do
        assert unpack(archive, tmp_path / "out") == 3
    found = {
        p.relative_to(tmp_path / "out").as_posix(): p.read_bytes()
        for p in (tmp_path / "out").rglob("*")
        if p.is_file()
    }
    assert found == members
    (tmp_path / "out" / "top" / "1.jpg").write_bytes(b"o")  # cut off by a kill of another tool
    unpack(archive, tmp_path / "out")
    assert (tmp_path / "out" / "top" / "1.jpg").read_bytes() == b"one"


HOSTILE = {
    "parent, zip": zipped({"ok.jpg": b"x", "../evil": b"x"}),
    "inner parent, zip": zipped({"a/../../evil": b"x"}),
    "absolute, zip": zipped({"/tmp/grace-evil": b"x"}),
    "backslash, zip": zipped({"..\\evil": b"x"}),
    "link, zip": zipped({"link": b"/etc/passwd"}, attr=0o120777 << 16),
    "parent, tar": tarred({"../evil": b"x"}),
    "absolute, tar": tarred({"/tmp/grace-evil": b"x"}),
    "link, tar": tarred({}, link="/etc"),
}


@pytest.mark.parametrize("contents", HOSTILE.values(), ids=HOSTILE)
def test_hostile_archives_write_nothing_outside(tmp_path: Path, contents: bytes) -> None:
    (tmp_path / "a").write_bytes(contents)
    with pytest.raises(UserError, match="not to be trusted"):
        unpack(tmp_path / "a", tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} <= {"a", "out"} and not Path("/tmp/grace-evil").exists()
    assert not any(path.is_symlink() for path in tmp_path.rglob("*"))


@pytest.mark.parametrize("make", [zipped, tarred])
def test_damaged_archives(tmp_path: Path, make: Callable[..., bytes]) -> None:
    whole = make({f"{i}.jpg": bytes(range(256)) * 40 for i in range(9)})
    for contents in (b"", b"hello", whole[: len(whole) // 2], whole[:200] + b"\xff" * 60 + whole[260:]):
        (tmp_path / "a").write_bytes(contents)
        with pytest.raises(UserError, match="fetch it again"):
            unpack(tmp_path / "a", tmp_path / "out")
    assert not list((tmp_path / "out").rglob(".*.part"))


def test_an_archive_that_claims_to_be_larger_than_the_disk(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "a").write_bytes(zipped({"1.jpg": b"x" * 5000}))
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 100}))
    with pytest.raises(UserError, match="do not fit"):
        unpack(tmp_path / "a", tmp_path / "out")


# ---------------------------------------------------------------- manifests and the command


def manifest(path: Path, server: Server, **changes: Any) -> Path:
    values = {
        "annotations": [{"name": "notes", "file": "notes.json", "downloads": [{"url": server.url("notes.json")}]}],
        "images": [
            {"name": "pictures", "folder": "images/p", "files": 2, "gaps": "one is known to be missing",
             "downloads": [{"url": server.url("p.zip"), "into": "images"}]},
            {"name": "private", "folder": "images/q", "by_hand": "ask the authors"},
        ],
    } | changes  # fmt: skip
    path.write_text(yaml.safe_dump(values))
    server.files |= {"notes.json": b"[]", "p.zip": zipped({"p/1.jpg": b"one"})}
    return path


def run(*arguments: Any) -> int:
    return cli.main(["data", "download", *(str(argument) for argument in arguments)])


def test_the_command_fetches_unpacks_and_counts(server: Server, tmp_path: Path, capsys: Any) -> None:
    file, out = manifest(tmp_path / "m.yaml", server), tmp_path / "data"
    assert run("--manifest", file, "--out", out, "--json") == 0
    stdout, stderr = capsys.readouterr()
    assert [one["status"] for one in json.loads(stdout)] == ["fetched", "fetched", "by hand"]
    assert (
        "1 of 2 files: some are missing" in stderr and "known gaps" in stderr and "ask the authors" in stderr
    )
    assert (out / "notes.json").read_bytes() == b"[]" and (out / "images/p/1.jpg").read_bytes() == b"one"
    asked = len(server.asked)
    assert run("--manifest", file, "--out", out, "--json") == 0
    assert [one["status"] for one in json.loads(capsys.readouterr().out)] == ["there", "there", "by hand"]
    assert len(server.asked) == asked and not list(out.rglob("*.zip"))


def test_one_failure_does_not_cost_the_others(server: Server, tmp_path: Path, capsys: Any) -> None:
    file, out = manifest(tmp_path / "m.yaml", server), tmp_path / "data"
    del server.files["notes.json"]
    assert run("--manifest", file, "--out", out) == 2
    err = capsys.readouterr().err
    assert [line for line in err.splitlines() if line.startswith("error: notes: http")] and "404" in err
    assert (out / "images/p/1.jpg").is_file() and not (out / "notes.json").exists()


def test_chosen_items(server: Server, tmp_path: Path, capsys: Any) -> None:
    file, out = manifest(tmp_path / "m.yaml", server), tmp_path / "data"
    assert run("--manifest", file, "--out", out, "--only", "notes") == 0
    assert [path.name for path in out.iterdir()] == ["notes.json"]
    for arguments, reason in (
        (["--only", "nots", "--out", out], "did you mean notes?"),
        (["--only", "private", "--out", out], "by hand: ask the authors"),
        ([], "needs --out"),
    ):
        capsys.readouterr()
        assert run("--manifest", file, *arguments) == 2
        assert reason in capsys.readouterr().err
    assert run("--manifest", file, "--list") == 0
    assert "by hand" in capsys.readouterr().out


def test_a_hostile_archive_is_one_line(server: Server, tmp_path: Path, capsys: Any) -> None:
    file = manifest(tmp_path / "m.yaml", server)
    server.files["p.zip"] = HOSTILE["parent, zip"]
    assert run("--manifest", file, "--out", tmp_path / "data", "--only", "pictures") == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "not to be trusted" in err


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"annotations": [{"name": "x"}]}, "needs a name and a file"),
        ({"annotations": [{"name": "x", "file": "../x"}]}, "leads out"),
        ({"annotations": [{"name": "x", "file": "/x"}]}, "leads out"),
        ({"annotations": [{"name": "x", "file": "x", "downloads": [{"url": "file:///etc/passwd"}]}]}, "not an http"),
        ({"annotations": [{"name": "x", "file": "x", "downloads": [{"url": "http://a/x", "sha256": "12"}]}]}, "64 hex"),
        ({"annotations": [{"name": "x", "file": "x", "downloads": [{"url": "http://a/x", "bytes": "1"}]}]}, "whole number"),
        ({"annotations": [{"name": "pictures", "file": "x"}]}, "two items named pictures"),
        ({"images": [{"name": "x", "folder": "x", "downloads": [{"url": "http://a/x.zip"}]}]}, "needs `into`"),
        ({"images": "x"}, "must be a list"),
        ({"annotations": [], "images": []}, "lists nothing"),
    ],
)  # fmt: skip
def test_manifests_that_are_wrong(server: Server, tmp_path: Path, changes: Any, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        load_manifest(manifest(tmp_path / "m.yaml", server, **changes))


@pytest.mark.parametrize("text", ["[", "- 1", "", "\0"])
def test_files_that_are_no_manifest(tmp_path: Path, text: str) -> None:
    (tmp_path / "m.yaml").write_text(text)
    with pytest.raises(UserError, match="manifest"):
        load_manifest(tmp_path / "m.yaml")
    with pytest.raises(UserError, match="no manifest"):
        load_manifest(tmp_path / "absent.yaml")


def test_download_reports_nothing_to_fetch(tmp_path: Path) -> None:
    (item,) = chosen_items(load_manifest(ROOT / "data" / "sharegpt4v.yaml"), ["sam"])
    with pytest.raises(UserError, match="accept the licence"):
        download([item], tmp_path)


def test_the_packaged_manifest_lists_every_source() -> None:
    items = load_manifest("sharegpt4v.yaml")
    assert [item.records for item in items if item.path.endswith(".json")] == [102025, 665058]
    folders = {item.path.removeprefix("images/") for item in items if item.path.startswith("images/")}
    assert folders == {
        "coco/train2017", "sam/images", "gqa/images", "ocr_vqa/images", "textvqa/train_images", "vg/VG_100K",
        "vg/VG_100K_2", "llava/llava_pretrain/images", "share_textvqa/images", "web-celebrity/images",
        "web-landmark/images", "wikiart/images",
    }  # fmt: skip
    for item in items:
        assert item.about and (item.downloads or item.by_hand), item.name
