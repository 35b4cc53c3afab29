"""An entry of a ShareGPT4V file as a record, with everything that is wrong with it."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from grace.data.faults import CLASSES, Fault
from grace.data.text_check import text_faults

IMAGE_MARK = "<image>"
NO_VIDEO = (
    ' has a "video": training reads pictures alone, since Qwen3-VL\'s processor is loaded without its video part, which '
    "needs torchvision and a video decoder; leave such records out with data.skip=[video]"
)
Role = Literal["user", "assistant", "system"]
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|data:[a-z]+/", re.ASCII)
_ROLES: dict[str, Role] = {"human": "user", "gpt": "assistant", "system": "system"}


@dataclass(frozen=True)
class Turn:
    """One utterance. `text` keeps its `<image>` marks; they count in user turns only."""

    role: Role
    text: str


@dataclass(frozen=True)
class Record:
    """One conversation about zero or more pictures, in the order of their `<image>` marks."""

    id: str
    images: tuple[Path, ...]
    turns: tuple[Turn, ...]


@dataclass(frozen=True)
class Parsed:
    """An entry of a file, as far as it can be understood.

    Attributes:
        id: of the record, or None.
        record: None where a fault leaves training nothing to use.
        image_names: as written in the file.
        faults: all that the entry and the ids before it show.
    """

    id: str | None
    record: Record | None
    image_names: tuple[str, ...]
    faults: tuple[Fault, ...]


def parse_entry(entry: Any, root: Path, repeats: bool = False) -> Parsed:
    """One entry with its faults; `repeats` says that an earlier entry has its id."""
    if not isinstance(entry, dict):
        fault = Fault("not_an_object", f" is a JSON {type(entry).__name__}: an object is needed")
        return Parsed(None, None, (), (fault,))
    faults: list[Fault] = []
    record_id = entry_id(entry)
    if record_id is None:
        faults.append(Fault("no_id", ' has no "id": give every record a text or a number'))
    elif repeats:
        faults.append(Fault("duplicate_id", " has the id of an earlier record: give each its own"))
    turns = _turns(entry.get("conversations"), "conversations" in entry, faults)
    names = _image_names(entry.get("image"), faults)
    if entry.get("video") is not None:
        faults = [fault for fault in faults if fault.kind != "video_mark"]  # it is no stray one
        faults.append(Fault("video", NO_VIDEO))
    elif names is not None and turns is not None and (fault := check_marks(turns, len(names))):
        faults.append(Fault("image_count", f" has {fault}: write one {IMAGE_MARK} for each image"))
    record = None
    if all(CLASSES[fault.kind].usable for fault in faults):
        assert record_id is not None and turns is not None and names is not None  # else there is a fault
        record = Record(record_id, tuple(root / name for name in names), turns)
    return Parsed(record_id, record, names or (), tuple(faults))


def check_marks(turns: tuple[Turn, ...], images: int) -> str | None:
    """What is wrong between `<image>` marks and pictures, or None."""
    marks = sum(turn.text.count(IMAGE_MARK) for turn in turns if turn.role == "user")
    if marks == images:
        return None
    return f"{marks} {IMAGE_MARK} mark{'s' * (marks != 1)} in its human turns but {images} image{'s' * (images != 1)}"


# ---------------------------------------------------------------- parts of an entry


def entry_id(entry: Any) -> str | None:
    """The id of an entry as text, None where it has none."""
    value = entry.get("id") if isinstance(entry, dict) else None
    if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
        return None
    return str(value)


def _image_names(value: Any, faults: list[Fault]) -> tuple[str, ...] | None:
    names = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        faults.append(Fault("malformed_image", ' has an "image" that is neither a path nor a list of paths'))
        return None
    faults += [fault for name in names if (fault := _path_fault(name))]
    return tuple(names)


def _path_fault(name: str) -> Fault | None:
    if "\0" in name or not _is_unicode(name):
        return Fault("bad_path", f" has the image path {name!r}, which no file can have")
    if _URL.match(name):
        return Fault("url", f" has the image {name[:80]}: download it, training reads files")
    if os.path.isabs(name):
        return Fault("absolute_path", f" has the absolute image path {name}: write it from data.image_root")
    if ".." in name and os.path.normpath(name).split("/")[0] == "..":
        return Fault("outside_root", f" has the image path {name}, which leads out of data.image_root")
    return None


def _is_unicode(text: str) -> bool:
    """Whether the text can be written as UTF-8: JSON can spell half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _turns(conversation: Any, present: bool, faults: list[Fault]) -> tuple[Turn, ...] | None:
    """Checked turns: an optional system turn, then human and gpt in alternation, gpt last."""
    if not isinstance(conversation, list) or not conversation:
        what = (
            ' has an empty or malformed "conversations": a non-empty list of turns is needed'
            if present
            else ' has no "conversations": a list of turns is needed'
        )
        faults.append(Fault("empty_conversation", what))
        return None
    turns = [_turn(entry, f", turn {index}", faults) for index, entry in enumerate(conversation)]
    roles: list[Role] = [turn.role for turn in turns if turn is not None]
    if len(roles) == len(turns):
        faults += _order_faults(roles)
    known = tuple(turn for turn in turns if turn is not None)
    return known if len(known) == len(turns) else None


def _order_faults(roles: list[Role]) -> Iterator[Fault]:
    spoken = roles[1:] if roles[0] == "system" else roles
    if "system" in spoken:
        yield Fault("late_system", " has a system turn that is not its first: move it to the start")
        spoken = [role for role in spoken if role != "system"]
    for index, role in enumerate(spoken):
        expected = "assistant" if index % 2 else "user"
        if role != expected:
            yield Fault(
                "role_order",
                f" has a {role} turn where a {expected} turn must stand: "
                "after an optional system turn, human and gpt alternate",
            )
            break
    if not spoken or spoken[-1] != "assistant":
        yield Fault(
            "unanswered",
            " does not end with a gpt turn: there is nothing to learn from its last question",
        )
    if len(set(spoken)) == 1:
        side = "human" if spoken[0] == "user" else "gpt"
        yield Fault("one_sided", f" has {side} turns only: a question and its answer are needed")


def _turn(entry: Any, where: str, faults: list[Fault]) -> Turn | None:
    if not isinstance(entry, dict) or "from" not in entry or "value" not in entry:
        faults.append(Fault("malformed_turn", f'{where} is not an object with "from" and "value"'))
        return None
    role = _ROLES.get(entry["from"]) if isinstance(entry["from"], str) else None
    if role is None:
        known = ", ".join(_ROLES)
        faults.append(Fault("unknown_role", f"{where} is from {entry['from']!r}: only {known} are known"))
    text = entry["value"]
    if not isinstance(text, str):
        what = "nothing" if text is None else f"a JSON {type(text).__name__}"
        faults.append(Fault("non_text_value", f"{where} has no text but {what}: drop the turn or the record"))
        return None
    faults += [Fault(kind, f"{where} has {what}") for kind, what in text_faults(text, role, IMAGE_MARK)]
    return Turn(role, text) if role else None
