"""The endpoints."""

import asyncio
import contextlib
import hmac
import json
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Sequence
from typing import Any, TypeVar

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import Message, Receive, Scope, Send

from grace.runtime.serve.answers import ChatWriter, CompletionWriter, Writer
from grace.runtime.serve.errors import ApiError
from grace.runtime.serve.listener import is_loopback
from grace.runtime.serve.page import load_page
from grace.runtime.serve.schema import Request as Wanted
from grace.runtime.serve.schema import read_chat, read_completion
from grace.runtime.serve.service import Answers, Service

T = TypeVar("T")

_PATHS = {"/", "/health", "/metrics", "/v1/models", "/v1/chat/completions", "/v1/completions"}


def create_app(service: Service, key: str | None = None, local: bool = False) -> FastAPI:
    """The application.

    Args:
        key: what clients must send as `Authorization: Bearer KEY`, except to `/` and `/health`.
        local: only this machine can reach it, and it relies on that.
    """

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await service.stop()

    app = FastAPI(title="GRACE", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _our_fault)
    _add_pages(app, service)
    _add_endpoints(app, service, [Depends(_key_check(key)), Depends(_page_check(local))])
    app.add_middleware(_Observed, service=service)
    return app


# ---------------------------------------------------------------- endpoints


def _add_pages(app: FastAPI, service: Service) -> None:
    page, policy = load_page()
    headers = {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }

    @app.head("/")
    @app.get("/")
    async def index() -> Response:
        return Response(page, media_type="text/html", headers=headers)

    @app.head("/health")
    @app.get("/health")
    async def health() -> Response:
        status = "stopping" if service.stopping else "ok" if service.scheduler.well else "failing"
        return JSONResponse({"status": status}, 200 if status == "ok" else 503)


def _add_endpoints(app: FastAPI, service: Service, guards: Sequence[Any]) -> None:
    @app.get("/metrics", dependencies=guards)
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models", dependencies=guards)
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [_about(service)]})

    @app.get("/v1/models/{name:path}", dependencies=guards)
    async def model(name: str) -> Response:
        service.check_model(name)
        return JSONResponse(_about(service))

    @app.post("/v1/chat/completions", dependencies=guards)
    async def chat(request: Request) -> Response:
        arrived = time.monotonic()
        with contextlib.ExitStack() as places:
            async with service.bodies.json(request) as body:
                wanted = read_chat(body)
                service.check_model(wanted.model)
                places.enter_context(service.admitted(wanted.n or 1))
                with service.metrics.preparing.track_inprogress():
                    samples = [await service.prompts.chat(wanted.messages)]
                # Pictures as text and as pixels are large: neither is kept while the answer is awaited.
                wanted = wanted.model_copy(update={"messages": []})
                body.clear()
            places.enter_context(service.holding(samples))
            answers = service.submit(wanted, samples, arrived)
            del samples
            return await _reply(service, request, wanted, answers, ChatWriter, places)

    @app.post("/v1/completions", dependencies=guards)
    async def completions(request: Request) -> Response:
        arrived = time.monotonic()
        with contextlib.ExitStack() as places:
            async with service.bodies.json(request) as body:
                wanted = read_completion(body)
                service.check_model(wanted.model)
                prompts = wanted.prompts()
                places.enter_context(service.admitted(len(prompts) * (wanted.n or 1)))
                with service.metrics.preparing.track_inprogress():
                    samples = [await service.prompts.plain(prompt) for prompt in prompts]
            answers = service.submit(wanted, samples, arrived)
            return await _reply(service, request, wanted, answers, CompletionWriter, places)


def _about(service: Service) -> dict[str, Any]:
    return {
        "id": service.name,
        "object": "model",
        "created": service.started,
        "owned_by": "grace",
        "max_model_len": service.context,
        "weight_bytes": service.weight_bytes,
        "kind": service.engine.kind,
    }


async def _reply(
    service: Service,
    request: Request,
    wanted: Wanted,
    answers: Answers,
    kind: type[Writer],
    places: contextlib.ExitStack,
) -> Response:
    """The answers, whole or as events. A failure before the first token is an error in either case."""
    places.callback(answers.cancel)
    tokenizer = service.engine.processor.tokenizer
    writer = kind(service.name, tokenizer, len(answers.jobs), answers.prompt_tokens)
    if not wanted.stream:
        return JSONResponse(await unless_gone(request.receive, _whole(writer, answers)))
    first = await unless_gone(request.receive, answers.next())
    usage = wanted.stream_options is not None and bool(wanted.stream_options.include_usage)
    return EventStream(answers, writer, first, usage, places.pop_all())


async def _whole(writer: Writer, answers: Answers) -> dict[str, Any]:
    while outputs := await answers.next():
        for index, output in outputs:
            writer.add(index, output)
    return writer.whole()


async def unless_gone(receive: Receive, work: Awaitable[T]) -> T:
    """Awaits `work`, unless the client goes away first.

    Raises:
        ApiError: it went away; nobody will see this answer.
    """

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    watch, task = asyncio.ensure_future(gone()), asyncio.ensure_future(work)
    try:
        await asyncio.wait({watch, task}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(499, "the client went away")
        return task.result()
    finally:
        watch.cancel()
        task.cancel()


class EventStream(Response):
    """Server-sent events, several at a time for a client that reads slowly.

    Args:
        first: the outputs that have been taken already.
        usage: whether a last chunk counts the tokens.
        places: closed at the end, however it comes.
    """

    def __init__(
        self,
        answers: Answers,
        writer: Writer,
        first: list[Any],
        usage: bool,
        places: contextlib.ExitStack,
    ):
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self.raw_headers = [(name, value) for name, value in self.raw_headers if name != b"content-length"]
        self.raw_headers.append((b"content-type", b"text/event-stream; charset=utf-8"))
        self._answers, self._writer, self._first, self._usage, self._places = (
            answers, writer, first, usage, places,
        )  # fmt: skip

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._places, contextlib.suppress(ApiError):
            await unless_gone(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        events = self._writer.opening()
        outputs = self._first
        try:
            while outputs:
                chunks = (self._writer.chunk(index, output) for index, output in outputs)
                events += [chunk for chunk in chunks if chunk is not None]
                await self._write(send, events)
                events = []
                outputs = await self._answers.next()
            events = [self._writer.usage_chunk()] if self._usage else []
        except ApiError as error:
            events = [error.body()]
        await self._write(send, events, b"data: [DONE]\n\n")
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _write(self, send: Send, events: list[Any], tail: bytes = b"") -> None:
        body = b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events) + tail
        if body:
            await send({"type": "http.response.body", "body": body, "more_body": True})


# ---------------------------------------------------------------- guards


def _key_check(key: str | None) -> Any:
    expected = None if key is None else key.encode()

    async def check(request: Request) -> None:
        if expected is None:
            return
        given = next((value for name, value in request.scope["headers"] if name == b"authorization"), b"")
        scheme, _, sent = given.partition(b" ")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(sent, expected):
            raise ApiError(
                401, "the API key is missing or wrong: send Authorization: Bearer KEY", code="invalid_api_key"
            )

    return check


def _page_check(local: bool) -> Any:
    """Keeps pages of other sites from using this server through a visitor's browser."""

    async def check(request: Request) -> None:
        if request.method != "POST" or "origin" not in request.headers:
            return  # not from a page
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # which a browser does not send elsewhere without asking first
            raise ApiError(415, "send the body as application/json", code="unsupported_media_type")
        if local and not is_loopback(
            request.url.hostname or ""
        ):  # a foreign name that was made to point here
            raise ApiError(
                403, "this server is for pages of this machine: set GRACE_API_KEY to use it by a name"
            )

    return check


class _Observed:
    """Counts requests by path and status, and gives each an id. (Plain ASGI: it must not stand before disconnects.)"""

    def __init__(self, app: Any, service: Service):
        self._app, self._requests = app, service.metrics.requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in _PATHS else "other"

        async def observed(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._requests.labels(path, message["status"]).inc()
                message["headers"] = [*message["headers"], (b"x-request-id", uuid.uuid4().hex.encode())]
            await send(message)

        await self._app(scope, receive, observed)


# ---------------------------------------------------------------- errors


async def _api_error(_: Request, error: Any) -> Response:
    return JSONResponse(error.body(), error.status, headers=error.headers)


async def _http_error(_: Request, error: Any) -> Response:
    shaped = ApiError(error.status_code, str(error.detail))
    return JSONResponse(shaped.body(), error.status_code, headers=error.headers)


async def _our_fault(_: Request, error: Any) -> Response:
    shaped = ApiError(500, "the request failed: this is the server's fault, its log says more")
    return JSONResponse(shaped.body(), 500)
