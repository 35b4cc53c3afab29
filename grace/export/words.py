"""Codes in 32-bit words along the input, low bits first: the layout that compressed-tensors and MLX share.

Element i of a row lies at bit `bits * i`, counted from the low end of its word, as code + 2^(bits-1):

    4 bits:  word = c0 | c1 << 4 | ... | c7 << 28      c = q + 8
    8 bits:  word = c0 | c1 << 8 | c2 << 16 | c3 << 24  c = q + 128

Both directions are exact integer work. Shape suffixes: O output features, I input features,
W words (= I * bits / 32).
"""

import sys

import torch
from torch import Tensor

BITS = (4, 8)
_BLOCK = 2**20  # codes per step: what a core's cache holds with its temporaries


def pack_words(codes_OI: Tensor, bits: int) -> Tensor:
    """int8 codes [O, I] to int32 words [O, W].

    Raises:
        ValueError: `bits` is neither 4 nor 8, rows that do not fill whole words, or codes out of range.
    """
    outputs, inputs = _check(codes_OI, bits)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    least, most = (int(value) for value in codes_OI.aminmax())
    if least < low or most > high:
        raise ValueError(f"codes span [{least}, {most}], not within the [{low}, {high}] of {bits} bits")
    words_OW = torch.empty(outputs, inputs * bits // 32, dtype=torch.int32)
    step = max(1, _BLOCK // inputs)
    for row in range(0, outputs, step):
        block = codes_OI[row : row + step].contiguous().view(torch.uint8)
        words_OW[row : row + step] = _nibbles(block + 8) if bits == 4 else _as_words(block ^ 128)
    return words_OW


def unpack_words(words_OW: Tensor, bits: int) -> Tensor:
    """Inverse of `pack_words`.

    Raises:
        ValueError: not int32 words, or `bits` neither 4 nor 8.
    """
    if words_OW.dtype != torch.int32 or words_OW.ndim != 2 or bits not in BITS:
        raise ValueError(f"expected int32 words of 4- or 8-bit codes, not {words_OW.dtype} of {bits} bits")
    bytes_OB = _as_bytes(words_OW)
    if bits == 8:
        return (bytes_OB ^ 128).view(torch.int8)
    pairs_OB2 = torch.stack([bytes_OB & 15, bytes_OB >> 4], -1)
    return (pairs_OB2.view(len(words_OW), -1) - 8).view(torch.int8)


def _check(codes_OI: Tensor, bits: int) -> tuple[int, int]:
    if bits not in BITS:
        raise ValueError(f"holds 4 or 8 bits, not {bits}")
    if codes_OI.dtype != torch.int8 or codes_OI.ndim != 2 or not codes_OI.numel():
        raise ValueError(f"codes must be int8 [out, in], not {codes_OI.dtype} {tuple(codes_OI.shape)}")
    outputs, inputs = codes_OI.shape
    if inputs * bits % 32:
        raise ValueError(f"rows of {inputs} codes of {bits} bits do not fill whole words")
    return outputs, inputs


def _nibbles(values_OI: Tensor) -> Tensor:
    """Two neighbours to a byte, the first in the low half, by whole-word steps; values in [0, 15]."""
    if sys.byteorder != "little":
        return _as_words(values_OI[:, 0::2] | (values_OI[:, 1::2] << 4))
    # Flat, since a matrix of one row may claim any stride.
    pairs = values_OI.reshape(-1).view(torch.int16)  # second << 8 | first
    return ((pairs >> 4) | pairs).to(torch.uint8).view(torch.int32).view(len(values_OI), -1)


def _as_words(bytes_OB: Tensor) -> Tensor:
    """Four bytes, low first, as one int32."""
    if sys.byteorder != "little":
        bytes_OB = bytes_OB.view(len(bytes_OB), -1, 4).flip(-1).reshape(bytes_OB.shape)
    return bytes_OB.reshape(-1).view(torch.int32).view(len(bytes_OB), -1)


def _as_bytes(words_OW: Tensor) -> Tensor:
    """int32 as its bytes, low first, along the row."""
    bytes_OB = words_OW.reshape(-1).view(torch.uint8).view(len(words_OW), -1)
    if sys.byteorder != "little":
        bytes_OB = bytes_OB.view(len(bytes_OB), -1, 4).flip(-1).reshape(bytes_OB.shape)
    return bytes_OB
