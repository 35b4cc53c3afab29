"""uvicorn's HTTP protocol with the patience it lacks: with headers that do not come, and with answers nobody reads."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from grace.runtime.serve.errors import bad_request

HEADER_SECONDS = 15.0  # for a request's headers to arrive
READER_SECONDS = 60.0  # without the client taking a byte
REST_SECONDS = 3.0  # for the rest of a body that was refused: closing at once could lose the answer


class _Lingering:
    """A transport that does not close while the client still sends: data that nobody read would take the answer along.

    `close` ends our side alone; what arrives after it is thrown away, until the client ends its side or
    `REST_SECONDS` are over.
    """

    def __init__(self, transport: Any, is_sending: Callable[[], bool]):
        self._transport, self._is_sending = transport, is_sending
        self.lingers = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        return self.lingers or self._transport.is_closing()

    def close(self) -> None:
        if self.is_closing() or not self._is_sending():
            self._transport.close()
            return
        self.lingers = True
        self._transport.write_eof()
        self._transport.resume_reading()
        asyncio.get_running_loop().call_later(REST_SECONDS, self._transport.abort)


class Connection(H11Protocol):
    """One client's connection."""

    _headers_due: asyncio.TimerHandle | None = None
    _reader_due: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        self._lingering = _Lingering(transport, self._is_sending)
        super().connection_made(self._lingering)  # type: ignore[arg-type]
        self._headers_due = self.loop.call_later(HEADER_SECONDS, self.transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._headers_due, self._reader_due):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def _is_sending(self) -> bool:
        return self.conn.their_state in (h11.SEND_BODY, h11.ERROR)

    def data_received(self, data: bytes) -> None:
        if self._lingering.lingers:
            return
        super().data_received(data)
        waiting = self.conn.their_state is h11.IDLE and not self.transport.is_closing()
        if waiting and self._headers_due is None:  # a further request has begun to arrive
            self._headers_due = self.loop.call_later(HEADER_SECONDS, self.transport.abort)
        elif not waiting and self._headers_due is not None:
            self._headers_due.cancel()
            self._headers_due = None

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.conn.their_state is h11.SEND_BODY and not self.transport.is_closing():
            self.loop.call_later(REST_SECONDS, self._give_up, self.cycle)

    def _give_up(self, cycle: Any) -> None:
        if self.cycle is cycle and self.conn.their_state is h11.SEND_BODY:
            self.transport.abort()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._reader_due = self.loop.call_later(READER_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._reader_due is not None:
            self._reader_due.cancel()
            self._reader_due = None

    def timeout_keep_alive_handler(self) -> None:
        """Closing waits for the rest of the answer to be read: for a while, not for ever."""
        super().timeout_keep_alive_handler()
        self.loop.call_later(READER_SECONDS, self.transport.abort)

    def send_400_response(self, msg: str) -> None:
        body = json.dumps(bad_request(msg, code="invalid_http").body()).encode()
        headers = [
            ("content-type", "application/json"),
            ("content-length", str(len(body))),
            ("connection", "close"),
        ]
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            events = (h11.Response(status_code=400, headers=headers), h11.Data(data=body), h11.EndOfMessage())
            for event in events:
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
