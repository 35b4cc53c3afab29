"""A dataset's pictures: from bytes, base64, a path, or what the Hub makes of them."""

import base64
import binascii
import hashlib
import io
import re
from pathlib import Path
from typing import Any

from PIL import Image

from grace.errors import UserError
from grace.evaluation.dataset import Table
from grace.evaluation.question import Picture

PATH_LENGTH = 1024  # a longer text is no path


def read_bytes(value: Any, folder: Path) -> bytes:
    """The encoded bytes of a picture as a dataset gives it.

    Args:
        value: bytes, {"bytes": ..., "path": ...}, base64 or a path.
        folder: where a relative path starts.

    Raises:
        ValueError: none of these; says what it is.
        OSError: the file cannot be read.
    """
    if isinstance(value, dict):
        held = value.get("bytes")
        return read_bytes(held if held is not None else value.get("path"), folder)
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str) or not value.strip():
        raise ValueError("there is no picture" if not value else f"it is a {type(value).__name__}")
    if len(value) <= PATH_LENGTH and (folder / value).is_file():
        return (folder / value).read_bytes()
    text = value.partition(",")[2] if value.startswith("data:") else value
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        if len(value) <= PATH_LENGTH and Path(value).suffix:
            raise ValueError(f"there is no file {folder / value}") from error
        raise ValueError("it is neither base64 nor the path of a file") from error


def _in_list(value: Any, place: int) -> Any:
    if not isinstance(value, list) or len(value) <= place:
        raise ValueError(f"expected a list of at least {place + 1}, found {type(value).__name__}")
    return value[place]


def decode(content: bytes) -> Image.Image:
    """A picture as RGB.

    Raises:
        ValueError: it cannot be decoded.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            return image.convert("RGB")
    except Exception as error:  # each of Pillow's plugins has its own types for damaged files
        raise ValueError(re.sub(r" ?<_io\.BytesIO[^>]*>", "", str(error))[:120]) from error


class Pictures:
    """The pictures of a table."""

    def __init__(self, table: Table):
        self.table = table

    def content(self, picture: Picture) -> bytes:
        """Encoded bytes.

        Raises:
            UserError: they cannot be had; names row and column.
        """
        value = self.table.cell(picture.row, picture.column)
        try:
            if picture.place is not None:
                value = _in_list(value, picture.place)
            return read_bytes(value, self.table.folder)
        except (ValueError, OSError) as error:
            raise self.unusable(picture, error) from error

    def image(self, picture: Picture) -> Image.Image:
        """The decoded picture.

        Raises:
            UserError: it cannot be decoded; names row and column.
        """
        try:
            return decode(self.content(picture))
        except ValueError as error:
            raise self.unusable(picture, error) from error

    def digest(self, picture: Picture) -> str:
        """A short digest of the picture's bytes.

        Raises:
            UserError: they cannot be had; names row and column.
        """
        return hashlib.sha256(self.content(picture)).hexdigest()[:16]

    def unusable(self, picture: Picture, error: Exception) -> UserError:
        """What to raise for a picture."""
        place = "" if picture.place is None else f" (picture {picture.place})"
        return UserError(
            f"{self.table.origin}: row {picture.row}, column {picture.column}{place}: the picture cannot be read "
            f"({error}): download the dataset again"
        )
