"""`grace serve DIR`: from arguments to a running server, and back to exit code 0."""

import argparse
import asyncio
import contextlib
import ctypes
import logging
import os
import resource
import socket
import sys
from types import FrameType
from typing import Any

import uvicorn

from grace.arguments import is_utf8
from grace.errors import UserError
from grace.runtime.serve.app import create_app
from grace.runtime.serve.connection import Connection
from grace.runtime.serve.images import ImageRules
from grace.runtime.serve.listener import bind, is_loopback
from grace.runtime.serve.service import Limits, Service

MAX_BATCH, CONTEXT = 16, 4096
_M_ARENA_MAX = -8  # of glibc's malloc.h
GRACE_SECONDS = 10.0  # for running answers after SIGTERM


def run_serve(args: argparse.Namespace) -> int:
    """Entry point of `grace serve`.

    Raises:
        UserError: a port in use, a root that is none, a model that cannot be served.
    """
    key = api_key()
    if args.engine != "grace":
        from grace.runtime.serve.other_engines import start

        start(args, key)
    if args.image_root is not None and not args.image_root.is_dir():
        raise UserError(f"--image-root {args.image_root} is not a directory: give the folder of the pictures")
    logging.basicConfig(stream=sys.stderr, format="%(levelname)s: %(message)s", level=logging.WARNING)
    _raise_file_limit()
    _share_arenas()
    with bind(args.host, args.port) as listener:
        service = _load(args)
        url = _url(listener)
        if key is None and not is_loopback(args.host):
            print(f"warning: {url} is open to everybody who can reach it: set GRACE_API_KEY", file=sys.stderr)
        print(f"{service.name} at {url} (OpenAI API: {url}/v1)", file=sys.stderr, flush=True)
        local = key is None and is_loopback(args.host)
        serve(service, listener, key, local, access_log=args.access_log)
    return 0


def api_key() -> str | None:
    """The key of the environment variable GRACE_API_KEY.

    Raises:
        UserError: it is set but empty, which would mean nothing.
    """
    key = os.environ.get("GRACE_API_KEY")
    if key is not None and not key.strip():
        raise UserError("GRACE_API_KEY is empty: set it to the key that clients send, or unset it")
    if key is not None and not is_utf8(key):
        raise UserError("GRACE_API_KEY is not UTF-8: set it in that encoding")
    return key


def serve(
    service: Service, listener: socket.socket, key: str | None, local: bool, access_log: bool = False
) -> None:
    """Answers requests until SIGTERM or SIGINT; then those that are being answered have `GRACE_SECONDS`.

    Args:
        key, local: see `create_app`.
    """
    config = uvicorn.Config(
        create_app(service, key, local),
        http=Connection,
        ws="none",
        loop="asyncio",
        lifespan="on",
        log_config=None,
        access_log=access_log,
        server_header=False,
        timeout_keep_alive=20,
        timeout_graceful_shutdown=int(GRACE_SECONDS) + 5,
    )
    if access_log:
        logging.getLogger("uvicorn.access").setLevel(logging.INFO)
    _Server(config, service).run(sockets=[listener])


class _Server(uvicorn.Server):
    """uvicorn's server, which on a signal ends with exit code 0, and lets the scheduler know first."""

    def __init__(self, config: uvicorn.Config, service: Service):
        super().__init__(config)
        self._service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.force_exit = self.should_exit  # a second signal waits for nothing
        self.should_exit = True

    async def shutdown(self, sockets: Any = None) -> None:
        self._service.drain()
        late = asyncio.get_running_loop().call_later(GRACE_SECONDS, self._service.scheduler.halt)
        try:
            await super().shutdown(sockets)
        finally:
            late.cancel()
        if self.force_exit:  # left out by the library
            await self.lifespan.shutdown()


def _load(args: argparse.Namespace) -> Service:
    import transformers

    from grace.runtime.engine import load
    from grace.runtime.graphs import GraphDecoder
    from grace.runtime.serve.threads import settle_threads

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    name = args.served_model_name or args.directory.resolve().name
    rows, context = args.max_batch or MAX_BATCH, args.context or CONTEXT
    try:
        engine = load(
            args.directory, kernel=args.kernel, context=context, rows=rows, device=args.device, head=args.head
        )
    except (RuntimeError, MemoryError) as error:
        if "alloc" not in str(error) and "memory" not in str(error):
            raise
        raise UserError(
            f"no memory for the model and {rows} x {context} tokens: lower --max-batch or --context"
        ) from error
    if isinstance(engine.decoder, GraphDecoder):
        engine.decoder.warm_up()
    settle_threads(engine.decoder)
    rules = ImageRules(allow_urls=args.allow_urls, root=args.image_root)
    defaults = Limits()
    limits = Limits(
        queue=defaults.queue if args.max_queue is None else args.max_queue,
        body=args.max_body or defaults.body,
        seconds=args.request_timeout or defaults.seconds,
        pixels=args.max_pixels,
    )
    head = engine.decoder.head
    weights = weight_bytes(engine.model) + (0 if head.kind == "bf16" else head.weight_bytes())
    return Service(engine, name, weights, limits, rules)


def weight_bytes(model: Any) -> int:
    """Bytes of a model's parameters and buffers, shared ones once."""
    tensors = [*model.parameters(), *model.buffers()]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def _raise_file_limit() -> None:
    """Every client is an open file, and many systems start programs with 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65_536 if hard == resource.RLIM_INFINITY else min(hard, 65_536)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _share_arenas() -> None:
    """Two of glibc's memory arenas for all threads: each keeps what it once took, and threads here are many.

    With one for each thread memory went on growing by megabytes for some ten thousand requests before it was flat.
    """
    if "MALLOC_ARENA_MAX" not in os.environ:
        with contextlib.suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 2)


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
