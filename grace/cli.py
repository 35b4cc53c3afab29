"""The `grace` command. Every import of an implementation waits until its sub-command runs.

grace demo | study | data ... | train | report | teacher-cache | quantize | export | push | generate | serve | eval | bench | inspect
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from grace import __version__
from grace.arguments import add as _add
from grace.arguments import add_json as _add_json
from grace.arguments import add_teacher_cache, add_train, byte_size, integer
from grace.cli_data import add_data
from grace.cli_eval import add_eval
from grace.cli_publish import FORMATS, add_card, add_push, add_quantize
from grace.cli_runtime import add_bench, add_generate
from grace.cli_serve import add_serve
from grace.errors import Parser, UserError, run_command

# A copy of grace.runtime.int4_linear.KERNELS: importing that costs seconds. A test keeps them equal.
KERNELS = ("auto", "triton", "native", "aten", "dequant", "reference", "gptqmodel")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one sub-command; returns the process exit code (DESIGN section 8)."""
    parser = build_parser()
    args = parser.parse_args(argv)
    return run_command(lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    try:
        return args.run_command(args)
    except ModuleNotFoundError as error:
        if not args.extra or not error.name or error.name.split(".")[0] == "grace":
            raise
        raise UserError(f"{error.name} is not installed: pip install 'grace[{args.extra}]'") from error


# ---------------------------------------------------------------- arguments


def build_parser() -> Parser:
    """The parser of `grace` and all its sub-commands."""
    parser = Parser(prog="grace", description="Small vision-language models trained and served at 4 bits.")
    parser.add_argument("--version", action="version", version=f"grace {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for add in (
        _add_demo,
        _add_study,
        add_data,
        _add_train,
        _add_report,
        _add_teacher_cache,
        add_quantize,
        _add_export,
        add_push,
        lambda commands: add_generate(commands, KERNELS),
        lambda commands: add_eval(commands, KERNELS),
        _add_inspect,
    ):
        add(commands)
    add_serve(commands, KERNELS)
    add_bench(commands, KERNELS)
    return parser


def _add_demo(commands: "argparse._SubParsersAction[Parser]") -> None:
    parser = _add(
        commands, "demo", "Train, export and generate on the small world, with a report.", _demo, "demo"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/demo"), metavar="DIR", help="default: %(default)s"
    )
    parser.add_argument(
        "--quick", action="store_true", help="fewer runs and steps: shows the way, not the numbers"
    )
    parser.add_argument("--from-scratch", action="store_true", help="train teacher and student here as well")
    parser.add_argument("--seed", type=integer(0), default=0, help="default: %(default)s")
    _add_json(parser)


def _add_study(commands: "argparse._SubParsersAction[Parser]") -> None:
    parser = _add(commands, "study", "Compare the method's parts over many seeds.", _study, "demo")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/study"), metavar="DIR", help="default: %(default)s"
    )
    parser.add_argument("--quick", action="store_true", help="one table, a few steps: shows the way")
    parser.add_argument(
        "--only", nargs="+", action="extend", default=[], metavar="TABLE", help="fill these tables alone"
    )
    parser.add_argument("--seeds", type=integer(1), metavar="N", help="default: 5, with --quick 2")
    parser.add_argument("--jobs", type=integer(1), default=2, metavar="N", help="default: %(default)s")
    parser.add_argument("--report-only", action="store_true", help="run nothing, report what is there")
    parser.add_argument(
        "--publish", type=Path, metavar="DIR", help="also write into recipes/RESULTS.md of a checkout"
    )
    _add_json(parser)


def _add_train(commands: "argparse._SubParsersAction[Parser]") -> None:
    summary = "Train a student by a recipe (several devices: accelerate launch -m grace.train)."
    add_train(_add(commands, "train", summary, _train, "train", rest="overrides"))


def _add_report(commands: "argparse._SubParsersAction[Parser]") -> None:
    summary = "Draw a training run, or several against each other, into one HTML page."
    parser = _add(commands, "report", summary, _report, "report")
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="a run directory, finished or not")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="default: report.html, in the run or, for several, here"
    )
    _add_json(parser)


def _add_teacher_cache(commands: "argparse._SubParsersAction[Parser]") -> None:
    summary = "Compute a recipe's teacher once (several devices: accelerate launch -m grace.teacher_cache)."
    add_teacher_cache(_add(commands, "teacher-cache", summary, _teacher_cache, "train", rest="overrides"))


def _add_export(commands: "argparse._SubParsersAction[Parser]") -> None:
    parser = _add(
        commands, "export", "Publish a trained model, codes and scales untouched.", _export, "export"
    )
    parser.add_argument(
        "run", metavar="RUN", type=Path, help="a finished run, an export, or another's quantized checkpoint"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the new directory")
    parser.add_argument(
        "--format", action="append", choices=FORMATS, help="default: awq; several make sub-directories"
    )
    parser.add_argument(
        "--parity-data",
        type=Path,
        metavar="FILE",
        help="records to compare on; default: those of the run, or noise",
    )
    parser.add_argument(
        "--max-shard-size",
        type=byte_size,
        metavar="SIZE",
        help="cut the weights, e.g. 2GB; default: one file",
    )
    add_card(parser)
    _add_json(parser)


def _add_inspect(commands: "argparse._SubParsersAction[Parser]") -> None:
    parser = _add(commands, "inspect", "Show a quantized model layer by layer.", _inspect)
    parser.add_argument("directory", metavar="DIR", type=Path, help="an AWQ or QAT directory")
    _add_json(parser)


# ---------------------------------------------------------------- implementations, imported when used


def _demo(args: argparse.Namespace) -> int:
    from grace.demo.pipeline import run_demo

    return run_demo(args)


def _study(args: argparse.Namespace) -> int:
    from grace.study.run import run_study

    return run_study(args)


def _train(args: argparse.Namespace) -> int:
    from grace.train import main as train

    options = [option for name in args.allow_changed for option in ("--allow-changed", name)]
    return train([args.recipe, *args.overrides, *(["--dry-run"] if args.dry_run else []), *options])


def _report(args: argparse.Namespace) -> int:
    from grace.report.command import run_report

    return run_report(args)


def _teacher_cache(args: argparse.Namespace) -> int:
    from grace.teacher_cache import main as teacher_cache

    options = ["--out", str(args.out), "--records-per-shard", str(args.records_per_shard)]
    return teacher_cache([args.recipe, *args.overrides, *options, *(["--json"] if args.json else [])])


def _export(args: argparse.Namespace) -> int:
    from grace.export.pack import run_export

    args.format = args.format or ["awq"]
    return run_export(args)


def _inspect(args: argparse.Namespace) -> int:
    from grace.runtime.inspect import run_inspect

    return run_inspect(args)


if __name__ == "__main__":
    sys.exit(main())
