"""What the bytes of an image file say without decoding it: its format, its size, whether its end is there.

Pillow reads headers and decodes; it does not say whether a file is whole until it has decoded all of it.
These few container formats say so themselves, at the cost of one more read.
"""

import os
import struct
from typing import BinaryIO

_TAIL = 64  # bytes that are looked at for an end mark
_PNG_END = b"IEND\xae\x42\x60\x82"
_MAGIC = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF8", "GIF"),
    (b"BM", "BMP"),
    (b"II*\x00", "TIFF"),
    (b"MM\x00*", "TIFF"),
)

_HEAD = 1024  # bytes in which other kinds of file show themselves
_STILL_BRANDS = {
    **dict.fromkeys((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"), "HEIC"),
    **dict.fromkeys((b"avif", b"avis"), "AVIF"),
}
_OTHERS = (  # offset, bytes there, class of fault, what it is
    (0, b"\x1aE\xdf\xa3", "video_file", "a WebM or Matroska video"),
    (8, b"AVI ", "video_file", "an AVI video"),
    (0, b"\0\0\1\xba", "video_file", "an MPEG video"),
    (0, b"\xff\x0a", "unsupported_format", "a JPEG XL"),
    (0, b"\0\0\0\x0cJXL ", "unsupported_format", "a JPEG XL"),
    (0, b"%PDF", "unsupported_format", "a PDF"),
)


def sniff(file: BinaryIO) -> str | None:
    """The format by its first bytes, or None."""
    file.seek(0)
    head = file.read(12)
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    return next((name for magic, name in _MAGIC if head.startswith(magic)), None)


def stands_for(file: BinaryIO) -> tuple[str, str] | None:
    """Of a file that is no readable picture, the class of fault and what it is instead; None if that is unknown."""
    file.seek(0)
    head = file.read(_HEAD)
    if head.startswith(b"version https://git-lfs.github.com/spec/"):
        return "lfs_pointer", "is a Git LFS pointer: `git lfs pull` fetches the picture"
    if head[4:8] == b"ftyp":
        brand = head[8:12]
        if brand in _STILL_BRANDS:
            return "unsupported_format", f"is a {_STILL_BRANDS[brand]}"
        return "video_file", "is an MP4 or QuickTime video"
    for start, magic, kind, what in _OTHERS:
        if head[start:].startswith(magic):
            return kind, f"is {what}"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    is_page = text.startswith((b"<!doctype html", b"<html", b"<head"))
    if b"<svg" in text and not is_page:
        return "unsupported_format", "is an SVG drawing"
    if is_page or text.startswith((b"<?xml", b"<error", b'{"')):
        return "error_page", "is a page of text that a server sent in its place"
    return None


def has_end(file: BinaryIO, kind: str) -> bool | None:
    """Whether the file goes on to the end that its format prescribes; None where that takes decoding."""
    size = os.fstat(file.fileno()).st_size
    if kind == "WEBP":
        file.seek(4)
        length = file.read(4)
        return len(length) == 4 and 8 + int.from_bytes(length, "little") <= size
    if kind not in ("JPEG", "PNG", "GIF"):
        return None
    file.seek(max(0, size - _TAIL))
    tail = file.read(_TAIL).rstrip(b"\0\r\n\t ")  # padding that some tools leave
    if kind == "GIF":
        return tail.endswith(b";")
    if kind == "PNG":
        return tail.endswith(_PNG_END) or _png_end(file, size)
    return tail.endswith(b"\xff\xd9") or _jpeg_end(file)


def bits_per_channel(file: BinaryIO, kind: str) -> int | None:
    """Bit depth of a PNG's channels, which Pillow hides; None for other formats."""
    if kind != "PNG":
        return None
    file.seek(24)
    return file.read(1)[0]


def header_size(file: BinaryIO, kind: str) -> tuple[int, int] | None:
    """Width and height as the header states them, nonsense included; None where it does not get that far."""
    try:
        if kind == "PNG":
            return _fields(file, 16, ">II")
        if kind == "GIF":
            return _fields(file, 6, "<HH")
        if kind == "BMP":
            return _fields(file, 18, "<ii")
        if kind == "JPEG":
            for marker, offset, _ in _jpeg_segments(file):
                if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # a frame header
                    height, width = _fields(file, offset + 1, ">HH")
                    return width, height
    except struct.error:  # the file ends first
        pass
    return None


def _fields(file: BinaryIO, offset: int, layout: str) -> tuple[int, int]:
    file.seek(offset)
    first, second = struct.unpack(layout, file.read(struct.calcsize(layout)))
    return first, second


def _jpeg_segments(file: BinaryIO):
    """Marker, offset and length of each segment's contents, up to the first scan and that included."""
    offset = 2
    while True:
        file.seek(offset)
        head = file.read(4)
        if len(head) < 4 or head[0] != 0xFF:
            return
        if head[1] == 0xFF:  # fill bytes
            offset += 1
            continue
        length = int.from_bytes(head[2:], "big") - 2
        yield head[1], offset + 4, length
        if head[1] == 0xDA:
            return
        offset += 4 + max(0, length)


def _jpeg_end(file: BinaryIO) -> bool:
    """Whether an end mark follows the first scan: then what comes after it is something appended.

    A thumbnail's end mark lies before the scan, and inside a scan the two bytes cannot occur.
    """
    for marker, offset, length in _jpeg_segments(file):
        if marker == 0xDA:
            file.seek(offset + length)
            return b"\xff\xd9" in file.read()
    return False


def _png_end(file: BinaryIO, size: int) -> bool:
    """Whether the chunks lead to an end chunk: then what comes after it is something appended."""
    offset = 8
    while offset + 12 <= size:
        file.seek(offset)
        length, name = struct.unpack(">I4s", file.read(8))
        if name == b"IEND" or not name.isalpha():
            return name == b"IEND"
        offset += 12 + length
    return False
