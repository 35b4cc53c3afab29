"""Servers for tests: in this process over a decoder made up here, or `grace serve` in a process of its own."""

import asyncio
import base64
import contextlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import torch
import uvicorn
from PIL import Image
from torch import Tensor

from grace.data.template import Sample
from grace.runtime.serve.app import create_app
from grace.runtime.serve.connection import Connection
from grace.runtime.serve.images import ImageRules
from grace.runtime.serve.listener import bind
from grace.runtime.serve.service import Limits, Service


class MadeUpDecoder:
    """Repeats each prompt's text tokens from its start, over and over: an answer tells which prompt it belongs to.

    Attributes:
        broken: prompts that contain one of these tokens fail.
        gate: steps wait for it.
        faithful: demands that each row goes on with the token it was told.
    """

    def __init__(self, rows: int = 4, context: int = 512, vocabulary: int = 512, seconds: float = 0.0):
        self.rows, self.context, self.device = rows, context, torch.device("cpu")
        self._vocabulary, self._seconds = vocabulary, seconds
        self._prompts: dict[int, list[int]] = {}
        self._at: dict[int, int] = {}
        self.batches: list[list[int]] = []
        self.prompts_read: list[list[int]] = []
        self.broken: set[int] = set()
        self.faithful = True
        self.gate = threading.Event()
        self.gate.set()

    def prefill_all(self, rows: Sequence[int], samples: Sequence[Sample]) -> Tensor:
        return torch.stack([self._prefill(row, sample) for row, sample in zip(rows, samples, strict=True)])

    def _prefill(self, row: int, sample: Sample) -> Tensor:
        assert row not in self._prompts, f"row {row} is taken"
        prompt = sample.input_ids_L.tolist()
        if self.broken.intersection(prompt):
            raise RuntimeError("broken on purpose")
        self._prompts[row], self._at[row] = prompt, 0
        self.prompts_read.append(prompt)
        return self._logits(row)

    def decode(self, rows: Sequence[int], tokens: Sequence[int]) -> Tensor:
        self.gate.wait()
        time.sleep(self._seconds)
        self.batches.append([*rows])
        for row, token in zip(rows, tokens, strict=True):
            assert (
                not self.faithful or token == self._prompts[row][self._at[row] % len(self._prompts[row])]
            ), "another row's token"
            self._at[row] += 1
        return torch.stack([self._logits(row) for row in rows])

    def release(self, row: int) -> None:
        self._prompts.pop(row, None)
        self._at.pop(row, None)

    @property
    def taken(self) -> int:
        """Rows in use."""
        return len(self._prompts)

    def _logits(self, row: int) -> Tensor:
        logits_V = torch.zeros(self._vocabulary)
        logits_V[self._prompts[row][self._at[row] % len(self._prompts[row])]] = 20.0
        return logits_V


def service_for(
    decoder: MadeUpDecoder, processor: Any, limits: Limits | None = None, **rules: Any
) -> Service:
    """A service whose model is made up."""
    engine = SimpleNamespace(decoder=decoder, processor=processor, ends=frozenset(), kind="made up")
    return Service(engine, "small", 1234, limits or Limits(), ImageRules(**rules))


@contextlib.contextmanager
def live(service: Service, key: str | None = None, local: bool = False) -> Iterator[str]:
    """Runs a service on a free port of this machine; yields its URL."""
    config = uvicorn.Config(
        create_app(service, key, local),
        http=Connection,
        ws="none",
        lifespan="on",
        log_config=None,
        timeout_graceful_shutdown=2,
    )
    server = uvicorn.Server(config)
    with bind("127.0.0.1", 0) as listener:
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(30)
    assert not thread.is_alive()


class Serving:
    """`grace serve` as a user starts it.

    Attributes:
        url: where it listens.
        errors: what it has said on stderr, complete once it has ended.
    """

    def __init__(self, directory: Path, *options: str, **environment: str):
        words = [sys.executable, "-m", "grace", "serve", str(directory), "--port", "0", *options]
        self.process = subprocess.Popen(
            words, stderr=subprocess.PIPE, text=True, env=os.environ | environment
        )
        self.url, self.errors = "", ""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.errors += line
            if found := re.search(r" at (http://\S+) ", line):
                self.url = found[1]
                break
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        assert self.url, self.errors
        wait_for_health(self.url)

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.errors += self.process.stderr.read()

    def stop(self, sig: int = signal.SIGTERM, seconds: float = 30) -> int:
        """Sends a signal and waits; the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(sig)
        try:
            return self.process.wait(seconds)
        finally:
            self.process.kill()
            self._reader.join(10)

    def __enter__(self) -> "Serving":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def wait_for_health(url: str, seconds: float = 30) -> None:
    """Waits until a server says that it is well."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                return
        time.sleep(0.05)
    raise AssertionError(f"{url} does not get well")


# ---------------------------------------------------------------- requests


def question(text: Any = "Which digit", **fields: Any) -> dict[str, Any]:
    """The body of a chat request."""
    return {"messages": [{"role": "user", "content": text}], "max_tokens": 4, "temperature": 0, **fields}


def chat(url: str, body: Any, **options: Any) -> httpx.Response:
    """One request to the chat endpoint; `bytes` and `str` go as they are."""
    content = body if isinstance(body, bytes | str) else json.dumps(body)
    headers = {"Content-Type": "application/json"} | options.pop("headers", {})
    return httpx.post(f"{url}/v1/chat/completions", content=content, headers=headers, timeout=60, **options)


def picture(
    kind: str = "PNG", size: tuple[int, int] = (32, 32), colour: str = "red", **options: Any
) -> bytes:
    """The bytes of a picture."""
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, kind, **options)
    return file.getvalue()


def data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def with_picture(url: str, text: str = "What is it?") -> list[dict[str, Any]]:
    """The content of a message with one picture."""
    return [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """The events of a stream, its closing mark left out but demanded."""
    lines = [line for line in response.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]", lines[-1]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def raw(url: str, data: bytes, seconds: float = 5) -> bytes:
    """Sends bytes to a server and reads until it closes, or for some seconds."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=seconds) as link:
        link.sendall(data)
        answer = b""
        with contextlib.suppress(TimeoutError, ConnectionResetError):
            while block := link.recv(65536):
                answer += block
        return answer


def assert_refused(response: httpx.Response, status: int, param: str | None = None) -> dict[str, Any]:
    """An error in OpenAI's shape; returns what is in it."""
    assert response.status_code == status, (response.status_code, response.text[:500])
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"] and error["type"]
    assert "\n" not in error["message"] and "Traceback" not in error["message"]
    if param is not None:
        assert error["param"] == param, error
    return error
