"""Samples for a parity gate where no data is known: noise in several sizes, and what one might ask of it."""

import contextlib
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from grace.data.records import IMAGE_MARK, Record, Turn
from grace.errors import UserError

RECORDS = 8
_SIZES = ((96, 96), (64, 128), (160, 96), (32, 32))
_WORDS = [
    "the",
    "picture",
    "shows",
    "red",
    "green",
    "blue",
    "left",
    "right",
    "top",
    "bottom",
    "digit",
    "1",
    "2",
    "3",
    "4",
    "5",
    "and",
    "of",
    "a",
    "in",
    "is",
    "no",
    "yes",
]


@contextlib.contextmanager
def scraps() -> Iterator[Path]:
    """A folder for pictures, gone afterwards.

    Raises:
        UserError: there is no room for one.
    """
    with contextlib.ExitStack() as stack:
        try:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        except OSError as error:
            raise _no_room(error) from error
        yield folder


def _no_room(error: OSError) -> UserError:
    return UserError(
        f"cannot write temporary files ({error.strerror or error}): set TMPDIR to a folder with room"
    )


def probe_records(folder: Path, seed: int = 0) -> list[Record]:
    """The same records on every call, every second one with a picture, which is written to `folder`.

    Raises:
        UserError: it cannot be written.
    """
    chance = random.Random(seed)
    records = []
    for index in range(RECORDS):
        images: tuple[Path, ...] = ()
        mark = ""
        if index % 2 == 0:
            size = _SIZES[index // 2 % len(_SIZES)]
            path = folder / f"probe-{index}.png"
            picture = Image.frombytes("RGB", size, chance.randbytes(3 * size[0] * size[1]))
            try:
                picture.save(path)
            except OSError as error:
                raise _no_room(error) from error
            images, mark = (path,), f"{IMAGE_MARK}\n"
        turns = (
            Turn("user", f"{mark}{_sentence(chance, 8)}?"),
            Turn("assistant", f"{_sentence(chance, 12)}."),
        )
        records.append(Record(f"probe-{index}", images, turns))
    return records


def _sentence(chance: random.Random, words: int) -> str:
    return " ".join(chance.choice(_WORDS) for _ in range(words))
