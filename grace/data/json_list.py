"""A JSON list read entry by entry: never more than a window of the file is held.

What comes out, and every message about a file that is not JSON, is what `json.loads` of the whole
text would give: the entries are read by its own decoder, and positions are those in the file.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

WINDOW = 1 << 22  # characters read at a time
_SPACE = " \t\n\r"  # JSON's
# The decoder stops within so many characters of a text that is cut off (the longest word is -Infinity, the longest
# escape a surrogate pair); only an open string is reported where it starts.
_CUT = 32
_OPEN_STRING = "Unterminated string"


class NotAList(Exception):
    """The file is JSON, but no list; `kind` is the Python type it becomes."""

    def __init__(self, kind: str):
        super().__init__(kind)
        self.kind = kind


def stream_entries(
    path: Path, advance: Callable[[int], None] = lambda bytes_read: None
) -> Iterator[tuple[str, Any]]:
    """Each entry of the list, as its text in the file and as its value.

    Args:
        advance: called now and then with the number of bytes read.

    Raises:
        OSError: the file cannot be read.
        ValueError, RecursionError: not JSON in UTF-8.
        NotAList: something else than a list.
    """
    with path.open(encoding="utf-8") as file:
        window = _Window(file, advance)
        if window.next_character() != "[":
            file.seek(0)
            raise NotAList(type(json.loads(file.read())).__name__)
        window.at += 1
        if window.next_character() == "]":
            window.at += 1
        else:
            more = True
            while more:
                window.next_character()
                yield window.entry()
                more = window.separator()
        if window.next_character():
            raise window.moved(json.JSONDecodeError("Extra data", window.text, window.at))


class _Window:
    """The part of a file that is being read; `at` is the next character."""

    def __init__(self, file: TextIO, advance: Callable[[int], None]):
        self.file, self.advance = file, advance
        self.text, self.at = "", 0
        self.passed, self.lines, self.column = (
            0,
            0,
            0,
        )  # characters and lines before the window, characters in its line
        self.ended = False
        self.scan = json.JSONDecoder().raw_decode

    def next_character(self) -> str:
        """The next one that is no space, without passing it; empty at the end of the file."""
        while True:
            while self.at < len(self.text):
                if self.text[self.at] not in _SPACE:
                    return self.text[self.at]
                self.at += 1
            if self.ended:
                return ""
            self.read_on(WINDOW)

    def entry(self) -> tuple[str, Any]:
        """The value that starts here."""
        size = WINDOW
        while True:
            try:
                value, end = self.scan(self.text, self.at)
            except json.JSONDecodeError as error:
                cut = error.pos + _CUT > len(self.text) or error.msg.startswith(_OPEN_STRING)
                if self.ended or not cut:
                    raise self.moved(error) from None
            else:
                if end + _CUT < len(self.text) or self.ended:  # else a number may go on, as in 1.5e
                    text, self.at = self.text[self.at : end], end
                    return text, value
            self.read_on(size)
            size *= 2  # so that a long entry is not scanned from its start too often

    def separator(self) -> bool:
        """Passes what follows an entry; whether that promises another one."""
        character = self.next_character()
        if character not in (",", "]"):
            raise self.moved(json.JSONDecodeError("Expecting ',' delimiter", self.text, self.at))
        self.at += 1
        return character == ","

    def read_on(self, size: int) -> None:
        """Drops what was passed and reads `size` more characters."""
        passed = self.text[: self.at]
        lines = passed.count("\n")
        self.column = len(passed) - passed.rfind("\n") - 1 if lines else self.column + len(passed)
        self.lines += lines
        self.passed += len(passed)
        try:
            added = self.file.read(size)
        except UnicodeDecodeError as error:
            raise _placed(error, self.file.buffer.tell() - len(error.object)) from None
        self.ended = len(added) < size
        self.text, self.at = self.text[self.at :] + added, 0
        self.advance(self.file.buffer.tell())

    def moved(self, error: json.JSONDecodeError) -> ValueError:
        """The error with its place in the file, or one of the text after it: that would be found first."""
        before = self.text.count("\n", 0, error.pos)
        column = error.colno if before else self.column + error.pos + 1
        place = f"line {self.lines + before + 1} column {column} (char {self.passed + error.pos})"
        while not self.ended:
            self.text, self.at = "", 0
            self.read_on(WINDOW)
        return ValueError(f"{error.msg}: {place}")


def _placed(error: UnicodeDecodeError, offset: int) -> ValueError:
    """The error as it would be in the file as a whole."""
    first, last = offset + error.start, offset + error.end - 1
    what = (
        f"byte 0x{error.object[error.start]:02x} in position {first}"
        if first == last
        else f"bytes in position {first}-{last}"
    )
    return ValueError(f"'{error.encoding}' codec can't decode {what}: {error.reason}")
