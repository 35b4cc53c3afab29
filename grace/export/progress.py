"""How far a long write has come: a bar on a terminal, a line now and then elsewhere."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

_SECONDS_BETWEEN_LINES = 5.0


@contextlib.contextmanager
def progress(label: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    """Yields what to call with the bytes of each piece written. Shows on stderr.

    Work that takes less than a few seconds shows nothing where there is no terminal.
    """
    if not sys.stderr.isatty():
        yield _lines(label, total_bytes)
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=total_bytes)
        yield lambda count: bar.advance(task, count)


def _lines(label: str, total_bytes: int) -> Callable[[int], None]:
    written, shown_at = 0, time.monotonic()

    def advance(count: int) -> None:
        nonlocal written, shown_at
        written += count
        now = time.monotonic()
        if now - shown_at >= _SECONDS_BETWEEN_LINES:
            shown_at = now
            print(f"{label}: {written / 1e9:.1f} of {total_bytes / 1e9:.1f} GB", file=sys.stderr, flush=True)

    return advance
