"""A record's pictures, from their files."""

import os
import stat
import struct
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from grace.errors import UserError

DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


def decode_image(source: Path | BinaryIO) -> Image.Image:
    """A picture as RGB; raises one of `DECODE_ERRORS`."""
    limit = Image.MAX_IMAGE_PIXELS
    with Image.open(source) as image:
        if limit is not None and image.width * image.height > limit:  # Pillow itself stops at twice that
            raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels, limit {limit}")
        return image.convert("RGB")


def open_image(path: Path, record_id: str) -> Image.Image:
    """Opens and fully decodes a picture as RGB.

    Raises:
        UserError: missing, unreadable, truncated or too large; the message names the file and the record.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for ever
            raise OSError("it is not a file")
        return decode_image(path)
    except FileNotFoundError as error:
        raise UserError(
            f"record {record_id}: image {path} does not exist: restore it or drop the record"
        ) from error
    except DECODE_ERRORS as error:
        raise UserError(
            f"record {record_id}: image {path} cannot be decoded ({error}): replace it or drop the record"
        ) from error


def read_image(path: Path, record_id: str) -> bytes:
    """The bytes of a picture's file.

    Raises:
        UserError: missing or unreadable; the message names the file and the record.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(
            f"record {record_id}: image {path} cannot be read ({error.strerror}): restore it or drop the record"
        ) from error
