"""A process that decodes pictures which nobody vouches for. Run by path; it imports Pillow alone.

On standard input: 8 bytes of length (big-endian), then a file's bytes. On standard output: the letter `R`, 4 bytes
each of width and height and the RGB pixels, or `E`, 4 bytes of length and what is wrong (UTF-8). Its memory is
limited, and whoever started it ends it when it takes too long: a decoder that runs wild harms nobody else.

    python -P image_worker.py MAX_PIXELS MAX_MEMORY_BYTES
"""

import io
import resource
import struct
import sys
from typing import BinaryIO

from PIL import Image

FORMATS = {
    "PNG": "image/png",
    "JPEG": "image/jpeg",
    "WEBP": "image/webp",
    "GIF": "image/gif",
    "BMP": "image/bmp",
}
_SIGNS = ((b"\x89PNG\r\n\x1a\n", "PNG"), (b"\xff\xd8\xff", "JPEG"), (b"GIF8", "GIF"), (b"BM", "BMP"))


def media_type(data: bytes) -> str | None:
    """The media type by the first bytes, None for what is not decoded here."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return FORMATS["WEBP"]
    return next((FORMATS[name] for sign, name in _SIGNS if data.startswith(sign)), None)


def decode(data: bytes, max_pixels: int) -> Image.Image:
    """The picture as RGB.

    Raises:
        ValueError: not one, another format, damaged, too large or animated.
    """
    try:
        with Image.open(io.BytesIO(data), formats=[*FORMATS]) as image:
            if image.width * image.height > max_pixels:  # from the header: nothing is decoded yet
                raise ValueError(f"it has {image.width} x {image.height} pixels, more than {max_pixels:,}")
            # An MPO is a JPEG with a second view behind it.
            if image.format != "MPO" and getattr(image, "is_animated", False):
                raise ValueError("it is animated: send one frame")
            return image.convert("RGB")
    except ValueError:
        raise
    except Image.UnidentifiedImageError as error:
        raise ValueError("it is no PNG, JPEG, WebP, GIF or BMP picture") from error
    except MemoryError as error:
        raise ValueError("it takes too much memory to decode") from error
    except Exception as error:
        raise ValueError(f"it cannot be decoded ({error})") from error


def main() -> None:
    max_pixels, memory = int(sys.argv[1]), int(sys.argv[2])
    Image.init()  # all decoders, while memory is free
    Image.MAX_IMAGE_PIXELS = max_pixels
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    source, target = sys.stdin.buffer, sys.stdout.buffer
    while len(head := source.read(8)) == 8:
        data = source.read(int.from_bytes(head, "big"))
        try:
            image = decode(data, max_pixels)
            _write_pixels(image, target)
        except ValueError as error:
            text = str(error).encode("utf-8", "replace")[:1000]
            target.write(b"E" + struct.pack(">I", len(text)) + text)
        target.flush()


def _write_pixels(image: Image.Image, target: BinaryIO) -> None:
    """Strip by strip: one copy of the pixels is enough."""
    target.write(b"R" + struct.pack(">II", image.width, image.height))
    for top in range(0, image.height, 256):
        target.write(image.crop((0, top, image.width, min(top + 256, image.height))).tobytes())


if __name__ == "__main__":
    main()
