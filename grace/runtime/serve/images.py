"""From what a request calls a picture to pixels: data URLs, fetched URLs and files, decoded in another process."""

import asyncio
import base64
import binascii
import contextlib
import struct
import sys
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

from PIL import Image

from grace.data import image_worker
from grace.runtime.serve.errors import ApiError, bad_request
from grace.runtime.serve.fetch import FetchError, fetch
from grace.runtime.serve.files import FileRefused, read_below

MAX_IMAGES = 64  # of one request
MAX_BYTES = 32 << 20  # of one file
MAX_PIXELS = 40_000_000  # decoded; 120 MB as RGB
_WORKER_MEMORY = 1 << 30
_MEDIA_TYPES = {*image_worker.FORMATS.values(), "image/jpg", "image/x-ms-bmp"}
_OTHER_NAMES = {"image/jpg": "image/jpeg", "image/x-ms-bmp": "image/bmp"}


@dataclass(frozen=True)
class ImageRules:
    """What a server lets requests refer to.

    Attributes:
        allow_urls: whether http and https URLs are fetched; never from private addresses.
        root: where `file:` URLs may point; None refuses them all.
        seconds: that decoding, and likewise fetching, may take.
    """

    allow_urls: bool = False
    root: Path | None = None
    max_pixels: int = MAX_PIXELS
    seconds: float = 20.0


class Images:
    """Loads pictures, at most `workers` at once: each one in work holds its pixels."""

    def __init__(self, rules: ImageRules, workers: int = 2):
        self.rules = rules
        self._idle: list[asyncio.subprocess.Process] = []
        self._turns = asyncio.Semaphore(workers)
        self._fetchers = ThreadPoolExecutor(8, "grace-fetch")

    @contextlib.asynccontextmanager
    async def load(self, url: str, param: str) -> AsyncIterator[Image.Image]:
        """The picture of a URL; the next one may be decoded when the block ends.

        Args:
            param: the field of the request that holds the URL.

        Raises:
            ApiError: 400 with the reason.
        """
        data = await self._bytes(url, param)
        async with self._turns:
            yield await self._decode(data, param)

    async def close(self) -> None:
        """Ends the worker processes."""
        for worker in self._idle:
            await _end(worker)
        self._idle.clear()
        self._fetchers.shutdown(wait=False, cancel_futures=True)

    async def _bytes(self, url: str, param: str) -> bytes:
        scheme = url[:10].partition(":")[0].lower()
        if scheme == "data":
            return await asyncio.to_thread(_from_data_url, url, param)
        if scheme in ("http", "https"):
            if not self.rules.allow_urls:
                raise bad_request(
                    "this server fetches no URLs: send the picture as a data URL", param, "unsupported"
                )
            try:
                return await self._fetched(fetch, url, MAX_BYTES, self.rules.seconds)
            except FetchError as error:
                raise bad_request(
                    f"the picture cannot be fetched: {error}", param, "invalid_image_url"
                ) from error
        if scheme == "file":
            if self.rules.root is None:
                raise bad_request(
                    "this server reads no files: send the picture as a data URL", param, "unsupported"
                )
            try:
                return await self._fetched(read_below, self.rules.root, url, MAX_BYTES)
            except FileRefused as error:
                raise bad_request(str(error), param, "invalid_image_url") from error
        raise bad_request(
            "a picture must be a data URL (data:image/png;base64,...)", param, "invalid_image_url"
        )

    async def _fetched(self, work: Callable[..., bytes], *args: Any) -> bytes:
        """What may wait for others runs on threads of its own: those of the event loop stay free."""
        return await asyncio.get_running_loop().run_in_executor(self._fetchers, work, *args)

    async def _decode(self, data: bytes, param: str) -> Image.Image:
        worker = self._idle.pop() if self._idle else await self._start()
        try:
            async with asyncio.timeout(self.rules.seconds):
                result = await _ask(worker, data)
        except TimeoutError as error:
            await _end(worker)
            raise bad_request("the picture takes too long to decode", param, "invalid_image") from error
        except (OSError, EOFError) as error:  # it died, of its memory limit or of a decoder's fault
            await _end(worker)
            raise bad_request("the picture cannot be decoded", param, "invalid_image") from error
        except BaseException:  # cancelled half-way through the exchange
            worker.kill()
            raise
        self._idle.append(worker)
        if isinstance(result, str):
            raise bad_request(f"the picture cannot be used: {result}", param, "invalid_image")
        return result

    async def _start(self) -> asyncio.subprocess.Process:
        arguments = (image_worker.__file__, str(self.rules.max_pixels), str(_WORKER_MEMORY))
        pipe = asyncio.subprocess.PIPE
        try:
            return await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", *arguments), stdin=pipe, stdout=pipe, start_new_session=True
            )
        except OSError as error:  # no more processes or files to be had
            raise ApiError(503, "the server is overloaded", code="overloaded", retry_after=5) from error


async def _ask(worker: asyncio.subprocess.Process, data: bytes) -> Image.Image | str:
    """A picture, or what is wrong with it."""
    assert worker.stdin is not None and worker.stdout is not None  # both are pipes
    worker.stdin.write(struct.pack(">Q", len(data)))
    worker.stdin.write(data)
    await worker.stdin.drain()
    if await worker.stdout.readexactly(1) == b"E":
        (length,) = struct.unpack(">I", await worker.stdout.readexactly(4))
        return (await worker.stdout.readexactly(length)).decode()
    width, height = struct.unpack(">II", await worker.stdout.readexactly(8))
    pixels = await worker.stdout.readexactly(width * height * 3)
    return await asyncio.to_thread(Image.frombytes, "RGB", (width, height), pixels)


async def _end(worker: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        worker.kill()
    await worker.wait()


def _from_data_url(url: str, param: str) -> bytes:
    head, comma, payload = url[5:].partition(",")
    kind, *options = (part.strip().lower() for part in head.split(";"))
    code = "invalid_image_url"
    if not comma:
        raise bad_request("the data URL has no comma", param, code)
    if kind not in _MEDIA_TYPES:
        known = ", ".join(sorted(image_worker.FORMATS.values()))
        raise bad_request(
            f"the data URL is of type {kind[:50] or 'text/plain'!r}: send one of {known}", param, code
        )
    if "base64" not in options:
        raise bad_request("the data URL is not base64", param, code)
    try:
        raw = unquote_to_bytes(payload) if "%" in payload else payload.encode("ascii")
        data = base64.b64decode(raw, validate=True)
    except (binascii.Error, ValueError) as error:  # UnicodeEncodeError among them
        raise bad_request(f"the data URL is not valid base64 ({error})", param, code) from error
    if not data:
        raise bad_request("the data URL is empty", param, code)
    if len(data) > MAX_BYTES:
        raise bad_request(f"the picture has more than {MAX_BYTES:,} bytes", param, code)
    found = image_worker.media_type(data)
    if found is None:
        raise bad_request("the data URL holds no PNG, JPEG, WebP, GIF or BMP picture", param, "invalid_image")
    if found != _OTHER_NAMES.get(kind, kind):
        raise bad_request(f"the data URL says {kind} but holds {found}", param, "invalid_image")
    return data
