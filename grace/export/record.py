"""`grace_export.json`: what an export passed before it was published, bound to its files by their SHA-256.

    {"format_version", "grace", "format", "bits", "group_size", "modules", "parity": {figures},
     "files": {name: {"bytes", "sha256"}}, "sha256"}

The last is the digest of all the rest. Whoever changes a weight, a config or a figure afterwards no longer
has a checked export, and `grace push` says so. README.md is not listed: people may add to a card. Nothing in
it depends on the time or the place of the export, and figures are cut to three digits (the others change with
the number of threads), so that a repeated export has the same bytes.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grace import __version__
from grace.checked_files import TOKENIZER_LIMIT, read_text, reason_of, shown
from grace.errors import UserError
from grace.files import sha256_of

RECORD = "grace_export.json"
CARD = "README.md"
RECORD_VERSION = 1
_AGAIN = "export it again with `grace export`"


def write_record(directory: Path, about: Mapping[str, Any]) -> None:
    """Writes the record of a directory that holds everything it will hold.

    Args:
        about: format, bits, group_size, modules and the parity gate's figures.
    """
    files = {
        name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for name, path in files_of(directory).items()
        if name not in (RECORD, CARD)
    }
    record = {"format_version": RECORD_VERSION, "grace": __version__, **_three_digits(about), "files": files}
    record["sha256"] = _digest(record)
    text = json.dumps(record, indent=2, sort_keys=True) + "\n"
    (directory / RECORD).write_text(text, encoding="utf-8")


def read_record(directory: Path) -> dict[str, Any]:
    """The record of an export, checked against every file that it lists.

    Raises:
        UserError: no record, or the directory is no longer what passed the parity gate.
    """
    if not directory.is_dir():
        raise UserError(f"{directory} is not a directory: give what `grace export` wrote")
    if not (directory / RECORD).is_file():
        inside = sorted(path.parent.name for path in directory.glob(f"*/{RECORD}"))
        if inside:
            raise UserError(f"{directory} holds several exports: give one of {', '.join(inside)} in it")
        raise UserError(f"{directory} has no {RECORD}, so no passed parity gate: {_AGAIN}")
    try:
        record = json.loads(read_text(directory / RECORD, TOKENIZER_LIMIT))
        if record["format_version"] != RECORD_VERSION:
            raise ValueError(f"format version {record['format_version']}, not {RECORD_VERSION}")
        claimed = record.pop("sha256")
        if _digest(record) != claimed:
            raise ValueError("it was edited")
        files = {name: (listed["bytes"], listed["sha256"]) for name, listed in record["files"].items()}
        passed = record["parity"].get("codes_identical") is True
        for name, kind in (("format", str), ("bits", int), ("group_size", int)):
            if type(record[name]) is not kind:
                raise ValueError(f"{name} is {shown(record[name])}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{directory / RECORD} is damaged ({reason_of(error)}): {_AGAIN}") from error
    if not passed:
        raise UserError(f"{directory} did not pass the parity gate: {_AGAIN}")
    for name, (size, digest) in files.items():
        path = directory / name
        if not path.is_file() or path.stat().st_size != size or sha256_of(path) != digest:
            raise UserError(f"{path} is not the file that passed the parity gate: {_AGAIN}")
    return record


def files_of(directory: Path) -> dict[str, Path]:
    """Every file below a directory under its relative name, in the order of the names."""
    found = {
        path.relative_to(directory).as_posix(): path for path in directory.rglob("*") if not path.is_dir()
    }
    return dict(sorted(found.items()))


def _three_digits(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _three_digits(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_three_digits(item) for item in value]
    return float(f"{value:.3g}") if isinstance(value, float) else value


def _digest(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
