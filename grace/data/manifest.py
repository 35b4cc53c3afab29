"""Manifests: YAML files that say what a data set consists of and where each part is had."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import yaml

from grace.data.audit_text import table
from grace.errors import UserError

_SHA256_DIGITS = 64


@dataclass(frozen=True)
class Download:
    """One file on a server. `into` is the folder that an archive unpacks to; None leaves the file as it is."""

    url: str
    file: str
    into: str | None = None
    bytes: int | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class Item:
    """An annotation file or a folder of pictures, at `path` below the data directory."""

    name: str
    path: str
    about: str
    downloads: tuple[Download, ...]
    by_hand: str | None
    gaps: str | None
    records: int | None  # of an annotation file
    files: int | None  # of a folder

    def as_dict(self) -> dict[str, Any]:
        """As JSON-able values."""
        return asdict(self)


def load_manifest(path: str | Path) -> list[Item]:
    """Reads a manifest: a file on disk, or else the packaged one of that name.

    Raises:
        UserError: absent, not YAML, or an item that is not as data/README.md describes it.
    """
    file = _find(Path(path))
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{file} is not a readable YAML file ({error}): give a manifest") from error
    if not isinstance(values, dict):
        raise UserError(f"{file} is not a manifest: it needs annotations and images")
    items: list[Item] = []
    for key, place in (("annotations", "file"), ("images", "folder")):
        entries = values.get(key) or []
        if not isinstance(entries, list):
            raise UserError(f"{file}: {key} must be a list of items")
        items += [_item(entry, place, f"{file}: {key}[{i}]") for i, entry in enumerate(entries)]
    names = [item.name for item in items]
    if doubled := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"{file} has two items named {doubled}: rename one")
    if not items:
        raise UserError(f"{file} lists nothing: it needs annotations or images")
    return items


def published_as(file: str, manifest: str | Path = "sharegpt4v.yaml") -> dict[str, str]:
    """Name, licence and repository of the data set that publishes an annotation file of this name; else empty.

    Raises:
        UserError: as `load_manifest`.
    """
    if PurePosixPath(file).name not in {item.path for item in load_manifest(manifest)}:
        return {}
    values = yaml.safe_load(_find(Path(manifest)).read_text(encoding="utf-8"))
    return {key: str(values[key]) for key in ("name", "licence", "repository") if values.get(key)}


def chosen_items(items: Sequence[Item], names: Sequence[str] | None) -> list[Item]:
    """The items of these names, in the manifest's order; all without names.

    Raises:
        UserError: a name that no item has.
    """
    known = [item.name for item in items]
    for name in names or ():
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"it lists {', '.join(known)}"
            raise UserError(f"--only {name}: the manifest has no such item, {hint}")
    return [item for item in items if names is None or item.name in names]


def format_items(items: Sequence[Item]) -> str:
    """A table of the items."""
    rows: list[tuple[Any, ...]] = [("name", "how", "records or files", "path", "about")]
    for item in items:
        how = "download" if item.downloads else "by hand"
        rows.append((item.name, how, item.records or item.files or "", item.path, item.about))
    notes = [f"{item.name}: {text}" for item in items for text in (item.gaps, item.by_hand) if text]
    return "\n\n".join([table(rows), *notes])


def _find(path: Path) -> Path:
    package = Path(__file__).parents[1]
    for file in (path, package / "manifests" / path.name, package.parent / "data" / path.name):
        if file.is_file():
            return file
    raise UserError(f"there is no manifest {path}: give the path of a file, or the name of a packaged one")


def _item(entry: Any, place: str, where: str) -> Item:
    if not isinstance(entry, dict):
        raise UserError(f"{where} must hold keys and values")
    texts = {key: _text(entry, key, where) for key in ("name", place, "about", "by_hand", "gaps")}
    name, path = texts["name"], texts[place]
    if not name or not path:
        raise UserError(f"{where} needs a name and a {place}")
    downloads = entry.get("downloads") or []
    if not isinstance(downloads, list):
        raise UserError(f"{where}: downloads must be a list")
    return Item(
        name=name,
        path=_inside(path, where),
        about=texts["about"] or "",
        downloads=tuple(_download(one, path if place == "file" else None, where) for one in downloads),
        by_hand=texts["by_hand"],
        gaps=texts["gaps"],
        records=_count(entry, "records", where),
        files=_count(entry, "files", where),
    )


def _download(entry: Any, target: str | None, where: str) -> Download:
    """`target` is the path of the file itself; None is an archive, named after its URL."""
    if not isinstance(entry, dict):
        raise UserError(f"{where}: a download must hold keys and values")
    url = _text(entry, "url", where) or ""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise UserError(f"{where}: url is {url!r}, which is not an http or https address")
    into, sha256 = _text(entry, "into", where), _text(entry, "sha256", where)
    if target is None and into is None:
        raise UserError(f"{where}: a download of images needs `into`, the folder it unpacks to")
    if sha256 is not None and (len(sha256) != _SHA256_DIGITS or set(sha256) - set("0123456789abcdef")):
        raise UserError(f"{where}: sha256 must be {_SHA256_DIGITS} hexadecimal digits")
    file = target or PurePosixPath(parts.path).name
    if not file:
        raise UserError(f"{where}: url {url} names no file")
    return Download(
        url, _inside(file, where), into and _inside(into, where), _count(entry, "bytes", where), sha256
    )


def _inside(path: str, where: str) -> str:
    """A path that stays in the data directory."""
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts:
        raise UserError(f"{where}: {path} leads out of the data directory")
    return str(pure)


def _text(entry: Mapping[str, Any], key: str, where: str) -> str | None:
    value = entry.get(key)
    if value is not None and (not isinstance(value, str) or not value.strip()):
        raise UserError(f"{where}: {key} must be text")
    return value


def _count(entry: Mapping[str, Any], key: str, where: str) -> int | None:
    value = entry.get(key)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
        raise UserError(f"{where}: {key} must be a whole number")
    return value
