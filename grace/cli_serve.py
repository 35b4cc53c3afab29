"""`grace serve`: its arguments."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from grace.arguments import add, byte_size, integer, number
from grace.cli_runtime import HEADS
from grace.errors import Parser

# Copy of grace.runtime.serve.other_engines.ENGINES with our own: importing that costs seconds.
ENGINES = ("grace", "vllm", "sglang")


def add_serve(commands: "argparse._SubParsersAction[Parser]", kernels: Sequence[str]) -> None:
    """`grace serve DIR`."""
    summary = "Answer OpenAI-compatible requests over HTTP, with a chat page at /."
    parser = add(commands, "serve", summary, _serve, "serve")
    parser.add_argument("directory", metavar="DIR", type=Path, help="an exported model or a run's model/")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; default: %(default)s")
    parser.add_argument(
        "--port", type=integer(0), default=8000, help="0 takes a free one; default: %(default)s"
    )
    parser.add_argument("--served-model-name", metavar="NAME", help="default: the directory's name")
    parser.add_argument(
        "--engine", choices=ENGINES, default="grace", help="what runs it; default: %(default)s"
    )
    sizes = parser.add_argument_group("sizes")
    sizes.add_argument(
        "--max-batch", type=integer(1), metavar="N", help="answers decoded together; default: 16"
    )
    sizes.add_argument(
        "--context", type=integer(2), metavar="N", help="tokens of prompt, pictures and answer; default: 4096"
    )
    sizes.add_argument(
        "--max-queue", type=integer(0), metavar="N", help="answers that may wait, beyond is 429; default: 128"
    )
    sizes.add_argument("--max-body", type=byte_size, metavar="SIZE", help="of one request; default: 32MiB")
    sizes.add_argument(
        "--request-timeout", type=number(0, open_low=True), metavar="S", help="seconds; default: 600"
    )
    sizes.add_argument(
        "--max-pixels", type=integer(1), metavar="N",
        help="larger pictures are scaled down to this area; default: the model's, at most half the context",
    )  # fmt: skip
    pictures = parser.add_argument_group("pictures, besides data URLs")
    pictures.add_argument(
        "--allow-urls", action="store_true", help="fetch http(s) URLs, from public addresses only"
    )
    pictures.add_argument(
        "--image-root", type=Path, metavar="DIR", help="read file:// URLs below this directory"
    )
    running = parser.add_argument_group("running")
    running.add_argument(
        "--kernel", choices=kernels, default="auto", help="for packed layers; default: %(default)s"
    )
    running.add_argument(
        "--head",
        choices=HEADS,
        default="bf16",
        help="the output layer, rounded while loading; default: %(default)s",
    )
    running.add_argument("--device", metavar="NAME", help="cpu, cuda or cuda:1; default: cpu")
    running.add_argument("--access-log", action="store_true", help="a line on stderr for every request")


def _serve(args: argparse.Namespace) -> int:
    from grace.runtime.serve.command import run_serve

    return run_serve(args)
