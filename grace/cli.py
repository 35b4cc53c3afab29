"""The `grace` command. Every import of an implementation waits until its sub-command runs.

grace demo | data small-world | train | teacher-cache | export | generate | inspect
"""

import argparse
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from grace import __version__
from grace.errors import Parser, UserError, run_command

# Copies of grace.runtime.int4_linear.KERNELS and grace.export.pack.FORMATS: importing those costs
# seconds. A test keeps them equal.
KERNELS = ("auto", "aten", "dequant", "reference")
FORMATS = ("awq", "compressed-tensors", "gguf", "mlx", "qat")


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
        _add_data,
        _add_train,
        _add_teacher_cache,
        _add_export,
        _add_generate,
        _add_inspect,
    ):
        add(commands)
    return parser


def _add(
    commands: "argparse._SubParsersAction[Parser]",
    name: str,
    summary: str,
    run: Callable[[argparse.Namespace], int],
    extra: str | None = None,
    rest: str | None = None,
) -> Parser:
    """A sub-command; `extra` is the optional dependency group that it needs."""
    parser = commands.add_parser(name, help=summary, description=summary, rest=rest)
    parser.set_defaults(run_command=run, extra=extra)
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


def _add_data(commands: "argparse._SubParsersAction[Parser]") -> None:
    group = commands.add_parser("data", help="Prepare data.", description="Prepare data.")
    parser = _add(
        group.add_subparsers(metavar="COMMAND", required=True),
        "small-world",
        "Draw the small world's pictures and records.",
        _small_world,
        "demo",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the new directory")
    parser.add_argument("--seed", type=integer(0), default=0, help="default: %(default)s")
    parser.add_argument(
        "--splits", type=split_sizes, metavar="NAME=SIZE,...", help="default: every split at full size"
    )


def _add_train(commands: "argparse._SubParsersAction[Parser]") -> None:
    summary = "Train a student by a recipe (several devices: accelerate launch -m grace.train)."
    parser = _add(commands, "train", summary, _train, "train", rest="overrides")
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML recipe")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="section.key=value", help="fields to override"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the plan and stop; needs no weights or data"
    )


def _add_teacher_cache(commands: "argparse._SubParsersAction[Parser]") -> None:
    summary = "Compute a recipe's teacher once (several devices: accelerate launch -m grace.teacher_cache)."
    parser = _add(commands, "teacher-cache", summary, _teacher_cache, "train", rest="overrides")
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML recipe with a teacher")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="section.key=value", help="fields to override"
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="the cache: new, or to go on with"
    )
    _add_json(parser)


def _add_export(commands: "argparse._SubParsersAction[Parser]") -> None:
    parser = _add(
        commands, "export", "Publish a trained model, codes and scales untouched.", _export, "export"
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="a finished run directory, or its model/")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the new directory")
    parser.add_argument(
        "--format", action="append", choices=FORMATS, help="default: awq; several make sub-directories"
    )
    parser.add_argument(
        "--parity-data", type=Path, metavar="FILE", help="records to compare on; default: those of the run"
    )
    parser.add_argument(
        "--max-shard-size",
        type=byte_size,
        metavar="SIZE",
        help="cut the weights, e.g. 2GB; default: one file",
    )
    _add_json(parser)


def _add_generate(commands: "argparse._SubParsersAction[Parser]") -> None:
    parser = _add(commands, "generate", "Answer a prompt about pictures.", _generate)
    parser.add_argument("directory", metavar="DIR", type=Path, help="an exported model or a run's model/")
    parser.add_argument(
        "--image", nargs="+", action="extend", default=[], metavar="FILE", help="pictures, in order"
    )
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="may place each picture with <image>")
    parser.add_argument(
        "--max-new-tokens", type=integer(1), default=128, metavar="N", help="default: %(default)s"
    )
    parser.add_argument(
        "--temperature",
        type=number(0),
        default=0.0,
        metavar="T",
        help="default: 0, always the likeliest token",
    )
    parser.add_argument(
        "--top-p", type=number(0, 1, open_low=True), default=1.0, metavar="P", help="default: 1"
    )
    parser.add_argument("--seed", type=integer(0), help="makes sampling repeatable")
    parser.add_argument(
        "--kernel", choices=KERNELS, default="auto", help="for packed layers; default: %(default)s"
    )
    _add_json(parser)


def _add_inspect(commands: "argparse._SubParsersAction[Parser]") -> None:
    parser = _add(commands, "inspect", "Show a quantized model layer by layer.", _inspect)
    parser.add_argument("directory", metavar="DIR", type=Path, help="an AWQ or QAT directory")
    _add_json(parser)


def _add_json(parser: Parser) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")


def integer(low: int) -> Callable[[str], int]:
    """An argument type: a whole number, at least `low`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if value < low:
            raise argparse.ArgumentTypeError(f"{text!r} must be a whole number, at least {low}")
        return value

    return parse


def number(low: float, high: float = math.inf, open_low: bool = False) -> Callable[[str], float]:
    """An argument type: a finite number in [low, high], or above `low` with `open_low`."""
    span = f"{'above' if open_low else 'at least'} {low:g}" + (
        f" and at most {high:g}" if high < math.inf else ""
    )

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and low <= value <= high and not (open_low and value == low)):
            raise argparse.ArgumentTypeError(f"{text!r} must be a number {span}")
        return value

    return parse


def byte_size(text: str) -> int:
    """An argument type: bytes, as the Hub writes them (`500MB` and `2GB` are decimal, `2GiB` is binary)."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(?:([KMGT])(i?)B?|B)?", text.strip(), re.IGNORECASE)
    number, unit, binary = found.groups() if found else ("0", None, None)
    size = int(float(number) * (1024 if binary else 1000) ** (" KMGT".index(unit.upper()) if unit else 0))
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a size above 0: 500MB, 2GB or 2GiB")
    return size


def split_sizes(text: str) -> dict[str, int]:
    """An argument type: `name=size,name=size`."""
    sizes = {}
    for item in text.split(","):
        name, _, size = item.strip().partition("=")
        if not name or not size.isdecimal() or name in sizes:
            raise argparse.ArgumentTypeError(
                f"{item!r} must be NAME=SIZE, each name once: qat_train=32,test=14"
            )
        sizes[name] = int(size)
    return sizes


# ---------------------------------------------------------------- implementations, imported when used


def _demo(args: argparse.Namespace) -> int:
    from grace.demo.pipeline import run_demo

    return run_demo(args)


def _small_world(args: argparse.Namespace) -> int:
    from grace.data.small_world import write_small_world

    print(f"wrote {write_small_world(args.out, args.seed, args.splits)}", file=sys.stderr)
    return 0


def _train(args: argparse.Namespace) -> int:
    from grace.train import main as train

    return train([args.recipe, *args.overrides, *(["--dry-run"] if args.dry_run else [])])


def _teacher_cache(args: argparse.Namespace) -> int:
    from grace.teacher_cache import main as teacher_cache

    json = ["--json"] if args.json else []
    return teacher_cache([args.recipe, *args.overrides, "--out", str(args.out), *json])


def _export(args: argparse.Namespace) -> int:
    from grace.export.pack import run_export

    args.format = args.format or ["awq"]
    return run_export(args)


def _generate(args: argparse.Namespace) -> int:
    from grace.runtime.generate import run_generate

    return run_generate(args)


def _inspect(args: argparse.Namespace) -> int:
    from grace.runtime.inspect import run_inspect

    return run_inspect(args)


if __name__ == "__main__":
    sys.exit(main())
