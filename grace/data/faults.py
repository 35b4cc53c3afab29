"""What can be wrong with a record, as named classes, and what a recipe wants done about each.

A record has any number of faults. Whether a fault ends the run, costs the record or is accepted is
the recipe's choice, class by class: `data.skip` leaves the record out, `data.accept` trains on it,
and a class in neither is an error. Only what training can make sense of may be accepted.
"""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from grace.errors import UserError

Level = Literal["record", "image", "length"]
Policy = Literal["error", "skip", "accept"]


@dataclass(frozen=True)
class FaultClass:
    """One kind of fault.

    Attributes:
        level: what it takes to see it: the "record" alone, its "image" files, or its "length" in tokens.
        usable: training can use the record as it is, so that the class may be accepted.
        meaning: for tables and documentation.
    """

    level: Level
    usable: bool
    meaning: str


CLASSES: dict[str, FaultClass] = {
    "not_an_object": FaultClass("record", False, "the entry is not a JSON object"),
    "no_id": FaultClass("record", False, "no id, or one that is neither text nor a whole number"),
    "duplicate_id": FaultClass("record", True, "an earlier record of the file has the same id"),
    "empty_conversation": FaultClass("record", False, "conversations absent, empty or not a list"),
    "malformed_turn": FaultClass("record", False, "a turn without from and value"),
    "unknown_role": FaultClass("record", False, "a turn from someone other than human, gpt or system"),
    "non_text_value": FaultClass("record", False, "a turn whose value is not text"),
    "empty_text": FaultClass("record", False, "a turn with no text"),
    "bad_text": FaultClass("record", False, "text with half of a surrogate pair, which is not Unicode"),
    "control_characters": FaultClass("record", True, "text with NUL or another control character"),
    "lost_characters": FaultClass(
        "record", True, "text with U+FFFD, which stands for what could not be decoded"
    ),
    "control_token_text": FaultClass("record", True, "text that looks like a control token; taken as text"),
    "mark_in_answer": FaultClass("record", True, "<image> in a gpt or system turn; taken as text"),
    "video_mark": FaultClass("record", True, "<video> in a human turn; taken as text"),
    "one_sided": FaultClass("record", False, "only human or only gpt turns"),
    "role_order": FaultClass("record", False, "human and gpt do not alternate, human first"),
    "late_system": FaultClass("record", False, "a system turn that is not the first"),
    "unanswered": FaultClass("record", False, "the last turn is not gpt's"),
    "malformed_image": FaultClass("record", False, "image is neither a path nor a list of paths"),
    "image_count": FaultClass("record", False, "<image> marks in human turns and images differ in number"),
    "absolute_path": FaultClass("record", True, "an image path that does not start from the image root"),
    "outside_root": FaultClass("record", True, "an image path that leads out of the image root"),
    "bad_path": FaultClass("record", False, "an image path that no file can have"),
    "url": FaultClass("record", False, "an image given by its address or its contents, not by a path"),
    "video": FaultClass("record", False, "a video, which training cannot read"),
    "missing": FaultClass("image", False, "no such file"),
    "other_extension": FaultClass("image", False, "no such file, but one of another extension"),
    "other_case": FaultClass("image", False, "no such file, but one whose name differs in capitals"),
    "backslashes": FaultClass("image", False, "no such file, but one with / for \\ in its path"),
    "dangling_link": FaultClass("image", False, "a symbolic link to a file that is not there"),
    "not_a_file": FaultClass("image", False, "a directory, pipe, socket or device"),
    "symlink_loop": FaultClass("image", False, "symbolic links that lead nowhere"),
    "unreadable": FaultClass("image", False, "no permission to read it, or the disk fails"),
    "empty_file": FaultClass("image", False, "0 bytes"),
    "not_an_image": FaultClass("image", False, "not in an image format that is known"),
    "error_page": FaultClass("image", False, "HTML, XML or JSON: what a server said instead of a picture"),
    "lfs_pointer": FaultClass("image", False, "a Git LFS pointer to a file that was not fetched"),
    "video_file": FaultClass("image", False, "a video where a picture should be"),
    "unsupported_format": FaultClass("image", False, "a picture in a format that Pillow cannot read here"),
    "zero_size": FaultClass("image", False, "0 pixels wide or high"),
    "truncated": FaultClass("image", False, "the end of the file is missing"),
    "corrupt": FaultClass("image", False, "the contents cannot be decoded"),
    "bomb": FaultClass("image", False, "more pixels than Pillow's limit of Image.MAX_IMAGE_PIXELS"),
    "extreme_aspect": FaultClass("image", False, "a shape that the image processor refuses"),
    "tiny": FaultClass("image", True, "less than 4 pixels wide or high"),
    "turned": FaultClass("image", True, "to be shown turned (Exif); training takes it as it lies"),
    "animated": FaultClass("image", True, "several frames; training takes the first"),
    "cmyk": FaultClass("image", True, "CMYK, converted to RGB"),
    "alpha": FaultClass("image", True, "transparency, dropped: what it hid shows"),
    "palette": FaultClass("image", True, "palette, converted to RGB"),
    "sixteen_bit": FaultClass("image", True, "more than 8 bits a channel, cut to 8"),
    "wrong_extension": FaultClass("image", True, "the name says another format than the contents"),
    "over_long": FaultClass("length", False, "more tokens than data.max_length"),
}


@dataclass(frozen=True)
class Fault:
    """One fault of one record; `detail` is a clause that follows the record's name in a message."""

    kind: str
    detail: str


@dataclass(frozen=True)
class Policies:
    """The recipe's choice for each class.

    Raises:
        UserError: a name that is no class, one in both lists, or an accepted one that training cannot use.
    """

    skip: Sequence[str] = ()
    accept: Sequence[str] = ()
    _skip: frozenset[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for key, names in (("data.skip", self.skip), ("data.accept", self.accept)):
            for name in names:
                if name not in CLASSES:
                    raise UserError(f"{key} names {name!r}, which is no class of fault{_nearest(name)}")
        if both := set(self.skip) & set(self.accept):
            raise UserError(f"{min(both)} is in data.skip and in data.accept: take it out of one")
        for name in self.accept:
            if not CLASSES[name].usable:
                raise UserError(
                    f"data.accept names {name} ({CLASSES[name].meaning}), which training cannot use: "
                    "move it to data.skip, or mend the records"
                )
        object.__setattr__(self, "_skip", frozenset(self.skip))

    def of(self, kind: str) -> Policy:
        """What happens to a fault of this class."""
        return "skip" if kind in self._skip else "accept" if kind in self.accept else "error"

    def skips(self, faults: Iterable[Fault]) -> str | None:
        """The class for which a record with these faults is left out, or None."""
        return next((fault.kind for fault in faults if fault.kind in self._skip), None)

    def need_audit(self) -> list[str]:
        """The skipped classes that only an audit can see."""
        return [name for name in self.skip if CLASSES[name].level != "record"]


def _nearest(name: str) -> str:
    close = difflib.get_close_matches(name.lower(), CLASSES, n=1, cutoff=0.5)
    return f", did you mean {close[0]}?" if close else f": the classes are {', '.join(CLASSES)}"
