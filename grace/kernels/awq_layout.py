"""Where AWQ keeps its 4-bit values inside int32 words: one description, used by every reader and writer.

Nibble i, counted from the low bits, of word c in a row holds column 8c + NIBBLE_COLUMNS[i].
Everything here is exact integer work and whole-tensor vector operations.

Shape suffixes: R rows, C columns, W words (= C / 8).
"""

import sys

import torch
from torch import Tensor

NIBBLE_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)
PER_WORD = 8
# Eight zero points of 8 in one word, as a signed 32-bit integer.
ZERO_WORD = 0x88888888 - (1 << 32)
# A byte holds nibbles 2j and 2j + 1: the columns of the four low and of the four high nibbles.
_LOW_COLUMNS = NIBBLE_COLUMNS[0::2]  # 0, 4, 1, 5
_HIGH_COLUMNS = NIBBLE_COLUMNS[1::2]  # 2, 6, 3, 7
# Bytes per step on a CPU: they stay in a core's cache.
_CPU_BLOCK = 2**15


def pack_transposed(values_CR: Tensor) -> Tensor:
    """Packs 4-bit values given column by column.

    Working on the transpose keeps every step a contiguous vector operation; only the packed words,
    an eighth of the values, are transposed.

    Args:
        values_CR: uint8 in [0, 15], C a multiple of 8.

    Returns:
        int32 [R, C / 8].
    """
    columns, rows = values_CR.shape
    grouped_W8R = values_CR.reshape(columns // PER_WORD, PER_WORD, rows)
    packed_RW = torch.empty(rows, columns // PER_WORD, dtype=torch.int32, device=values_CR.device)
    step = max(1, _CPU_BLOCK // max(1, rows)) if values_CR.device.type == "cpu" else max(1, columns)
    for start in range(0, columns // PER_WORD, step):
        block_W8R = grouped_W8R[start : start + step]
        bytes_WR4 = torch.stack(
            [
                block_W8R[:, low] | (block_W8R[:, high] << 4)
                for low, high in zip(_LOW_COLUMNS, _HIGH_COLUMNS, strict=True)
            ],
            -1,
        )
        packed_RW[:, start : start + step] = _as_words(bytes_WR4).t()
    return packed_RW


def unpack_transposed(words_RW: Tensor) -> Tensor:
    """Inverse of `pack_transposed`: int32 [R, W] to uint8 values [8 W, R]."""
    rows, words = words_RW.shape
    bytes_WR4 = _as_bytes(words_RW.t().contiguous())
    values_W8R = torch.empty(words, PER_WORD, rows, dtype=torch.uint8, device=words_RW.device)
    for byte, (low, high) in enumerate(zip(_LOW_COLUMNS, _HIGH_COLUMNS, strict=True)):
        values_W8R[:, low] = bytes_WR4[..., byte] & 15
        values_W8R[:, high] = bytes_WR4[..., byte] >> 4
    return values_W8R.view(words * PER_WORD, rows)


def _as_words(bytes_XY4: Tensor) -> Tensor:
    """Four bytes, low first, as one int32."""
    if sys.byteorder != "little":
        bytes_XY4 = bytes_XY4.flip(-1)
    return bytes_XY4.contiguous().view(torch.int32).squeeze(-1)


def _as_bytes(words_XY: Tensor) -> Tensor:
    """An int32 as its four bytes, low first, in a new last dimension."""
    bytes_XY4 = words_XY.unsqueeze(-1).view(torch.uint8)
    return bytes_XY4 if sys.byteorder == "little" else bytes_XY4.flip(-1)
