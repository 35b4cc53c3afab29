"""`grace push` against a Hub of our own on this machine, and all that it refuses before it asks any."""

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from grace import cli
from grace.errors import UserError
from grace.export.pack import export_run
from grace.export.push import open_upload
from grace.export.record import RECORD, read_record

REPO = "somebody/small-model"


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub as a push talks to: repositories, branches, and commits whose files come inline."""

    repos: ClassVar[dict[str, dict[str, Any]]] = {}
    refused: ClassVar[str | None] = None  # part of a path that is answered with 403

    def log_message(self, format: str, *args: Any) -> None:
        """Silent."""

    def answer(self, value: Any, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if status >= 400:
            self.send_header("X-Error-Message", str(value["error"]))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        path = self.path.split("?")[0]
        if self.headers.get("Authorization") != "Bearer hf_good":
            return self.answer({"error": "Invalid credentials"}, 401)
        if self.refused and self.refused in path:
            return self.answer({"error": "You have no right to do this"}, 403)
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            if name in self.repos:
                return self.answer({"error": "exists", "url": f"http://{self.headers['Host']}/{name}"}, 409)
            private = asked.get("visibility", "public") == "private" or bool(asked.get("private"))
            self.repos[name] = {"private": private, "branches": {"main": {}}, "commits": []}
            return self.answer({"url": f"http://{self.headers['Host']}/{name}", "name": name})
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        repo = self.repos[REPO]
        if "/branch/" in path:
            repo["branches"].setdefault(path.rpartition("/")[2], {})
            return self.answer({})
        if "/preupload/" in path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                for file in json.loads(body)["files"]
            ]
            return self.answer({"files": files})
        if "/commit/" in path:
            lines = [json.loads(line) for line in body.splitlines()]
            branch = repo["branches"][path.rpartition("/")[2]]
            repo["commits"].append(next(x["value"]["summary"] for x in lines if x["key"] == "header"))
            for line in lines:
                if line["key"] == "file":
                    branch[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                if line["key"] == "deletedFile":
                    del branch[line["value"]["path"]]
            return self.answer(
                {"commitUrl": f"http://{self.headers['Host']}/{REPO}/commit/1", "commitOid": "1" * 40}
            )
        return self.answer({"error": f"unknown {path}"}, 404)

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        repo = self.repos.get(REPO)
        if repo is None:
            return self.answer({"error": "Repository not found"}, 404)
        branch = path.partition("/revision/")[2] or "main"
        if branch not in repo["branches"]:
            return self.answer({"error": "Revision not found"}, 404)
        siblings = [{"rfilename": name} for name in repo["branches"][branch]]
        return self.answer({"id": REPO, "private": repo["private"], "siblings": siblings, "sha": "0" * 40})


@pytest.fixture
def hub():
    """The address of an empty Hub."""
    Hub.repos, Hub.refused = {}, None
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def push(
    hub: str, directory: Path, *options: str, token: str | None = "hf_good"
) -> subprocess.CompletedProcess:
    """`grace push` as a user runs it."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {
        "HF_ENDPOINT": hub,
        "HF_HOME": str(directory.parent / "no-token-here"),
        "HF_HUB_DISABLE_XET": "1",
    }
    if token is not None:
        environment["HF_TOKEN"] = token
    command = [sys.executable, "-m", "grace", "push", str(directory), REPO, *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


@pytest.fixture
def export(awq_dir: Path, tmp_path: Path) -> Path:
    """An export to do anything with."""
    shutil.copytree(awq_dir, tmp_path / "export")
    return tmp_path / "export"


def test_a_push_is_one_private_commit_of_exactly_these_files(hub: str, export: Path):
    (export / ".git").mkdir()
    (export / ".git" / "config").write_text("[remote]")
    done = push(hub, export, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["commit"] == "1" * 40 and report["private"] and not report["dry_run"]
    assert f"pushed: {hub}/{REPO}/commit/1" in done.stderr
    repo = Hub.repos[REPO]
    assert repo["private"] and repo["commits"] == ["GRACE W4G128, awq"]
    files = {path.name: path.read_bytes() for path in export.iterdir() if path.is_file()}
    assert repo["branches"]["main"] == files and set(report["files"]) == set(files)


def test_a_branch_a_message_and_files_of_an_earlier_push(hub: str, export: Path):
    Hub.repos[REPO] = {"private": True, "branches": {"main": {}, "w4": {}}, "commits": []}
    Hub.repos[REPO]["branches"]["w4"] = {"model-00001-of-00002.safetensors": b"old", "notes.txt": b"mine"}
    done = push(hub, export, "--revision", "w4", "--message", "second try")
    assert done.returncode == 0, done.stderr
    repo = Hub.repos[REPO]
    assert repo["commits"] == ["second try"] and repo["branches"]["main"] == {}
    assert "model-00001-of-00002.safetensors" not in repo["branches"]["w4"]  # a loader would have read it
    assert {"notes.txt", "model.safetensors"} <= set(repo["branches"]["w4"])


def test_what_is_public_stays_out_of_a_private_push(hub: str, export: Path):
    Hub.repos[REPO] = {"private": False, "branches": {"main": {}}, "commits": []}
    refused = push(hub, export)
    assert refused.returncode == 2 and "pass --public" in refused.stderr and not Hub.repos[REPO]["commits"]
    assert push(hub, export, "--public").returncode == 0 and Hub.repos[REPO]["commits"]
    Hub.repos = {}
    assert push(hub, export, "--public").returncode == 0 and not Hub.repos[REPO]["private"]


@pytest.mark.parametrize(
    ("token", "refused", "address", "message"),
    [
        (None, None, None, "set HF_TOKEN"),
        ("hf_bad", None, None, "nothing was pushed"),
        ("hf_good", "/commit/", None, "nothing was pushed"),
        ("hf_good", None, "http://127.0.0.1:9", "nothing was pushed"),
    ],
    ids=["no token", "bad token", "no right", "no network"],
)
def test_the_hub_s_refusals_are_one_line(hub: str, export: Path, token, refused, address, message: str):
    Hub.refused = refused
    done = push(address or hub, export, token=token)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(errors) == 1 and message in errors[0], done.stderr
    assert "Traceback" not in done.stderr
    assert not any(repo["branches"]["main"] for repo in Hub.repos.values())


def test_a_dry_run_shows_the_files_and_asks_nobody(export: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("grace.export.push.HfApi", None)
    monkeypatch.setattr("grace.export.push.get_token", None)
    assert cli.main(["push", str(export), REPO, "--dry-run", "--json"]) == 0
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert report["dry_run"] and report["url"] is None and report["private"]
    assert report["files"]["model.safetensors"] == (export / "model.safetensors").stat().st_size
    assert "model.safetensors" in printed.err and f"would go to {REPO}, main, private" in printed.err


@pytest.mark.parametrize(
    "repo", ["", "name", "a/b/c", "a//b", "../up", "a/b c", "a/-b", "a/b.git", "a/" + "x" * 97]
)
def test_names_that_no_repository_has(export: Path, capsys, repo: str):
    assert cli.main(["push", str(export), repo, "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "OWNER/NAME" in error


# ---------------------------------------------------------------- the record and the card


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def resign(out: Path, **changes: Any) -> None:
    record = json.loads((out / RECORD).read_text()) | changes
    del record["sha256"]
    text = json.dumps(record, sort_keys=True)
    (out / RECORD).write_text(json.dumps({**record, "sha256": hashlib.sha256(text.encode()).hexdigest()}))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda out: (out / RECORD).unlink(), "no passed parity gate"),
        (lambda out: flip(out / "model.safetensors"), "model.safetensors is not the file that passed"),
        (lambda out: edit(out / "config.json", "128", "64"), "config.json is not the file that passed"),
        (lambda out: (out / "tokenizer.json").unlink(), "tokenizer.json is not the file that passed"),
        (lambda out: edit(out / RECORD, '"bits": 4', '"bits": 8'), "it was edited"),
        (lambda out: edit(out / RECORD, "{", ""), "damaged"),
        (lambda out: (out / RECORD).write_text("[]"), "damaged"),
        (lambda out: (out / RECORD).write_text("[" * 100_000), "damaged"),
        (lambda out: resign(out, bits=None), "bits is 'None'"),
        (lambda out: resign(out, format=None), "format is 'None'"),
        (lambda out: resign(out, files={"x" * 5000: {"bytes": 1, "sha256": "0"}}), "cannot be read"),
        (lambda out: (out / "README.md").write_text(""), "no front matter"),
        (
            lambda out: (out / "README.md").write_text(f"---\na: {'[' * 5000}{']' * 5000}\n---\n"),
            "no model card",
        ),
        (lambda out: (out / RECORD).write_bytes(b"\xff"), "damaged"),
        (lambda out: (out / "adapter.bin").write_bytes(b"x"), "adapter.bin came after the parity gate"),
        (lambda out: (out / "key.txt").symlink_to("/etc/passwd"), "key.txt is a link"),
        (lambda out: (out / "README.md").unlink(), "no model card"),
        (lambda out: edit(out / "README.md", "license: apache-2.0\n", ""), "license is missing"),
        (lambda out: edit(out / "README.md", "image-text-to-text", "text-generation"), "pipeline_tag"),
        (lambda out: edit(out / "README.md", "Qwen/Qwen3", "a b/Qwen3"), "no repository of the Hub"),
        (
            lambda out: edit(out / "README.md", "relation: quantized", "relation: cousin"),
            "relation is none of",
        ),
        (lambda out: edit(out / "README.md", "tags:", "tags: [a, b"), "no model card"),
    ],
)
def test_what_is_not_a_checked_export_does_not_go(export: Path, capsys, damage, message: str):
    damage(export)
    assert cli.main(["push", str(export), REPO, "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error


def test_a_card_may_be_added_to(export: Path):
    with (export / "README.md").open("a") as card:
        card.write("\n![one](example.png)\n")
    (export / "example.png").write_bytes(b"picture")
    assert {"example.png", "README.md", RECORD} <= set(open_upload(export).files)


def test_one_of_several_exports(qat_run: Path, tmp_path: Path):
    export_run(qat_run, tmp_path / "out", ("qat", "awq"))
    with pytest.raises(UserError, match="several exports: give one of awq, qat"):
        read_record(tmp_path / "out")
    record = read_record(tmp_path / "out" / "qat")
    assert "grace_qat/state.safetensors" in record["files"] and record["parity"]["weights_identical"]
    with pytest.raises(UserError, match="not a directory"):
        read_record(tmp_path / "nowhere")
