"""One picture of a record: everything that is wrong with it, and its size.

By default only headers and tails are read; `deep` decodes the picture as training would.
"""

import errno
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image, UnidentifiedImageError

from grace.data.faults import Fault
from grace.data.image_bytes import bits_per_channel, has_end, header_size, sniff, stands_for

# Formats that are another one's under a name of its own: a JPEG with a second picture behind it.
_SAME_FORMAT = {"MPO": "JPEG"}
_MODES = {
    "CMYK": "cmyk", "RGBA": "alpha", "RGBa": "alpha", "LA": "alpha", "La": "alpha", "PA": "alpha",
    "P": "palette", "I": "sixteen_bit", "F": "sixteen_bit",
}  # fmt: skip
_OPEN_ERRORS = {
    errno.ENOTDIR: "missing",
    errno.ENAMETOOLONG: "missing",
    errno.ELOOP: "symlink_loop",
}
_ENDINGS = (".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff")
_TINY = 4  # pixels
_ORIENTATION, _UPRIGHT = 0x0112, (None, 0, 1)  # of Exif
_READABLE = stat.S_IRUSR | stat.S_IRGRP | stat.S_IROTH


@dataclass(frozen=True)
class Picture:
    """What a check found: `size` is (width, height), or None where training could not use the picture."""

    size: tuple[int, int] | None
    faults: tuple[Fault, ...]


def check_image(path: Path, deep: bool = False) -> Picture:
    """Reads a picture's header and tail, or all of it with `deep`. Never waits on a pipe, never raises."""
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):
            kind = "directory" if stat.S_ISDIR(mode) else "pipe, socket or device"
            return _lost("not_a_file", f"is a {kind}", path)
        if not mode & _READABLE:  # root could read it, the run's user may not
            return _lost("unreadable", "may be read by nobody", path)
        # Without blocking: between the check and the opening a pipe may have taken the file's place.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            return _check_file(file, path, deep)
    except ValueError:  # a name that no file can have: the record's own fault, found there
        return Picture(None, ())
    except FileNotFoundError:
        return _lost(*_absent(path), path)
    except OSError as error:
        kind = _OPEN_ERRORS.get(error.errno or 0, "unreadable")
        return _lost(kind, "does not exist" if kind == "missing" else f"({error.strerror or error})", path)


def _absent(path: Path) -> tuple[str, str]:
    """Class and clause for a path at which there is nothing."""
    if path.is_symlink():
        return "dangling_link", f"is a link to {os.readlink(path)}, which does not exist"
    if "\\" in path.name and os.path.isfile(path.parent / path.name.replace("\\", "/")):
        return "backslashes", "does not exist, but does with / for \\"
    if path.parent.is_dir():  # else a whole source is not there
        stems, endings = _in_capitals(path.stem), _in_capitals(path.suffix)
        if (other := _first_file(path, stems, endings)) is not None:
            return "other_case", f"does not exist, but {other} does"
        endings = [one for ending in _ENDINGS for one in (ending, ending.upper())]
        if (other := _first_file(path, [path.stem], endings)) is not None:
            return "other_extension", f"does not exist, but {other} does"
    return "missing", "does not exist"


def _in_capitals(text: str) -> list[str]:
    return list(dict.fromkeys((text, text.lower(), text.upper(), text.capitalize())))


def _first_file(path: Path, stems: list[str], endings: list[str]) -> str | None:
    """The first of these names that a file beside `path` has."""
    names = (stem + ending for stem in stems for ending in endings)
    return next((name for name in names if name != path.name and os.path.isfile(path.parent / name)), None)


def _lost(kind: str, what: str, path: Path) -> Picture:
    return Picture(None, (Fault(kind, f"image {path} {what}"),))


def _check_file(file: BinaryIO, path: Path, deep: bool) -> Picture:
    if os.fstat(file.fileno()).st_size == 0:
        return _lost("empty_file", "is empty", path)
    try:
        image = Image.open(file)
    except Image.DecompressionBombError as error:
        return _lost("bomb", f"is too large ({error})", path)
    except Exception as error:  # noqa: BLE001 - damaged headers make Pillow raise anything
        return _not_opened(file, path, error)
    if image.width < 1 or image.height < 1:
        return _lost("zero_size", f"is {image.width} x {image.height} pixels", path)
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        return _lost("bomb", f"has {image.width * image.height} pixels, more than {limit}", path)
    fmt = _SAME_FORMAT.get(image.format or "", image.format or "")
    try:
        faults = [Fault(kind, f"image {path} {detail}") for kind, detail in _oddities(image, fmt, file, path)]
    except Exception as error:  # noqa: BLE001 - looking for a second frame reads on, with the same dangers
        return _lost("corrupt", f"cannot be read on ({error})", path)
    if (broken := _incomplete(fmt, file, deep)) is not None:
        return Picture(None, (*faults, Fault(broken[0], f"image {path} {broken[1]}")))
    return Picture(image.size, tuple(faults))


def _not_opened(file: BinaryIO, path: Path, error: Exception) -> Picture:
    """Why Pillow cannot open the file."""
    kind = sniff(file)
    if kind is None:
        if (other := stands_for(file)) is not None:
            return _lost(*other, path)
        what = "is not an image" if isinstance(error, UnidentifiedImageError) else f"({error})"
        return _lost("not_an_image", what, path)
    size = header_size(file, kind)
    if size is not None and 0 in size:
        return _lost("zero_size", f"is {size[0]} x {size[1]} pixels", path)
    if has_end(file, kind) is False:
        return _lost("truncated", f"breaks off in the header of a {kind}", path)
    return _lost("corrupt", f"is a {kind} that cannot be decoded", path)


def _oddities(image: Any, fmt: str, file: BinaryIO, path: Path) -> Iterator[tuple[str, str]]:
    """What training could use, but hardly as it was meant."""
    if (kind := _MODES.get(image.mode, "sixteen_bit" if image.mode.startswith("I;") else None)) is not None:
        yield kind, f"is in mode {image.mode}"
    if kind != "alpha" and "transparency" in image.info:
        yield "alpha", "has a transparent colour"
    bits = bits_per_channel(file, fmt)
    if fmt == "TIFF":
        bits = max(image.tag_v2.get(258, (1,)))  # BitsPerSample
    if kind != "sixteen_bit" and bits is not None and bits > 8:
        yield "sixteen_bit", f"has {bits} bits a channel"
    if image.format != "MPO" and getattr(image, "is_animated", False):
        yield "animated", f"has {getattr(image, 'n_frames', 'several')} frames"
    if min(image.size) < _TINY:
        yield "tiny", f"is {image.width} x {image.height} pixels"
    # A TIFF is turned as it is decoded; the others keep it in a block that few have.
    if "exif" in image.info and fmt != "TIFF" and (turn := image.getexif().get(_ORIENTATION)) not in _UPRIGHT:
        yield "turned", f"is to be shown turned (Exif orientation {turn})"
    named = _extensions().get(path.suffix.lower())
    if named is not None and _SAME_FORMAT.get(named, named) != fmt:
        yield "wrong_extension", f"is a {fmt}"


def _extensions() -> dict[str, str]:
    """Format by file extension, of all formats that Pillow knows."""
    if not Image.EXTENSION.get(".webp"):  # only some are registered at the start
        Image.init()
    return Image.EXTENSION


def _incomplete(fmt: str, file: BinaryIO, deep: bool) -> tuple[str, str] | None:
    """Class and clause where the contents are not whole."""
    end = has_end(file, fmt)
    if end is False:
        return "truncated", f"ends before its {fmt} data does"
    if end is None or deep:
        file.seek(0)
        try:
            with Image.open(file) as image:
                image.convert("RGB")
        except Exception as error:  # noqa: BLE001 - damaged contents make decoders raise anything
            return ("truncated" if "truncated" in str(error) else "corrupt"), f"cannot be decoded ({error})"
    return None
