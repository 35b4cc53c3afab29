"""`grace generate` and `grace bench`: their arguments."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grace.arguments import add, add_json, integer, number, text
from grace.errors import Parser

# Copies of names in grace.runtime: importing it costs seconds. A test keeps them equal.
PRESETS = ("deterministic", "open-ended")
HEADS = ("bf16", "int8", "int4")
SYNTHETIC = ("qwen3-vl-2b", "qwen3-vl-4b", "qwen3-vl-8b")


def add_generate(commands: "argparse._SubParsersAction[Parser]", kernels: Sequence[str]) -> None:
    """`grace generate DIR`."""
    parser = add(
        commands, "generate", "Answer prompts about pictures: one, a chat, or a file of them.", _generate
    )
    parser.add_argument("directory", metavar="DIR", type=Path, help="an exported model or a run's model/")
    parser.add_argument(
        "--image", nargs="+", action="extend", default=[], metavar="PICTURE",
        help="files, http(s) URLs or - for standard input, in order; one or many",
    )  # fmt: skip
    parser.add_argument("--prompt", type=text, metavar="TEXT", help="may place each picture with <image>")
    parser.add_argument(
        "--system", type=text, metavar="TEXT", help="a system message before the conversation"
    )
    ways = parser.add_argument_group("instead of one prompt")
    ways.add_argument("--chat", action="store_true", help="a conversation, line by line; /help says more")
    ways.add_argument(
        "--batch", type=Path, metavar="FILE",
        help='JSON lines of requests: {"id", "prompt", "images"} or {"id", "messages"}, with settings of their own',
    )  # fmt: skip
    ways.add_argument(
        "--out", type=Path, metavar="FILE",
        help="where --batch appends its answers as JSON lines; run again, it goes on after what is there",
    )  # fmt: skip
    _add_sampling(parser)
    _add_running(parser, kernels).add_argument(
        "--context", type=integer(2), metavar="N", help="tokens of prompt, pictures and answer; default: as needed"
    )  # fmt: skip
    parser.add_argument(
        "--rows", type=integer(1), metavar="N", help="requests of --batch decoded together; default: 4"
    )
    add_json(parser)


def _add_sampling(parser: Parser) -> None:
    group = parser.add_argument_group("the answer")
    group.add_argument(
        "--preset", choices=PRESETS,
        help="deterministic: 256 new tokens, greedy; open-ended: 512, T 0.7, top-p 0.9; what else is given wins",
    )  # fmt: skip
    group.add_argument("--max-new-tokens", type=integer(1), metavar="N", help="default: 128")
    group.add_argument(
        "--temperature", type=number(0), metavar="T", help="default: 0, always the likeliest token"
    )
    group.add_argument("--top-p", type=number(0, 1, open_low=True), metavar="P", help="default: 1")
    group.add_argument(
        "--top-k", type=integer(0), metavar="K", help="sample from the K likeliest; default: 0, all"
    )
    group.add_argument(
        "--repetition-penalty",
        type=number(0, open_low=True),
        metavar="X",
        help="above 1 avoids tokens again; default: 1",
    )
    group.add_argument("--seed", type=integer(0), help="makes sampling repeatable")
    group.add_argument(
        "--stop",
        type=text,
        action="append",
        default=[],
        metavar="TEXT",
        help="ends the answer before this text; may be repeated",
    )


def _add_running(parser: Parser, kernels: Sequence[str]) -> Any:
    group = parser.add_argument_group("running")
    group.add_argument(
        "--kernel", choices=kernels, default="auto", help="for packed layers; default: %(default)s"
    )
    group.add_argument(
        "--head", choices=HEADS, default="bf16",
        help="the output layer: as stored, or rounded to 8 or 4 bits while loading; default: %(default)s",
    )  # fmt: skip
    group.add_argument("--device", metavar="NAME", help="cpu, cuda or cuda:1; default: cpu")
    return group


def add_bench(commands: "argparse._SubParsersAction[Parser]", kernels: Sequence[str]) -> None:
    """`grace bench DIR` and `grace bench --synthetic SIZE`."""
    summary = "Measure speed and memory at 4 bits against bfloat16, in one run."
    parser = add(commands, "bench", summary, _bench)
    parser.add_argument("directory", metavar="DIR", type=Path, nargs="?", help="an AWQ directory")
    parser.add_argument(
        "--synthetic", choices=SYNTHETIC,
        help="random weights at a published shape, in a temporary directory; needs no download",
    )  # fmt: skip
    parser.add_argument(
        "--batch", type=integer(1), nargs="+", default=None, metavar="N", help="rows; default: 1 4"
    )
    parser.add_argument(
        "--prefill",
        type=integer(1),
        nargs="+",
        default=None,
        metavar="N",
        help="prompt tokens; default: 128 512",
    )
    parser.add_argument(
        "--decode-at", type=integer(1), nargs="+", default=None, metavar="N",
        help="tokens before those that are decoded; default: 64 512",
    )  # fmt: skip
    parser.add_argument(
        "--new-tokens", type=integer(2), default=16, metavar="N", help="decoded per repeat; default: 16"
    )
    parser.add_argument("--repeats", type=integer(1), default=5, metavar="N", help="interleaved; default: 5")
    parser.add_argument(
        "--quick", action="store_true", help="batch 1, one prompt length, 3 repeats of 8 tokens"
    )
    parser.add_argument(
        "--threads", type=integer(1), metavar="N", help="of the CPU; default: as torch sets them"
    )
    _add_running(parser, kernels)
    parser.add_argument(
        "--tmp", type=Path, metavar="DIR", help="where --synthetic writes; default: the system's"
    )
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw the table, as .png or .svg (needs matplotlib)"
    )
    parser.epilog = (
        "In the JSON, decode_ratio and prefill_ratio are tokens/s over those of bfloat16 (higher is better), "
        "weight_bytes_ratio and load_ratio are bytes and seconds over those of bfloat16 (lower is better)."
    )
    add_json(parser)


def _generate(args: argparse.Namespace) -> int:
    from grace.runtime.generate import run_generate

    return run_generate(args)


def _bench(args: argparse.Namespace) -> int:
    from grace.runtime.bench import run_bench

    return run_bench(args)
