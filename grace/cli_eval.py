"""Arguments of `grace eval`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from grace.arguments import add, add_json, integer
from grace.errors import Parser


def add_eval(commands: "argparse._SubParsersAction[Parser]", kernels: Sequence[str]) -> None:
    """`grace eval` and its arguments.

    Args:
        kernels: for packed layers.
    """
    parser = add(commands, "eval", "Score a model on benchmarks, or compare two scored ones.", _eval, "eval")
    parser.add_argument(
        "directory", metavar="DIR", nargs="?", type=Path, help="an exported, trained or plain model"
    )
    parser.add_argument(
        "--tasks", nargs="+", default=[], metavar="TASK",
        help="mmbench seedbench scienceqa hallusionbench ai2d mmmu mmstar small_world",
    )  # fmt: skip
    parser.add_argument(
        "--limit", type=integer(1), metavar="N", help="only the first N questions of each task"
    )
    parser.add_argument(
        "--data", nargs="+", action="extend", default=[], metavar="TASK=PATH",
        help="local data: parquet, jsonl, json, tsv, or a saved dataset; default: the Hub",
    )  # fmt: skip
    parser.add_argument(
        "--data-root", type=Path, metavar="DIR", help="a folder with local data named like the tasks"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="answers and scores; the same command goes on there; default: runs/eval/NAME",
    )
    parser.add_argument("--batch-size", type=integer(1), default=8, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--kernel", choices=kernels, default="auto", help="for packed layers; default: %(default)s"
    )
    parser.add_argument(
        "--predictions", type=Path, metavar="FILE",
        help='score the answers of a JSONL file, {"id": ..., "output": ...} a line, without a model',
    )  # fmt: skip
    parser.add_argument(
        "--compare", nargs=2, type=Path, metavar=("A", "B"), help="two results: is B better than A?"
    )
    for name in ("max-new-tokens", "min-pixels", "max-pixels"):
        parser.add_argument(
            f"--{name}",
            type=integer(1),
            metavar="N",
            help="instead of the task's own; makes it another measurement",
        )
    add_json(parser)


def _eval(args: argparse.Namespace) -> int:
    from grace.evaluation.command import run_eval

    return run_eval(args)
