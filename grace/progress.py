"""How far long work has come, for people."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def progress(what: str, unit: str, scale: float = 1.0) -> Iterator[Callable[[str, int, int | None], None]]:
    """Yields `advance(name, done, total)`: a bar for each name on a terminal, else a line every ten seconds."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[count]}"), TimeRemainingColumn(),
        )  # fmt: skip
        bar: Progress | None = None
        tasks = {}
        with contextlib.ExitStack() as stack:

            def draw(name: str, done: int, total: int | None) -> None:
                nonlocal bar
                if bar is None:  # not before there is something to show
                    bar = stack.enter_context(Progress(*columns, console=Console(stderr=True)))
                if name not in tasks:
                    tasks[name] = bar.add_task(f"{what} {name}", total=total, count="")
                count = _count(done / scale, total and total / scale, unit)
                bar.update(tasks[name], completed=done, total=total, count=count)

            yield draw
        return
    said = time.monotonic()

    def say(name: str, done: int, total: int | None) -> None:
        nonlocal said
        if time.monotonic() - said >= 10:
            said = time.monotonic()
            count = _count(done / scale, total and total / scale, unit)
            print(f"{what} {name}: {count}", file=sys.stderr)

    yield say


def _count(done: float, total: float | None, unit: str) -> str:
    of = f" of {total:,.0f}" if total else ""
    return f"{done:,.0f}{of} {unit}"
