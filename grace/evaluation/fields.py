"""Values of a benchmark's rows, checked: what is missing or wrong is named by its row and column."""

import ast
import math
from collections.abc import Sequence
from typing import Any, NoReturn

from grace.errors import UserError
from grace.evaluation.dataset import Table

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class Fields:
    """The columns of a table that a task reads.

    Args:
        needed: columns that must be there.

    Raises:
        UserError: one is not.
    """

    def __init__(self, table: Table, needed: Sequence[str]):
        self.table = table
        absent = [name for name in needed if name not in table.columns]
        if absent:
            raise UserError(
                f"{table.origin}: there is no column {absent[0]} (it has {', '.join(map(str, table.columns))[:200]}): "
                "give the dataset as it is published"
            )
        self._columns: dict[str, list[Any]] = {}

    def __len__(self) -> int:
        return len(self.table)

    def has(self, *names: str) -> bool:
        """Whether the table has all of these columns."""
        return all(name in self.table.columns for name in names)

    def value(self, row: int, name: str) -> Any:
        """A value as it is; None where the column is absent or the value is missing (NaN included)."""
        if name not in self.table.columns:
            return None
        if name not in self._columns:
            self._columns[name] = self.table.column(name)
        value = self._columns[name][row]
        return None if isinstance(value, float) and math.isnan(value) else value

    def optional(self, row: int, name: str) -> str | None:
        """A text, None where it is missing, empty or "nan" (what pandas writes for a missing one)."""
        value = self.value(row, name)
        if value is None or str(value).strip() in ("", "nan"):
            return None
        return _plain(value)

    def text(self, row: int, name: str) -> str:
        """A text or number that must be there, as text.

        Raises:
            UserError: it is missing.
        """
        value = self.value(row, name)
        if value is None or isinstance(value, list | dict | bytes) or not str(value).strip():
            self.wrong(row, name, f"expected a text, found {_shown(value)}")
        return _plain(value)

    def texts(self, row: int, name: str) -> list[str]:
        """A list of texts, or a text that spells one out, such as "['a', 'b']".

        Raises:
            UserError: neither.
        """
        value = self.value(row, name)
        if isinstance(value, str):
            try:
                value = ast.literal_eval(value)
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                self.wrong(row, name, f"expected a list, found {_shown(value)}")
        if not isinstance(value, list | tuple):
            self.wrong(row, name, f"expected a list, found {_shown(value)}")
        if missing := [one for one in value if one is None or isinstance(one, list | dict | bytes)]:
            self.wrong(row, name, f"expected a list of texts, found {_shown(missing[0])} in it")
        return [_plain(one) for one in value]

    def letter(self, row: int, name: str, choices: Sequence[str], index: bool = False) -> str:
        """The letter of the right option.

        Args:
            index: the column holds its number from 0, as published; its letter will do too.

        Raises:
            UserError: no letter, or of an option that is not there.
        """
        value = self.value(row, name)
        known = LETTERS[: len(choices)]
        text = "" if value is None or isinstance(value, bool) else _plain(value).strip()
        if index and text.isascii() and text.isdigit() and int(text) < len(choices):
            return known[int(text)]
        if len(text) != 1 or text not in known:
            what = f"a number from 0 to {len(choices) - 1}" if index else f"one of {', '.join(known)}"
            self.wrong(row, name, f"expected {what}, found {_shown(value)}")
        return text

    def wrong(self, row: int, name: str, what: str) -> NoReturn:
        """Raises the error about one value."""
        raise UserError(
            f"{self.table.origin}: row {row}, column {name}: {what}: correct it or download the dataset again"
        )

    def unique(self, ids: Sequence[str], rows: Sequence[int], name: str) -> None:
        """Checks that no two rows have the same id.

        Raises:
            UserError: two have.
        """
        seen: dict[str, int] = {}
        for one, row in zip(ids, rows, strict=True):
            if one in seen:
                self.wrong(row, name, f"{one!r} is also that of row {seen[one]}")
            seen[one] = row


def options(choices: Sequence[str]) -> str:
    """Options one a line, "A. text"."""
    return "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False))


def without_marks(text: str) -> str:
    """A text whose `<image>` would be taken for a picture's place."""
    return text.replace("<image>", "")


def _plain(value: Any) -> str:
    """As text; whole numbers that went through a float column without their ".0"."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _shown(value: Any) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
