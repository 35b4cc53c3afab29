"""GGUF's Q4_0 and Q8_0 blocks, written from trained codes and scales: nothing is quantized here.

A block holds 32 neighbouring weights of a row behind one fp16 scale d; a group of g weights makes g / 32
blocks with the same d:

    Q4_0, 18 bytes:  d, then byte i = c[i] | c[i + 16] << 4, i < 16      W = d * (c - 8),  c = q + 8
    Q8_0, 34 bytes:  d, then q[0..31] as int8                            W = d * q

A bfloat16 scale in [2^-14, 2^15] has the same value in fp16 (DESIGN section 4, "Why snap").
Shape suffixes: O output features, I input features, G groups, B blocks (= I / 32), Y bytes of a block.
"""

import numpy as np
import torch
from torch import Tensor

BLOCK = 32
SCALE_TYPES = (torch.bfloat16, torch.float16)
BLOCK_BYTES = {4: 18, 8: 34}
_STEP = 2**20  # codes per step: what a core's cache holds with its temporaries


def pack_blocks(codes_OI: Tensor, scales_OG: Tensor, bits: int) -> Tensor:
    """uint8 [O, B * Y]: the rows of a Q4_0 (4 bits) or Q8_0 (8 bits) tensor.

    Args:
        codes_OI: int8 within the range of `bits`.
        scales_OG: bfloat16 or fp16, each exact in fp16.

    Raises:
        ValueError: types, shapes or values that the format cannot hold exactly.
    """
    _check(codes_OI, scales_OG, bits)
    outputs, inputs = codes_OI.shape
    groups = scales_OG.shape[1]
    # Blocks as records: one copy of a whole field each, where a tensor would copy byte by byte.
    field_bytes = BLOCK_BYTES[bits] - 2
    packed = np.empty((outputs, inputs // BLOCK), dtype=[("d", "<f2"), ("codes", f"V{field_bytes}")])
    packed["d"].reshape(outputs, groups, -1)[...] = _fp16(scales_OG).numpy()[..., None]
    step = max(1, _STEP // inputs)
    for row in range(0, outputs, step):
        rows = codes_OI[row : row + step].contiguous()
        stored = (_nibbles(rows) if bits == 4 else rows).numpy()
        packed["codes"][row : row + step] = stored.reshape(len(rows), -1).view(f"V{field_bytes}")
    return torch.from_numpy(packed.view(np.uint8))


def _nibbles(codes_OI: Tensor) -> Tensor:
    """uint8: of each block, weight i in the low half of byte i and weight i + 16 in the high one."""
    words_N4 = (codes_OI.view(torch.uint8) + 8).view(torch.int64).view(-1, 4)  # eight weights each, in 0..15
    halves_N2 = torch.empty(len(words_N4), 2, dtype=torch.int64)
    for half in range(2):
        torch.bitwise_or(words_N4[:, half], words_N4[:, half + 2] << 4, out=halves_N2[:, half])
    return halves_N2.view(torch.uint8)


def unpack_codes(packed_OY: Tensor, bits: int) -> Tensor:
    """The codes int8 [O, I] of `pack_blocks`.

    Raises:
        ValueError: not whole blocks.
    """
    values = _blocks(packed_OY, bits)[..., 2:]
    if bits == 4:
        values = torch.cat([values & 15, values >> 4], -1) - 8
    return values.reshape(len(packed_OY), -1).contiguous().view(torch.int8)


def unpack_scales(packed_OY: Tensor, bits: int, group_size: int) -> Tensor:
    """The scales fp16 [O, G] of `pack_blocks`.

    Raises:
        ValueError: not whole blocks, or blocks of one group whose scales differ.
    """
    scales_OB = _blocks(packed_OY, bits)[..., :2].contiguous().view(torch.float16).squeeze(-1)
    scales_OGB = scales_OB.reshape(len(packed_OY), -1, group_size // BLOCK)
    scales_OG = scales_OGB[..., 0].contiguous()
    if not torch.equal(scales_OGB, scales_OG.unsqueeze(-1).expand_as(scales_OGB)):
        raise ValueError("the scales of a group's blocks differ")
    return scales_OG


def _blocks(packed_OY: Tensor, bits: int) -> Tensor:
    if bits not in BLOCK_BYTES or packed_OY.dtype != torch.uint8 or packed_OY.shape[1] % BLOCK_BYTES[bits]:
        raise ValueError(f"{tuple(packed_OY.shape)} {packed_OY.dtype} are not rows of {bits}-bit blocks")
    return packed_OY.reshape(len(packed_OY), -1, BLOCK_BYTES[bits])


def _check(codes_OI: Tensor, scales_OG: Tensor, bits: int) -> None:
    if bits not in BLOCK_BYTES:
        raise ValueError(f"holds 4 or 8 bits, not {bits}")
    if codes_OI.dtype != torch.int8 or codes_OI.ndim != 2 or not codes_OI.numel():
        raise ValueError(f"codes must be int8 [out, in], not {codes_OI.dtype} {tuple(codes_OI.shape)}")
    outputs, inputs = codes_OI.shape
    groups = scales_OG.shape[-1]
    if scales_OG.dtype not in SCALE_TYPES or scales_OG.shape != (outputs, groups) or inputs % groups:
        raise ValueError(f"scales must be bfloat16 or fp16 [{outputs}, groups], not {tuple(scales_OG.shape)}")
    if inputs // groups % BLOCK:
        raise ValueError(f"groups of {inputs // groups} are not whole blocks of {BLOCK}")
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    least, most = (int(value) for value in codes_OI.aminmax())
    if least < low or most > high:
        raise ValueError(f"codes span [{least}, {most}], not within the [{low}, {high}] of {bits} bits")


def _fp16(scales_OG: Tensor) -> Tensor:
    halves = scales_OG.to(torch.float16)
    if not bool(halves.isfinite().all()) or not torch.equal(halves.float(), scales_OG.float()):
        raise ValueError("scales must be finite and exact in fp16: bfloat16 values within [2^-14, 2^15]")
    return halves
