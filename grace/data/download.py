"""The items of a manifest brought to a data directory: fetched, checked, unpacked, counted."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from grace.data.fetch import fetch
from grace.data.manifest import Download, Item
from grace.data.unpack import unpack
from grace.errors import UserError
from grace.files import write_text

_ARCHIVES = ".archives"  # in the data directory: archives, and what was made of them

Advance = Callable[[str, int, int | None], None]


def download(
    items: Sequence[Item],
    out: Path,
    keep_archives: bool = False,
    advance: Advance = lambda name, done, total: None,
    say: Callable[[str], None] = lambda line: None,
    pause: float = 1.0,
) -> list[dict[str, Any]]:
    """Fetches the items, one after the other; what is there already stays.

    Args:
        advance: called with a file's name, the bytes so far and, where known, their total.
        say: called with lines for people.
        pause: seconds before a second attempt (see `fetch`).

    Returns:
        For each item its name, path and status: "fetched", "there" or "by hand".

    Raises:
        UserError: after all items were tried, if one could not be had or none can be fetched.
    """
    if not any(item.downloads for item in items):
        raise UserError(f"nothing to fetch; by hand: {items[0].by_hand}")
    report: list[dict[str, Any]] = []
    failures: list[str] = []
    for item in items:
        if not item.downloads:
            say(f"{item.name}: by hand, into {out / item.path}: {item.by_hand}")
            report.append({"name": item.name, "path": str(out / item.path), "status": "by hand"})
            continue
        try:
            new = [_bring(item, one, out, keep_archives, advance, pause) for one in item.downloads]
        except UserError as error:
            failures.append(f"{item.name}: {error}")
            continue
        status = "fetched" if any(new) else "there"
        say(f"{item.name}: {status}, {out / item.path}{_counted(item, out)}")
        if item.gaps:
            say(f"{item.name}: known gaps: {item.gaps}")
        report.append({"name": item.name, "path": str(out / item.path), "status": status})
    if failures:
        also = f" ({len(failures) - 1} more failed)" if len(failures) > 1 else ""
        raise UserError(f"{failures[0]}{also}")
    return report


def _bring(item: Item, one: Download, out: Path, keep: bool, advance: Advance, pause: float) -> bool:
    """Fetches one file and unpacks it, if it is an archive; False if that was done before."""

    def on(done: int, total: int | None) -> None:
        advance(Path(one.file).name, done, total)

    if one.into is None:
        return fetch(one, out / one.file, on, pause)
    archive = out / _ARCHIVES / f"{item.name}-{Path(one.file).name}"
    done = archive.with_name(f"{archive.name}.unpacked")
    what = json.dumps({"url": one.url, "sha256": one.sha256, "into": one.into})
    if done.is_file() and done.read_text() == what:
        return False
    fetch(one, archive, on, pause)
    unpack(archive, out / one.into, lambda files: advance(f"{Path(one.file).name} (files)", files, None))
    try:
        write_text(done, what)
        if not keep:
            archive.unlink()
    except OSError as error:
        raise UserError(f"cannot write to {archive.parent} ({error.strerror})") from error
    return True


def _counted(item: Item, out: Path) -> str:
    """How many files are there, where the manifest says how many to expect."""
    if item.files is None:
        return ""
    found = sum(len(names) for _, _, names in os.walk(out / item.path))
    return f", {found:,} of {item.files:,} files" + ("" if found >= item.files else ": some are missing")
