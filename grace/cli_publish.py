"""`grace quantize` and `grace push`: a model at few bits without training, and an export onto the Hub."""

import argparse
from pathlib import Path

from grace.arguments import add, add_json, byte_size
from grace.errors import Parser

# Copies of grace.export.pack.FORMATS and of grace.export.quantize: importing those costs seconds. A test
# keeps them equal.
FORMATS = ("awq", "compressed-tensors", "gguf", "mlx", "qat")
METHODS = ("rtn", "awq", "gptq")
SCALES = ("mse", "absmax")
GROUP_SIZES = (32, 64, 128)


def add_quantize(commands: "argparse._SubParsersAction[Parser]") -> None:
    summary = (
        "Round a full-precision model to few bits without training: the baseline, and where training starts."
    )
    parser = add(commands, "quantize", summary, _quantize, "export")
    parser.add_argument("model", metavar="MODEL", type=Path, help="a Qwen3-VL directory in full precision")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the new directory")
    parser.add_argument(
        "--bits", type=int, choices=range(2, 9), default=4, metavar="N", help="2 to 8; default: %(default)s"
    )
    parser.add_argument(
        "--group-size", type=int, choices=GROUP_SIZES, default=128,
        help="inputs to a scale; default: %(default)s",
    )  # fmt: skip
    parser.add_argument(
        "--method", choices=METHODS, default="rtn",
        help="rtn (round to nearest) is the only one here; export/llm_compressor.py does the others",
    )  # fmt: skip
    parser.add_argument(
        "--scales", choices=SCALES, default="mse",
        help="of each group: least squared error among 20, or largest weight; default: %(default)s",
    )  # fmt: skip
    parser.add_argument(
        "--format", action="append", choices=FORMATS,
        help="default: awq at 4 bits, compressed-tensors at 8, else qat; several make sub-directories",
    )  # fmt: skip
    parser.add_argument(
        "--parity-data", type=Path, metavar="FILE",
        help="records to compare logits and answers on as well; loads the model whole",
    )  # fmt: skip
    parser.add_argument(
        "--max-shard-size",
        type=byte_size,
        metavar="SIZE",
        help="cut the weights, e.g. 2GB; default: one file",
    )
    add_card(parser)
    add_json(parser)


def add_card(parser: Parser) -> None:
    """What goes into the model card: of `grace export` and `grace quantize`."""
    parser.add_argument(
        "--base-model", metavar="OWNER/NAME", help="what the model is called on the Hub, for the model card"
    )
    parser.add_argument(
        "--results", type=Path, metavar="FILE", help="scores for the model card, as `grace eval` writes them"
    )


def add_push(commands: "argparse._SubParsersAction[Parser]") -> None:
    summary = "Put an export that passed its parity gate onto the Hugging Face Hub, in one commit."
    parser = add(commands, "push", summary, _push)
    parser.add_argument("directory", metavar="DIR", type=Path, help="what `grace export` wrote")
    parser.add_argument("repo", metavar="REPO", help="OWNER/NAME; made if it is not there")
    parser.add_argument(
        "--dry-run", action="store_true", help="check and list the files; no network, no token"
    )
    parser.add_argument("--public", action="store_true", help="let everybody see it; default: private")
    parser.add_argument("--message", metavar="TEXT", help="title of the commit")
    parser.add_argument("--revision", metavar="BRANCH", help="made if it is not there; default: main")
    add_json(parser)


def _quantize(args: argparse.Namespace) -> int:
    from grace.export.quantize import run_quantize

    return run_quantize(args)


def _push(args: argparse.Namespace) -> int:
    from grace.export.push import run_push

    return run_push(args)
