"""The audit's result on disk: the list of faults, and a summary that says what it was made from.

    X.audit.jsonl            one fault a line: id, index, class, detail, file, source
    X.audit.summary.json     counts, and fingerprints of the annotations, the settings and the list

Training reads both to know which records to leave out without opening a picture, and refuses them when
the fingerprints are those of something else.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grace.data.audit import FileAudit
from grace.data.faults import CLASSES, Policies
from grace.errors import UserError
from grace.files import sha256_of, write_text

FORMAT = 2  # of both files; another number is another audit


def list_path(files: str | Path | Sequence[str], given: str | Path | None = None) -> Path:
    """Where the list lies: the path given (in it, if that is a directory), else beside the (first) annotations."""
    first, *others = [files] if isinstance(files, str | Path) else files
    name = f"{Path(first).stem}{f'+{len(others)}' if others else ''}.audit.jsonl"
    if given is None:
        return Path(first).with_name(name)
    given_path = Path(given)
    is_folder = os.path.isdir(given_path) or str(given).endswith("/")
    return given_path / name if is_folder else given_path


def summary_path(list_file: Path) -> Path:
    """The summary that belongs to a list."""
    return list_file.with_name(f"{list_file.name.removesuffix('.jsonl')}.summary.json")


def require_writable(list_file: Path, data_files: Sequence[str]) -> None:
    """Checks, before the work is done, that its result can be written and would overwrite an audit at most.

    Raises:
        UserError: the place holds something else, or cannot be written to.
    """
    ours = (list_file, summary_path(list_file))
    if any(os.path.realpath(one) == os.path.realpath(path) for one in ours for path in data_files):
        raise UserError(f"{list_file} would overwrite the annotations: choose another --out")
    if os.path.lexists(list_file) and not (list_file.is_file() and summary_path(list_file).is_file()):
        raise UserError(f"{list_file} is there and is no audit's: choose another --out or remove it")
    folder = next(path for path in list_file.absolute().parents if os.path.lexists(path))
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"cannot write to {folder}: give --out, and set data.audit to the same")


def file_print(path: str | Path, image_root: str | Path | None) -> dict[str, str]:
    """What the faults of an annotation file follow from, as far as it can be told without its pictures."""
    path = Path(path)
    root = path.parent if image_root is None else Path(image_root)
    try:
        return {"sha256": sha256_of(path), "image_root": str(root.resolve())}
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): set data.path") from error


def length_print(processor: Any, max_length: int) -> str:
    """What lengths and the limit on them follow from."""
    images = processor.image_processor
    parts = [
        processor.tokenizer.backend_tokenizer.to_str(),
        {key: images.size[key] for key in ("shortest_edge", "longest_edge")},
        [images.patch_size, images.merge_size, max_length],
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def write_list(
    path: Path,
    audits: Sequence[FileAudit],
    image_root: str | Path | None,
    lengths: str,
    report: Mapping[str, Any],
) -> None:
    """Writes list and summary, each in one step.

    Raises:
        UserError: the folder cannot be written to.
    """
    lines = [
        json.dumps(
            {"id": f.id, "index": f.index, "class": f.kind, "detail": f.detail,
             "file": str(audit.path), "source": f.source}
        )
        for audit in audits
        for f in audit.findings
    ]  # fmt: skip
    text = "".join(f"{line}\n" for line in lines)
    files = [
        {"path": str(audit.path), "records": len(audit.sources), **file_print(audit.path, image_root)}
        for audit in audits
    ]
    summary = {
        "format": FORMAT,
        "files": files,
        "lengths": lengths,
        "list_sha256": hashlib.sha256(text.encode()).hexdigest(),
        **report,
    }
    try:
        # In this order a kill in between leaves a summary whose checksum no list has.
        write_text(summary_path(path), json.dumps(summary, indent=1) + "\n")
        write_text(path, text)
    except OSError as error:
        raise UserError(
            f"cannot write {path} ({error.strerror}): give --out, and set data.audit to the same"
        ) from error


@dataclass(frozen=True)
class AuditList:
    """A list that was read back: the classes of fault of each record, by file."""

    path: Path
    summary: Mapping[str, Any]
    kinds: Mapping[str, Mapping[int, Sequence[str]]]

    def left_out(
        self, data_path: str | Path, image_root: str | Path | None, lengths: str | None, policies: Policies
    ) -> dict[int, str]:
        """Index of each record of a file that the policies leave out -> the class that decides it.

        Args:
            lengths: what `length_print` gives today; None leaves it unchecked.

        Raises:
            UserError: the list was made from other annotations, another folder or other settings.
        """
        today = file_print(data_path, image_root)
        known = [file for file in self.summary["files"] if file["sha256"] == today["sha256"]]
        again = "run `grace data audit` again"
        if not known:
            raise UserError(f"{self.path} is not of {data_path} as it is now: {again}")
        if not any(file["image_root"] == today["image_root"] for file in known):
            raise UserError(
                f"{self.path} is of pictures in {known[0]['image_root']}, not {today['image_root']}: {again}"
            )
        if "over_long" in policies.skip and lengths is not None and lengths != self.summary["lengths"]:
            raise UserError(
                f"{self.path} counted tokens with another tokenizer, pixel budget or data.max_length: {again}"
            )
        chosen: dict[int, str] = {}
        for file in known:
            for index, kinds in self.kinds.get(file["path"], {}).items():
                if (kind := next((k for k in kinds if policies.of(k) == "skip"), None)) is not None:
                    chosen[index] = kind
        return chosen


def read_list(path: Path) -> AuditList:
    """Reads a list and its summary.

    Raises:
        UserError: absent, damaged, or of another version.
    """
    again = "run `grace data audit` with the same recipe"
    try:
        summary = json.loads(summary_path(path).read_text(encoding="utf-8"))
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UserError(f"there is no audit at {path}, which data.skip needs: {again} first") from error
    except (OSError, ValueError) as error:
        raise UserError(f"the audit at {path} cannot be read ({error}): {again}") from error
    if not isinstance(summary, dict) or summary.get("format") != FORMAT:
        raise UserError(f"{summary_path(path)} is not of this version: {again}")
    if summary.get("list_sha256") != hashlib.sha256(text.encode()).hexdigest():
        raise UserError(f"{path} is not the list that its summary is of: {again}")
    kinds: dict[str, dict[int, list[str]]] = {}
    for line in text.splitlines():
        fault = json.loads(line)
        if fault["class"] in CLASSES:
            kinds.setdefault(fault["file"], {}).setdefault(fault["index"], []).append(fault["class"])
    return AuditList(path, summary, kinds)
