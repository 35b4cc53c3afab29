"""Fetching: no way into private networks, by any spelling, and an end to everything."""

import ipaddress
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from grace.runtime.serve import fetch as module
from grace.runtime.serve.fetch import FetchError, fetch, is_public

PRIVATE = [
    "127.0.0.1", "127.8.8.8", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "0.0.0.0", "100.64.0.1",
    "224.0.0.1", "255.255.255.255", "240.0.0.1", "192.0.2.1", "198.18.0.1",
    "::1", "::", "fe80::1", "fc00::1", "fd12::1", "fec0::1", "ff02::1", "2001:db8::1",
    "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254", "::127.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a00:1",
    "2002:7f00:1::", "2002:a00:1::1",
]  # fmt: skip


@pytest.mark.parametrize("address", PRIVATE)
def test_private_addresses(address):
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "1.1.1.1", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"]
)
def test_public_addresses(address):
    assert is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    "url",
    [
        *(
            f"http://{host}/x.png"
            for host in ("127.0.0.1", "localhost", "localhost.", "2130706433", "0x7f000001", "0177.0.0.1")
        ),
        *(
            f"http://{host}/x.png"
            for host in ("127.1", "0", "[::1]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[fe80::1%25lo]")
        ),
        "http://169.254.169.254/latest/meta-data/",
        "https://10.0.0.1/x.png",
        "http://127.0.0.1:22/",
    ],
)
def test_urls_of_private_addresses(url, monkeypatch):
    monkeypatch.setattr(socket, "create_connection", lambda *a, **k: pytest.fail("connected"))
    with pytest.raises(FetchError, match="not public|not known"):
        fetch(url, 100, 5)


@pytest.mark.parametrize(
    "url",
    [
        "ftp://example.org/x", "file:///etc/passwd", "http:///x", "http://", "http://[::1/x", "http://a:99999/",
        "http://user:word@example.org/x", "http://example.org@127.0.0.1/x", "http://example.org/a b", "gopher://x/",
        "http://example.org/\r\nX: y",
    ],
)  # fmt: skip
def test_urls_that_are_none(url, monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: pytest.fail("resolved"))
    with pytest.raises(FetchError):
        fetch(url, 100, 5)


def test_a_name_is_resolved_once_and_every_address_checked(monkeypatch):
    answers = [["8.8.8.8", "127.0.0.1"], ["8.8.8.8"], ["127.0.0.1"]]

    def resolve(host: str, port: int, **_: Any) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (one, port)) for one in answers.pop(0)]

    connected = []

    def connect(address: tuple[str, int], timeout: float) -> socket.socket:
        connected.append(address)
        raise ConnectionRefusedError

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(socket, "create_connection", connect)
    with pytest.raises(FetchError, match="not public"):  # a mix
        fetch("http://mixed.example/x", 100, 5)
    with pytest.raises(FetchError, match="cannot be reached"):
        fetch("http://rebound.example:81/x", 100, 5)
    assert connected == [("8.8.8.8", 81)]  # an address, not the name: the third answer was never asked for
    assert answers == [["127.0.0.1"]]


# ---------------------------------------------------------------- another server


Answer = Callable[[BaseHTTPRequestHandler], None]


@pytest.fixture
def other(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, Answer], str]]:
    """A server on this machine: `other(path, answer)` gives the URL of a page that it answers so."""
    pages: dict[str, Answer] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            pages[self.path](self)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def add(path: str, answer: Answer) -> str:
        pages[path] = answer
        return f"http://127.0.0.1:{server.server_port}{path}"

    yield add
    server.shutdown()
    server.server_close()


def say(data: bytes = b"", status: int = 200, **headers: str) -> Answer:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in ({"Content_Length": str(len(data))} | headers).items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(data)

    return answer


def anywhere(address: Any) -> bool:
    return True


def test_contents_and_redirects(other):
    there = other("/there", say(b"picture"))
    here = other("/here", say(status=302, Location="/there"))
    assert fetch(there, 7, 5, anywhere) == b"picture"
    assert fetch(here, 7, 5, anywhere) == b"picture"
    circle = other("/circle", say(status=302, Location="/circle"))
    with pytest.raises(FetchError, match="redirects"):
        fetch(circle, 7, 5, anywhere)


def test_a_redirect_is_checked_like_the_first_url(other):
    inside = other("/inside", lambda handler: pytest.fail("reached"))
    asked = []

    def first_only(address: Any) -> bool:
        asked.append(str(address))
        return len(asked) == 1

    with pytest.raises(FetchError, match="not public"):
        fetch(other("/out", say(status=301, Location=inside)), 7, 5, first_only)
    for place in ("file:///etc/passwd", "ftp://x/y", "http://[::1"):
        with pytest.raises(FetchError):
            fetch(other("/odd", say(status=301, Location=place)), 7, 5, anywhere)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (say(b"12345678"), "more than 7 bytes"),
        (say(b"x", status=404), "answers 404"),
        (say(b"x", Content_Encoding="gzip"), "compressed"),
        (say(b"x", Content_Length="5"), "cannot be reached|broke off"),
        (lambda handler: handler.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n12345678"), "more than 7 bytes"),
        (lambda handler: handler.wfile.write(b"nonsense\r\n\r\n"), "nonsense"),
    ],
)
def test_answers_that_cannot_be_used(other, answer, message):
    with pytest.raises(FetchError, match=message):
        fetch(other("/x", answer), 7, 5, anywhere)


@pytest.mark.parametrize("part", ["head", "contents"])
def test_a_drip_ends_at_the_deadline(other, part):
    def drip(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(
            b"HTTP/1.1 200 OK\r\n" + (b"" if part == "head" else b"Content-Length: 9999\r\n\r\n")
        )
        try:
            for _ in range(100):
                handler.wfile.write(b"x" if part == "contents" else b"X: y\r\n")
                time.sleep(0.05)
        except OSError:
            pass

    start = time.monotonic()
    with pytest.raises(FetchError, match="too long"):
        fetch(other("/drip", drip), 10**6, 0.4, anywhere)
    assert time.monotonic() - start < 2


def test_proxies_of_the_environment_are_not_used(other, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    assert fetch(other("/x", say(b"1")), 7, 5, anywhere) == b"1"


def test_tls_is_checked_against_the_name(monkeypatch):
    seen = {}

    class Context:
        def wrap_socket(self, plain: socket.socket, server_hostname: str) -> socket.socket:
            seen["name"] = server_hostname
            raise OSError("stop here")

    ours, theirs = socket.socketpair()
    monkeypatch.setattr(module.ssl, "create_default_context", Context)
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda *a, **k: [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("8.8.8.8", 443))]
    )
    monkeypatch.setattr(socket, "create_connection", lambda *a, **k: ours)
    with theirs, pytest.raises(FetchError):
        fetch("https://pictures.example/x", 7, 5)
    assert seen == {"name": "pictures.example"} and ours.fileno() == -1
