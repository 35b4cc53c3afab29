"""Pictures of the small world: scanned digits, coloured, in a 3 x 3 grid of 96 x 96 pixels.

The scans are real: scikit-learn's 1,797 handwritten digits of 8 x 8 grey levels. They are split
by scan, so a digit seen in training is never seen in validation or test.

Shape suffixes: K scans, S side of an enlarged scan, H height, W width, C colour channel.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

CELLS = (
    "top left",
    "top middle",
    "top right",
    "middle left",
    "centre",
    "middle right",
    "bottom left",
    "bottom middle",
    "bottom right",
)
COLOURS = {
    "red": (235, 45, 45),
    "green": (50, 190, 70),
    "blue": (70, 110, 255),
    "yellow": (245, 230, 60),
    "purple": (190, 70, 225),
    "orange": (255, 140, 20),
}
COLOUR_NAMES = tuple(COLOURS)
COLOUR_NOISE = 20.0  # standard deviation per channel: an orange may look red or yellow
EMPTY = -1
CELL_PIXELS = 32
ENLARGED = (28, 30)  # sides of a scan in a scene, in pixels
TEST_SCANS, VALIDATION_SCANS, STUDENT_SCANS = 350, 250, 450


@dataclass(frozen=True)
class Scene:
    """What is where: per cell, row by row, an index into COLOUR_NAMES and a digit, or EMPTY in both.

    A scene has 3 x 3 cells; a close-up has one.
    """

    colours: tuple[int, ...]
    digits: tuple[int, ...]

    @property
    def occupied(self) -> list[int]:
        """Cells that hold a digit."""
        return [cell for cell, digit in enumerate(self.digits) if digit != EMPTY]

    @property
    def grid(self) -> int:
        """Cells along a side."""
        return math.isqrt(len(self.digits))

    def close_up(self, cell: int) -> "Scene":
        """The scene that shows one cell of this one alone."""
        return Scene((self.colours[cell],), (self.digits[cell],))


def random_scene(rng: np.random.Generator) -> Scene:
    """5 to 9 digits in random cells, each of a random colour."""
    cells = rng.permutation(len(CELLS))[: rng.integers(5, 10)]
    colours, digits = np.full(len(CELLS), EMPTY), np.full(len(CELLS), EMPTY)
    colours[cells] = rng.integers(len(COLOURS), size=len(cells))
    digits[cells] = rng.integers(10, size=len(cells))
    return Scene(tuple(colours.tolist()), tuple(digits.tolist()))


def scan_pools(seed: int) -> dict[str, np.ndarray]:
    """Indices of the scans each part of the world may use.

    `test`, `validation` and `teacher` are disjoint; `student` is a part of `teacher`, so the
    teacher has seen handwriting that the student has not.
    """
    order = np.random.default_rng([seed, 0]).permutation(len(_digits()[1]))
    held_out = TEST_SCANS + VALIDATION_SCANS
    return {
        "test": order[:TEST_SCANS],
        "validation": order[TEST_SCANS:held_out],
        "teacher": order[held_out:],
        "student": order[held_out : held_out + STUDENT_SCANS],
    }


class Painter:
    """Paints scenes with the scans of one pool."""

    def __init__(self, pool: np.ndarray):
        labels = _digits()[1]
        self.scans_of = [pool[labels[pool] == digit] for digit in range(10)]

    def paint(self, scene: Scene, rng: np.random.Generator) -> Image.Image:
        """One picture of the scene; handwriting, size, place, brightness and ground vary with `rng`."""
        side = scene.grid * CELL_PIXELS
        ground = rng.integers(8, 40) + rng.integers(0, 12, size=(side // 8, side // 8, 3))
        canvas_HWC = ground.repeat(8, axis=0).repeat(8, axis=1).astype(np.float32)
        chance = rng.random((len(scene.digits), 5))
        for cell in scene.occupied:
            which, size, down, right, light = chance[cell]
            scans = self.scans_of[scene.digits[cell]]
            enlarged = _enlarged(ENLARGED[int(size * len(ENLARGED))])
            ink_SS = enlarged[scans[int(which * len(scans))]]
            room = CELL_PIXELS - len(ink_SS) + 1
            top = cell // scene.grid * CELL_PIXELS + int(down * room)
            left = cell % scene.grid * CELL_PIXELS + int(right * room)
            spot_SSC = canvas_HWC[top : top + len(ink_SS), left : left + len(ink_SS)]
            colour = np.array(COLOURS[COLOUR_NAMES[scene.colours[cell]]]) * (0.8 + 0.2 * light)
            colour = np.clip(colour + rng.normal(scale=COLOUR_NOISE, size=3), 0, 255)
            spot_SSC += ink_SS[:, :, None] * (colour.astype(np.float32) - spot_SSC)
        return Image.fromarray((canvas_HWC + 0.5).astype(np.uint8))


@functools.cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    """All scans as [K, 8, 8] in 0..1 and the digit each one shows."""
    from sklearn.datasets import load_digits  # slow to import, and only needed to build a world

    data: Any = load_digits()
    return (data.images / 16).astype(np.float32), data.target


@functools.cache
def _enlarged(side: int) -> np.ndarray:
    """All scans enlarged to [K, side, side], ink between 0 and 1."""
    scans = [Image.fromarray(scan).resize((side, side), Image.Resampling.BICUBIC) for scan in _digits()[0]]
    return np.clip(np.stack([np.asarray(scan) for scan in scans]), 0, 1)
