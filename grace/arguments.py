"""Building blocks of the `grace` command's argument parsers."""

import argparse
import math
import re
from collections.abc import Callable

from grace.errors import Parser


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
