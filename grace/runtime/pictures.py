"""Pictures for a prompt: files, http(s) URLs, standard input, or pictures that are loaded already."""

import io
import re
import sys
from pathlib import Path

from PIL import Image

from grace.data.image_file import DECODE_ERRORS, decode_image, open_image
from grace.errors import UserError
from grace.runtime.serve.fetch import FetchError, fetch

MAX_BYTES = 32 << 20  # of a fetched picture, or one from standard input
FETCH_SECONDS = 30.0
Picture = str | Path | Image.Image


def load_picture(source: Picture) -> Image.Image:
    """A picture as RGB.

    Args:
        source: a file, an http(s) URL, `-` for standard input, or a picture.

    Raises:
        UserError: it cannot be had, is too large or cannot be decoded.
    """
    if isinstance(source, Image.Image):
        return source.convert("RGB")
    name = str(source)
    if name == "-":
        return _decoded(sys.stdin.buffer.read(MAX_BYTES + 1), "on standard input")
    if isinstance(source, str) and re.match(r"https?://", name, re.IGNORECASE):
        try:
            # Whoever types a URL may reach what it names: private addresses too, unlike in the server.
            return _decoded(fetch(name, MAX_BYTES, FETCH_SECONDS, allowed=lambda address: True), name)
        except FetchError as error:
            raise _refused(name, error) from error
    try:
        return open_image(Path(name), "--image")
    except UserError as error:
        reason = "no such file" if isinstance(error.__cause__, FileNotFoundError) else error.__cause__
        raise _refused(name, reason) from error


def _decoded(data: bytes, name: str) -> Image.Image:
    if len(data) > MAX_BYTES:
        raise _refused(name, f"more than {MAX_BYTES >> 20} MB")
    try:
        return decode_image(io.BytesIO(data))
    except DECODE_ERRORS as error:
        reason = (
            "no bytes" if not data else "no picture in a known format" if "BytesIO" in str(error) else error
        )
        raise _refused(name, reason) from error


def _refused(name: str, reason: object) -> UserError:
    return UserError(f"the picture {name} cannot be read ({reason}): pass another with --image")
