"""Arguments of the commands: what `grace` and the modules that launchers start declare alike."""

import argparse
import math
import re
from collections.abc import Callable
from pathlib import Path

from grace.errors import Parser

RECORDS_PER_SHARD = 512  # of a teacher cache


def add(
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


def add_json(parser: Parser) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")


def add_recipe(parser: Parser, help: str = "a YAML recipe") -> None:
    """RECIPE and the fields that override it; the parser's `rest` is "overrides"."""
    parser.add_argument("recipe", metavar="RECIPE", help=help)
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="section.key=value", help="fields to override"
    )


def add_train(parser: Parser) -> None:
    """Of `grace train` and `grace.train`."""
    add_recipe(parser)
    parser.add_argument(
        "--dry-run", action="store_true", help="print the plan and stop; needs no weights or data"
    )
    parser.add_argument(
        "--allow-changed", action="append", default=[], metavar="section.key",
        help="go on with an interrupted run although this field has changed",
    )  # fmt: skip


def add_teacher_cache(parser: Parser) -> None:
    """Of `grace teacher-cache` and `grace.teacher_cache`."""
    add_recipe(parser, "a YAML recipe with a teacher")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="the cache: new, or to go on with"
    )
    parser.add_argument(
        "--records-per-shard", type=integer(1), default=RECORDS_PER_SHARD, metavar="N",
        help="what a kill costs at most; default: %(default)s",
    )  # fmt: skip
    add_json(parser)


def is_utf8(value: str) -> bool:
    """Whether an argument or variable was; Python keeps bytes that were not as halves of surrogate pairs."""
    return value == value.encode(errors="replace").decode()


def text(value: str) -> str:
    """For `type=`: a text, which bytes of another encoding are not."""
    if not is_utf8(value):
        raise argparse.ArgumentTypeError("it is not UTF-8")
    return value


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
    size = float(number) * (1024 if binary else 1000) ** (" KMGT".index(unit.upper()) if unit else 0)
    if not 1 <= size < 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} must be a size above 0: 500MB, 2GB or 2GiB")
    return int(size)


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
