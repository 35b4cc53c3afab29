"""`grace push DIR REPO`: an export onto the Hugging Face Hub, in one commit, private unless told otherwise.

Only a directory that is still what passed its parity gate goes (`grace.export.record`), with a card whose
front matter the Hub can read. A dry run shows what would go, and needs neither network nor token.
"""

import argparse
import json
import re
import stat
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, get_token
from huggingface_hub.errors import (
    HFValidationError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage] - of the HTTP library that this version is built on
)
from huggingface_hub.utils import validate_repo_id

from grace.checked_files import read_text, reading, reason_of
from grace.errors import UserError
from grace.export.record import CARD, files_of, read_record

PIPELINE = "image-text-to-text"
# The relations that the Hub knows between a model and its `base_model`.
RELATIONS = ("adapter", "finetune", "merge", "quantized")
WEIGHT_ENDINGS = (".safetensors", ".gguf", ".bin", ".pt", ".pth", ".ckpt", ".pkl")
# Files of an earlier push that a loader would take for a part of this one.
_STALE = re.compile(r"(.*/)?[^/]+\.(safetensors|gguf|safetensors\.index\.json)|grace_export\.json")


@dataclass(frozen=True)
class Upload:
    """What goes to the Hub: a checked export, and its files by their names there."""

    directory: Path
    record: dict[str, Any]
    files: dict[str, Path]

    @property
    def sizes(self) -> dict[str, int]:
        return {name: path.stat().st_size for name, path in self.files.items()}


def run_push(args: argparse.Namespace) -> int:
    """Entry point of `grace push`."""
    require_repo_id(args.repo)
    upload = open_upload(args.directory)
    message = args.message or default_message(upload)
    _show(upload, args.repo, args.revision, args.public, args.dry_run)
    report: dict[str, Any] = {
        "repo": args.repo, "revision": args.revision, "private": not args.public, "message": message,
        "files": upload.sizes, "dry_run": args.dry_run, "url": None, "commit": None,
    }  # fmt: skip
    if not args.dry_run:
        report |= push(upload, args.repo, args.revision, args.public, message)
        print(f"pushed: {report['url']}", file=sys.stderr)
    if args.json:
        print(json.dumps(report))
    return 0


# ---------------------------------------------------------------- what goes


def require_repo_id(repo: str) -> None:
    """Raises `UserError` unless the Hub could have a repository of this name."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"{repo!r} is no repository: give OWNER/NAME ({reason_of(error)})") from error
    if repo.count("/") != 1:
        raise UserError(f"{repo!r} is no repository: give OWNER/NAME")


def open_upload(directory: Path) -> Upload:
    """Checks a directory as a whole; reads every byte of its weights.

    Raises:
        UserError: no passed parity gate, a card that the Hub would refuse, or files that should not go.
    """
    with reading(directory):
        return _opened(directory)


def _opened(directory: Path) -> Upload:
    record = read_record(directory)
    files = {name: path for name, path in files_of(directory).items() if not _hidden(name)}
    for name, path in files.items():
        if not stat.S_ISREG(path.lstat().st_mode):
            raise UserError(f"{path} is a link or no file at all: remove it before pushing")
        if name.endswith(WEIGHT_ENDINGS) and name not in record["files"]:
            raise UserError(f"{path} came after the parity gate: remove it, or export again")
    require_card(directory / CARD)
    return Upload(directory, record, files)


def require_card(path: Path) -> None:
    """Raises `UserError` unless the card's front matter says what the Hub needs to know, in its own terms."""
    try:
        text = read_text(path)
        if not text.lstrip().startswith("---"):  # which the library would tell in a line of its own
            raise ValueError("it has no front matter")
        data = ModelCard(text).data.to_dict()
    except (OSError, ValueError, TypeError, AttributeError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{path} is no model card ({reason_of(error)}): export again") from error
    faults = [f"{field} is missing" for field in ("license", "library_name", "tags") if not data.get(field)]
    if data.get("pipeline_tag") != PIPELINE:
        faults.append(f"pipeline_tag is not {PIPELINE}")
    tags = data.get("tags") or []
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        faults.append("tags is not a list of words")
    bases = data.get("base_model") or []
    for base in bases if isinstance(bases, list) else [bases]:
        try:
            validate_repo_id(base)
        except HFValidationError:
            faults.append(f"base_model {base!r} is no repository of the Hub")
    if data.get("base_model_relation", "quantized") not in RELATIONS:
        faults.append(f"base_model_relation is none of {', '.join(RELATIONS)}")
    if faults:
        raise UserError(f"the front matter of {path} is not valid ({'; '.join(faults)}): mend it")


def default_message(upload: Upload) -> str:
    """The commit's title."""
    record = upload.record
    return f"GRACE W{record['bits']}G{record['group_size']}, {record['format']}"


# ---------------------------------------------------------------- the Hub


def push(upload: Upload, repo: str, revision: str | None, public: bool, message: str) -> dict[str, Any]:
    """Makes the repository if need be and commits all files at once: the Hub shows all of them or none.

    Returns:
        `{"url", "commit"}`.

    Raises:
        UserError: no token, no network, a repository that is public without `public`, or the Hub refuses.
    """
    token = get_token()
    if not token:
        raise UserError("no token for the Hub: set HF_TOKEN, or log in with `hf auth login`")
    api = HfApi(token=token)
    try:
        api.create_repo(repo, private=not public, exist_ok=True)
        if not api.model_info(repo).private and not public:
            raise UserError(
                f"{repo} exists and is public: pass --public to push there, or choose another REPO"
            )
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        there = {file.rfilename for file in api.model_info(repo, revision=revision).siblings or []}
        stale = sorted(name for name in there - set(upload.files) if _STALE.fullmatch(name))
        operations = [
            *(CommitOperationAdd(name, str(path)) for name, path in upload.files.items()),
            *(CommitOperationDelete(name) for name in stale),
        ]
        done = api.create_commit(repo, operations, commit_message=message, revision=revision)
    except (OSError, ValueError, RuntimeError, HTTPError) as error:  # a refused card is a ValueError
        raise UserError(f"nothing was pushed to {repo}: {reason_of(error)}") from error
    return {"url": str(done.commit_url), "commit": done.oid}


# ---------------------------------------------------------------- words


def _show(upload: Upload, repo: str, revision: str | None, public: bool, dry_run: bool) -> None:
    sizes = upload.sizes
    for name, size in sizes.items():
        print(f"{size:>16,}  {name}", file=sys.stderr)
    verb = "would go" if dry_run else "go"
    print(
        f"{len(sizes)} files, {sum(sizes.values()) / 1e6:,.1f} MB {verb} to {repo}, "
        f"{revision or 'main'}, {'public' if public else 'private'}",
        file=sys.stderr,
    )


def _hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))
