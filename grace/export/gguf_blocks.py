"""GGUF's Q4_0 and Q8_0 blocks, written from trained codes and scales: nothing is quantized here.

A block holds 32 neighbouring weights of a row behind one fp16 scale d; a group of g weights makes g / 32
blocks with the same d:

    Q4_0, 18 bytes:  d, then byte i = c[i] | c[i + 16] << 4, i < 16      W = d * (c - 8),  c = q + 8
    Q8_0, 34 bytes:  d, then q[0..31] as int8                            W = d * q

A bfloat16 scale in [2^-14, 2^15] has the same value in fp16 (DESIGN section 4, "Why snap").
Shape suffixes: O output features, I input features, G groups, B blocks (= I / 32), Y bytes of a block.
"""

import torch
from torch import Tensor

BLOCK = 32
BLOCK_BYTES = {4: 18, 8: 34}
_STEP = 2**20  # codes per step: what a core's cache holds with its temporaries


def pack_blocks(codes_OI: Tensor, scales_OG: Tensor, bits: int) -> Tensor:
    """uint8 [O, B * Y]: the rows of a Q4_0 (4 bits) or Q8_0 (8 bits) tensor.

    Args:
        codes_OI: int8 within the range of `bits`.
        scales_OG: bfloat16, each exact in fp16.

    Raises:
        ValueError: types, shapes or values that the format cannot hold exactly.
    """
    _check(codes_OI, scales_OG, bits)
    outputs, inputs = codes_OI.shape
    blocks = inputs // BLOCK
    scales_OB = _fp16(scales_OG).repeat_interleave(blocks // scales_OG.shape[1], dim=1)
    packed_OBY = torch.empty(outputs, blocks, BLOCK_BYTES[bits], dtype=torch.uint8)
    packed_OBY[..., :2] = scales_OB.unsqueeze(-1).view(torch.uint8)
    step = max(1, _STEP // inputs)
    for row in range(0, outputs, step):
        block = codes_OI[row : row + step].contiguous().view(torch.uint8).view(-1, blocks, BLOCK)
        if bits == 4:
            block = block + 8
            block = block[..., :16] | (block[..., 16:] << 4)
        packed_OBY[row : row + step, :, 2:] = block
    return packed_OBY.view(outputs, -1)


def unpack_blocks(packed_OY: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor]:
    """Inverse of `pack_blocks`: codes int8 [O, I] and scales bfloat16 [O, G].

    Raises:
        ValueError: not whole blocks, or blocks of one group whose scales differ or do not fit bfloat16.
    """
    if bits not in BLOCK_BYTES or packed_OY.dtype != torch.uint8 or packed_OY.shape[1] % BLOCK_BYTES[bits]:
        raise ValueError(f"{tuple(packed_OY.shape)} {packed_OY.dtype} are not rows of {bits}-bit blocks")
    outputs = len(packed_OY)
    packed_OBY = packed_OY.reshape(outputs, -1, BLOCK_BYTES[bits])
    scales_OB = packed_OBY[..., :2].contiguous().view(torch.float16).squeeze(-1)
    scales_OGB = scales_OB.reshape(outputs, -1, group_size // BLOCK)
    scales_OG = scales_OGB[..., 0].to(torch.bfloat16)
    if not torch.equal(scales_OGB.float(), scales_OG.float().unsqueeze(-1).expand_as(scales_OGB)):
        raise ValueError("the scales of a group's blocks differ, or bfloat16 cannot hold them")
    values = packed_OBY[..., 2:]
    if bits == 4:
        values = torch.cat([values & 15, values >> 4], -1) - 8
    return values.reshape(outputs, -1).contiguous().view(torch.int8), scales_OG


def _check(codes_OI: Tensor, scales_OG: Tensor, bits: int) -> None:
    if bits not in BLOCK_BYTES:
        raise ValueError(f"holds 4 or 8 bits, not {bits}")
    if codes_OI.dtype != torch.int8 or codes_OI.ndim != 2 or not codes_OI.numel():
        raise ValueError(f"codes must be int8 [out, in], not {codes_OI.dtype} {tuple(codes_OI.shape)}")
    outputs, inputs = codes_OI.shape
    groups = scales_OG.shape[-1]
    if scales_OG.dtype != torch.bfloat16 or scales_OG.shape != (outputs, groups) or inputs % groups:
        raise ValueError(f"scales must be bfloat16 [{outputs}, groups], not {tuple(scales_OG.shape)}")
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
