"""Request bodies: read with a limit, a deadline and a common budget, and parsed with care.

What a hostile body can do otherwise: fill the memory (alone, or a thousand together), keep a connection for ever,
overflow the parser's stack, or become a thousand times larger as Python objects.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request
from starlette.requests import ClientDisconnect

from grace.runtime.serve.errors import ApiError, bad_request

# Brackets and commas: each makes an object of 50 bytes or more out of one or two. Base64 has none.
MAX_STRUCTURE = 200_000


class Bodies:
    """Reads bodies.

    Args:
        limit: bytes of one.
        total: bytes of all that are being read or worked on.
        seconds: that one may take to arrive.
    """

    def __init__(self, limit: int, total: int | None = None, seconds: float = 60.0):
        self.limit, self.total, self.seconds = limit, max(limit, total or 8 * limit), seconds
        self.held = 0

    @contextlib.asynccontextmanager
    async def json(self, request: Request) -> AsyncIterator[dict[str, Any]]:
        """The body as an object; its bytes count against the budget until the block ends.

        Raises:
            ApiError: too large, too slow, too many at once, or no JSON object.
        """
        raw = bytearray()
        held = 0
        try:
            try:
                await self._read(request, raw)
            finally:
                held = len(raw)
            value = await asyncio.to_thread(parse, raw)
            raw.clear()
            yield value
        finally:
            self.held -= held

    async def _read(self, request: Request, raw: bytearray) -> None:
        length = request.headers.get("content-length", "")
        if length.isdecimal() and int(length[:20]) > self.limit:
            raise self._too_large()
        try:
            async with asyncio.timeout(self.seconds):
                async for chunk in request.stream():
                    if len(raw) + len(chunk) > self.limit:
                        raise self._too_large()
                    if self.held + len(chunk) > self.total:
                        raise ApiError(
                            429,
                            "the server holds as many request bytes as it may: try again",
                            code="overloaded",
                            retry_after=1,
                        )
                    raw += chunk
                    self.held += len(chunk)
        except TimeoutError as error:
            raise ApiError(
                408, f"the body did not arrive within {self.seconds:g} s", code="timeout"
            ) from error
        except ClientDisconnect as error:
            raise bad_request("the client went away") from error

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            f"the body is larger than {self.limit:,} bytes: send fewer or smaller pictures",
            code="too_large",
        )


def parse(raw: bytes | bytearray) -> dict[str, Any]:
    """A JSON object from its bytes, by the letter of the standard.

    Raises:
        ApiError: anything else, NaN and Infinity, lone surrogates, extreme nesting and extreme numbers included.
    """
    if sum(raw.count(mark) for mark in (b"[", b"{", b",")) > MAX_STRUCTURE:
        raise bad_request("the body has too many JSON values", code="too_large")
    try:
        value = json.loads(raw.decode("utf-8"), parse_constant=_no_constant)
        if b"\\u" in raw:  # a lone surrogate can be written, but is no text
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise bad_request("the body is not UTF-8", code="invalid_json") from error
    except UnicodeEncodeError as error:
        raise bad_request("the body contains half a surrogate pair", code="invalid_json") from error
    except RecursionError as error:
        raise bad_request("the body is nested too deeply", code="invalid_json") from error
    except ValueError as error:
        raise bad_request(f"the body is not valid JSON ({error})", code="invalid_json") from error
    if not isinstance(value, dict):
        raise bad_request("the body must be a JSON object", code="invalid_json")
    return value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")
