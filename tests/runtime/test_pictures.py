"""Pictures from files, URLs and standard input, and one line for what is none."""

import http.server
import io
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from grace.errors import UserError
from grace.runtime import pictures
from grace.runtime.pictures import load_picture


@pytest.fixture(scope="module")
def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 10), "red").save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def server(png: bytes):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = {"/a.png": png, "/text": b"hello", "/half.png": png[: len(png) // 2]}.get(self.path)
            self.send_response(200 if found else 404)
            self.end_headers()
            self.wfile.write(found or b"")

        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def from_stdin(monkeypatch: pytest.MonkeyPatch, data: bytes) -> Image.Image:
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(data)))
    return load_picture("-")


def test_every_source(server: str, png: bytes, tmp_path: Path, monkeypatch):
    (tmp_path / "a.png").write_bytes(png)
    for image in (
        load_picture(tmp_path / "a.png"), load_picture(str(tmp_path / "a.png")), load_picture(f"{server}/a.png"),
        from_stdin(monkeypatch, png), load_picture(Image.new("L", (20, 10), 5)),
    ):  # fmt: skip
        assert image.size == (20, 10) and image.mode == "RGB"


def test_what_is_no_picture(server: str, png: bytes, tmp_path: Path, monkeypatch):
    for name, message in [
        (f"{server}/none.png", "answers 404"),
        (f"{server}/text", "no picture in a known format"),
        (f"{server}/half.png", "cannot be read"),
        ("http://127.0.0.1:1/a.png", "cannot be reached"),
        (str(tmp_path / "none.png"), "no such file"),
        ("ftp://example/a.png", "no such file"),
    ]:
        with pytest.raises(UserError, match=message) as caught:
            load_picture(name)
        assert "\n" not in str(caught.value) and name in str(caught.value)
    with pytest.raises(UserError, match="on standard input cannot be read .no bytes"):
        from_stdin(monkeypatch, b"")
    with pytest.raises(UserError, match="on standard input"):
        from_stdin(monkeypatch, png[:30])
    monkeypatch.setattr(pictures, "MAX_BYTES", 50)
    with pytest.raises(UserError, match="more than"):
        from_stdin(monkeypatch, png)
    with pytest.raises(UserError, match="cannot be read"):
        load_picture(f"{server}/a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    monkeypatch.setattr(pictures, "MAX_BYTES", 1000)
    with pytest.raises(UserError, match="20 x 10 pixels"):
        from_stdin(monkeypatch, png)
