"""A tree of ShareGPT4V-shaped data with one fault planted in each record but the sound ones."""

import io
import json
import os
import socket
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

QUESTION, ANSWER = {"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A thing."}


@dataclass(frozen=True)
class Planted:
    """One entry of the file, named by what is wrong with it, and exactly the classes that it has."""

    name: str
    entry: Any
    kinds: frozenset[str]


def entry(name: str, image: Any = ..., **changes: Any) -> dict[str, Any]:
    """A sound record about `image`; ... leaves a key out."""
    record = {
        "id": name,
        "image": f"pictures/{name}" if image is ... else image,
        "conversations": [QUESTION, ANSWER],
    }
    return {key: value for key, value in {**record, **changes}.items() if value is not ...}


def talk(*turns: tuple[Any, Any]) -> list[dict[str, Any]]:
    return [{"from": role, "value": value} for role, value in turns]


def noise(width: int = 64, height: int = 48, channels: int = 3) -> np.ndarray:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(0).integers(0, 256, size=shape, dtype=np.uint8)


def picture(mode: str = "RGB") -> Image.Image:
    channels = {"L": 1, "1": 1, "LA": 2, "RGBA": 4}.get(mode, 3)
    return Image.fromarray(noise(channels=channels)).convert(mode)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(width: int, height: int, bits: int = 8, colour: int = 2, data: bytes = b"") -> bytes:
    """A PNG put together by hand: header, compressed `data`, end."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(data))
        + chunk(b"IEND", b"")
    )


def exif(orientation: int) -> Image.Exif:
    found = Image.Exif()
    found[0x0112] = orientation
    return found


def flipped(data: bytes, share: float) -> bytes:
    """The bytes with those at one place turned over."""
    at = int(len(data) * share)
    return data[:at] + bytes(255 - byte for byte in data[at : at + 8]) + data[at + 8 :]


def zero_height(jpeg: bytes) -> bytes:
    at = jpeg.index(b"\xff\xc0")
    return jpeg[: at + 5] + b"\0\0" + jpeg[at + 7 :]


JPEG, PNG, GIF = encoded(picture(), "JPEG"), encoded(picture(), "PNG"), encoded(picture("P"), "GIF")
WEBP, BMP = encoded(picture(), "WEBP", lossless=True), encoded(picture(), "BMP")
TIFF = encoded(picture(), "TIFF")
FRAMES = [Image.fromarray(noise() // (i + 1)) for i in range(3)]
FLOAT = Image.fromarray(noise(channels=1).astype(np.float32))

# File contents -> classes. The names are the files'.
FILES: dict[str, tuple[bytes, set[str]]] = {
    "sound.jpg": (JPEG, set()),
    "sound.JPEG": (JPEG, set()),
    "sound.png": (PNG, set()),
    "sound.webp": (WEBP, set()),
    "sound.bmp": (BMP, set()),
    "sound.tif": (TIFF, set()),
    "grey.png": (encoded(picture("L"), "PNG"), set()),
    "one_bit.png": (encoded(picture("1"), "PNG"), set()),
    "no_extension": (JPEG, set()),
    "progressive.jpg": (encoded(picture(), "JPEG", progressive=True), set()),
    "appended.jpg": (JPEG + b"something a camera wrote behind it" * 9, set()),
    "padded.jpg": (JPEG + bytes(500), set()),
    "appended.png": (PNG + b"something behind it" * 9, set()),
    "empty.jpg": (b"", {"empty_file"}),
    "text.jpg": (b"hello", {"not_an_image"}),
    "error_page.jpg": (b"\n<!DOCTYPE html><title>404</title><svg></svg>", {"error_page"}),
    "denied.jpg": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", {"error_page"}),
    "limit.png": (b'{"message": "API rate limit exceeded"}', {"error_page"}),
    "pointer.jpg": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n", {"lfs_pointer"}),
    "clip.jpg": (b"\0\0\0\x20ftypisom" + bytes(50), {"video_file"}),
    "clip.webm": (b"\x1aE\xdf\xa3" + bytes(50), {"video_file"}),
    "clip.avi": (b"RIFF\0\0\0\0AVI LIST" + bytes(50), {"video_file"}),
    "phone.jpg": (b"\0\0\0\x20ftypheic" + bytes(50), {"unsupported_format"}),
    "drawing.png": (b"<?xml version='1.0'?><svg width='3'/>", {"unsupported_format"}),
    "page.jpg": (b"%PDF-1.7" + bytes(50), {"unsupported_format"}),
    "dot.png": (encoded(Image.new("RGB", (1, 1)), "PNG"), {"tiny"}),
    "line.png": (encoded(Image.new("RGB", (60, 3)), "PNG"), {"tiny"}),
    "turned.jpg": (encoded(picture(), "JPEG", exif=exif(6)), {"turned"}),
    "turned.webp": (encoded(picture(), "WEBP", exif=exif(8)), {"turned"}),
    "turned_by_nothing.jpg": (encoded(picture(), "JPEG", exif=exif(1)), set()),
    "turned.tif": (encoded(picture(), "TIFF", tiffinfo={274: 6}), set()),
    "one_extension.jpg.png": (PNG, set()),
    "half.jpg": (JPEG[: len(JPEG) // 2], {"truncated"}),
    "no_end.jpg": (JPEG[:-2], {"truncated"}),
    "header_only.jpg": (JPEG[:30], {"truncated"}),
    "half_appended.jpg": (JPEG[: len(JPEG) // 2] + b"\0" * 3000 + b"x", {"truncated"}),
    "preallocated.jpg": (JPEG[: len(JPEG) // 2] + bytes(len(JPEG)), {"truncated"}),
    "preallocated.png": (PNG[: len(PNG) // 2] + bytes(len(PNG)), {"truncated"}),
    "half.png": (PNG[: len(PNG) // 2], {"truncated"}),
    "no_end.png": (PNG[:-12], {"truncated"}),
    "header_only.png": (PNG[:20], {"truncated"}),
    "half.gif": (GIF[: len(GIF) // 2], {"truncated", "palette"}),
    "half.webp": (WEBP[: len(WEBP) // 2], {"truncated"}),
    "half.bmp": (BMP[: len(BMP) // 2], {"truncated"}),
    "half.tif": (TIFF[: len(TIFF) // 2], {"truncated"}),
    "broken_header.png": (flipped(PNG, 0)[:8] + PNG[8:], {"not_an_image"}),
    "zero_width.png": (png(0, 10), {"zero_size"}),
    "zero_height.jpg": (zero_height(JPEG), {"zero_size"}),
    "bomb.png": (png(60000, 60000, 1, 0), {"bomb"}),
    "large.png": (png(10000, 10000, 1, 0), {"bomb"}),
    "strip.png": (encoded(Image.new("L", (4, 1200)), "PNG"), {"extreme_aspect"}),
    "animated.gif": (encoded(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:]), {"animated", "palette"}),
    "animated.png": (encoded(FRAMES[0], "PNG", save_all=True, append_images=FRAMES[1:]), {"animated"}),
    "animated.webp": (encoded(FRAMES[0], "WEBP", save_all=True, append_images=FRAMES[1:]), {"animated"}),
    "cmyk.jpg": (encoded(picture("CMYK"), "JPEG"), {"cmyk"}),
    "rgba.png": (encoded(picture("RGBA"), "PNG"), {"alpha"}),
    "grey_alpha.png": (encoded(picture("LA"), "PNG"), {"alpha"}),
    "transparent_colour.png": (encoded(picture(), "PNG", transparency=(1, 2, 3)), {"alpha"}),
    "palette.png": (encoded(picture("P"), "PNG"), {"palette"}),
    "palette_alpha.png": (encoded(picture("P"), "PNG", transparency=0), {"palette", "alpha"}),
    "sixteen_grey.png": (encoded(Image.fromarray(noise(channels=1).astype(np.uint16)), "PNG"), {"sixteen_bit"}),
    "sixteen_rgb.png": (png(8, 8, 16, 2, bytes(8 * (1 + 8 * 6))), {"sixteen_bit"}),
    "float.tif": (encoded(FLOAT, "TIFF"), {"sixteen_bit"}),
    "png_inside.jpg": (PNG, {"wrong_extension"}),
    "gif_inside.jpg": (GIF, {"wrong_extension", "palette"}),
}  # fmt: skip
# Found by decoding alone.
DEEP_FILES: dict[str, tuple[bytes, set[str]]] = {"flipped.png": (flipped(PNG, 0.5), {"corrupt"})}

STRUCTURE: list[Planted] = [
    Planted(name, value, frozenset(kinds))
    for name, value, kinds in (
        ("text only", entry("text only", None, conversations=talk(("human", "Hi"), ("gpt", "Hello"))), ()),
        ("with system", entry("with system", "pictures/sound.jpg", conversations=[{"from": "system", "value": "Be short."}, QUESTION, ANSWER]), ()),
        ("two images", entry("two images", ["pictures/sound.jpg", "pictures/sound.png"], conversations=talk(("human", "<image><image>?"), ("gpt", "b"))), ()),
        ("inner dots", entry("inner dots", "pictures/../pictures/sound.jpg"), ()),
        ("a text", "a text", ["not_an_object"]),
        ("null", None, ["not_an_object"]),
        ("a list", [entry("x")], ["not_an_object"]),
        ("no id", entry("x", "pictures/sound.jpg", id=...), ["no_id"]),
        ("empty id", entry("x", "pictures/sound.jpg", id=""), ["no_id"]),
        ("id true", entry("x", "pictures/sound.jpg", id=True), ["no_id"]),
        ("id again", entry("text only", "pictures/sound.jpg"), ["duplicate_id"]),
        ("no conversations", entry("no conversations", None, conversations=...), ["empty_conversation"]),
        ("empty conversations", entry("empty conversations", None, conversations=[]), ["empty_conversation"]),
        ("conversations a text", entry("conversations a text", None, conversations="hi"), ["empty_conversation"]),
        ("turn a text", entry("turn a text", None, conversations=["hi", ANSWER]), ["malformed_turn"]),
        ("turn without value", entry("turn without value", None, conversations=[{"from": "human"}, ANSWER]), ["malformed_turn"]),
        ("unknown role", entry("unknown role", None, conversations=talk(("alien", "a"), ("gpt", "b"))), ["unknown_role"]),
        ("role a number", entry("role a number", None, conversations=talk((3, "a"), ("gpt", "b"))), ["unknown_role"]),
        ("value a number", entry("value a number", None, conversations=talk(("human", 3), ("gpt", "b"))), ["non_text_value"]),
        ("value null", entry("value null", None, conversations=talk(("human", "a"), ("gpt", None))), ["non_text_value"]),
        ("value a list", entry("value a list", None, conversations=talk(("human", ["a"]), ("gpt", "b"))), ["non_text_value"]),
        ("blank text", entry("blank text", None, conversations=talk(("human", "a"), ("gpt", " \n"))), ["empty_text"]),
        ("half a surrogate", entry("half a surrogate", None, conversations=talk(("human", "a"), ("gpt", "\ud83d"))), ["bad_text"]),
        ("human only", entry("human only", None, conversations=talk(("human", "a"))), ["one_sided", "unanswered"]),
        ("gpt only", entry("gpt only", None, conversations=talk(("gpt", "a"))), ["one_sided", "role_order"]),
        ("system only", entry("system only", None, conversations=talk(("system", "a"))), ["unanswered"]),
        ("gpt first", entry("gpt first", None, conversations=talk(("gpt", "a"), ("human", "b"), ("gpt", "c"))), ["role_order"]),
        ("human twice", entry("human twice", None, conversations=talk(("human", "a"), ("human", "b"), ("gpt", "c"))), ["role_order"]),
        ("late system", entry("late system", None, conversations=talk(("human", "a"), ("system", "b"), ("gpt", "c"))), ["late_system"]),
        ("two systems", entry("two systems", None, conversations=talk(("system", "a"), ("system", "b"), ("human", "a"), ("gpt", "c"))), ["late_system"]),
        ("user for human", entry("user for human", None, conversations=talk(("user", "a"), ("gpt", "b"))), ["unknown_role"]),
        ("nul in the text", entry("nul in the text", None, conversations=talk(("human", "a\0b"), ("gpt", "b"))), ["control_characters"]),
        ("escape in the text", entry("escape in the text", None, conversations=talk(("human", "a"), ("gpt", "\x1b[31mred"))), ["control_characters"]),
        ("lost characters", entry("lost characters", None, conversations=talk(("human", "a"), ("gpt", "caf\ufffd"))), ["lost_characters"]),
        ("control token", entry("control token", None, conversations=talk(("human", "a<|image_pad|>"), ("gpt", "b"))), ["control_token_text"]),
        ("pipes and brackets", entry("pipes and brackets", None, conversations=talk(("human", "a <| b |> 3<|x| \t\r\n"), ("gpt", "<im>"))), ()),
        ("mark in both", entry("mark in both", "pictures/sound.jpg", conversations=talk(("human", "<image>?"), ("gpt", "<image>"))), ["mark_in_answer"]),
        ("mark in the system turn", entry("mark in the system turn", None, conversations=talk(("system", "<image>"), ("human", "?"), ("gpt", "b"))), ["mark_in_answer"]),
        ("video mark", entry("video mark", None, conversations=talk(("human", "<video>\n?"), ("gpt", "b"))), ["video_mark"]),
        ("blank id", entry("x", "pictures/sound.jpg", id=" \n"), ["no_id"]),
        ("id a fraction", entry("x", "pictures/sound.jpg", id=1.5), ["no_id"]),
        ("id a number", entry("x", "pictures/sound.jpg", id=12), ()),
        ("id the same as text", entry("x", "pictures/sound.jpg", id="12"), ["duplicate_id"]),
        ("no images in a list", entry("no images in a list", [], conversations=talk(("human", "?"), ("gpt", "b"))), ()),
        ("an address", entry("an address", "https://example.org/a.jpg"), ["url"]),
        ("contents for a name", entry("contents for a name", "data:image/png;base64,iVBORw0KGgo="), ["url"]),
        ("other extension", entry("other extension", "pictures/animated.tiff"), ["other_extension"]),
        ("other case", entry("other case", "pictures/Sound.Jpg"), ["other_case"]),
        ("backslashes", entry("backslashes", "pictures\\sound.jpg"), ["backslashes"]),
        ("nothing behind backslashes", entry("nothing behind backslashes", "pictures\\absent.jpg"), ["missing"]),
        ("no such folder", entry("no such folder", "nowhere/sound.jpg"), ["missing"]),
        ("no last answer", entry("no last answer", None, conversations=talk(("human", "a"), ("gpt", "b"), ("human", "c"))), ["unanswered"]),
        ("image a number", entry("image a number", 7), ["malformed_image"]),
        ("image with null", entry("image with null", ["pictures/sound.jpg", None]), ["malformed_image"]),
        ("image without name", entry("image without name", ""), ["malformed_image"]),
        ("too many marks", entry("too many marks", "pictures/sound.jpg", conversations=talk(("human", "<image><image>"), ("gpt", "b"))), ["image_count"]),
        ("no mark", entry("no mark", "pictures/sound.jpg", conversations=talk(("human", "?"), ("gpt", "b"))), ["image_count"]),
        ("mark in the answer", entry("mark in the answer", "pictures/sound.jpg", conversations=talk(("human", "?"), ("gpt", "<image>"))), ["image_count", "mark_in_answer"]),
        ("mark without image", entry("mark without image", None), ["image_count"]),
        ("traversal", entry("traversal", "../outside.jpg"), ["outside_root"]),
        ("inner traversal", entry("inner traversal", "pictures/../../outside.jpg"), ["outside_root"]),
        ("nul in the path", entry("nul in the path", "pictures/a\0.jpg"), ["bad_path"]),
        ("surrogate in the path", entry("surrogate in the path", "pictures/\udfff.jpg"), ["bad_path"]),
        ("video", entry("video", None, video="clip.mp4", conversations=talk(("human", "<video>?"), ("gpt", "b"))), ["video"]),
        ("no such file", entry("no such file", "pictures/absent.jpg"), ["missing"]),
        ("file as folder", entry("file as folder", "pictures/sound.jpg/x.jpg"), ["missing"]),
        ("name too long", entry("name too long", "pictures/" + "x" * 300), ["missing"]),
        ("second image missing", entry("second image missing", ["pictures/sound.jpg", "pictures/absent.jpg"], conversations=talk(("human", "<image><image>?"), ("gpt", "b"))), ["missing"]),
        ("over-long", entry("over-long", "pictures/sound.jpg", conversations=[QUESTION, {"from": "gpt", "value": "word " * 3000}]), ["over_long"]),
        ("two faults", entry("two faults", "pictures/absent.jpg", conversations=[QUESTION]), ["missing", "one_sided", "unanswered"]),
    )
]  # fmt: skip


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        here = os.getcwd()
        os.chdir(path.parent)  # the names of sockets must be short
        server.bind(path.name)
        os.chdir(here)


def _unreadable(path: Path) -> None:
    path.write_bytes(JPEG)
    path.chmod(0)


SPECIAL: dict[str, tuple[Callable[[Path], Any], set[str]]] = {
    "folder.jpg": (Path.mkdir, {"not_a_file"}),
    "pipe.jpg": (_pipe, {"not_a_file"}),
    "socket.jpg": (_socket, {"not_a_file"}),
    "loop.jpg": (lambda path: path.symlink_to(path.name), {"symlink_loop"}),
    "dangling.jpg": (lambda path: path.symlink_to("nowhere"), {"dangling_link"}),
    "link.jpg": (lambda path: path.symlink_to("sound.jpg"), set()),
    "unreadable.jpg": (_unreadable, {"unreadable"}),
}


def plant(folder: Path, deep: bool = False) -> tuple[Path, list[Planted]]:
    """Writes `folder`/records.json with its pictures; returns it and what is in it, in order."""
    pictures = folder / "pictures"
    pictures.mkdir(parents=True)
    (folder.parent / "outside.jpg").write_bytes(JPEG)
    planted = list(STRUCTURE)
    for name, (contents, kinds) in {**FILES, **(DEEP_FILES if deep else {})}.items():
        (pictures / name).write_bytes(contents)
        planted.append(Planted(name, entry(name), frozenset(kinds)))
    for name, (make, kinds) in SPECIAL.items():
        make(pictures / name)
        planted.append(Planted(name, entry(name), frozenset(kinds)))
    absolute = str((pictures / "sound.jpg").absolute())
    planted.append(Planted("absolute", entry("absolute", absolute), frozenset({"absolute_path"})))
    path = folder / "records.json"
    path.write_text(json.dumps([one.entry for one in planted]))
    return path, planted
