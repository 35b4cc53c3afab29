"""GGUF for llama.cpp: the language model in one file, the vision tower in another (`mmproj`).

Quantized linears become Q4_0 or Q8_0 blocks written from the trained codes and scales
(`grace.export.gguf_blocks`); q and k keep their order, since llama.cpp rotates Qwen3's heads by halves as
transformers does. Everything else is bfloat16 (or as another's checkpoint had it), and the same numbers as
float32 where llama.cpp wants it: vectors, the patch convolution (cut along time into two) and the table of
positions. Names are those of llama.cpp's converter. `grace.export.gguf_read` is the way back.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig

from grace.checkpoint import copy_verbatim_files
from grace.errors import UserError
from grace.export.contents import Source, modules_of
from grace.export.directory import (
    Part,
    dense_dtype,
    dense_names,
    dense_pieces,
    deployed_config,
    deployed_dtype,
    one_thread,
    packed_entries,
    write_json,
)
from grace.export.gguf_blocks import BLOCK, BLOCK_BYTES, pack_blocks
from grace.export.gguf_metadata import (
    ARCHITECTURE,
    add_text,
    add_tokenizer,
    add_vision,
    require_supported,
)
from grace.export.gguf_names import patch_names, text_name, vision_name
from grace.export.gguf_read import GROUP_SIZE_KEY, read
from grace.export.progress import progress
from grace.export.stream import Entry, raw_bytes
from grace.models import foreign_names, qwen3vl

__all__ = ["LABEL", "read", "text_file", "write"]

LABEL = "GGUF"
_TYPES = {4: gguf.GGMLQuantizationType.Q4_0, 8: gguf.GGMLQuantizationType.Q8_0}
_FILE_TYPES = {4: gguf.LlamaFileType.MOSTLY_Q4_0, 8: gguf.LlamaFileType.MOSTLY_Q8_0}
_DENSE_TYPES = {
    torch.float32: gguf.GGMLQuantizationType.F32,
    torch.float16: gguf.GGMLQuantizationType.F16,
    torch.bfloat16: gguf.GGMLQuantizationType.BF16,
}


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of a file: its logical shape in torch's order, and the entry that makes its bytes."""

    name: str
    kind: gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    entry: Entry


def text_file(bits: int) -> str:
    """Name of the language model's file."""
    return f"model-{_TYPES[bits].name}.gguf"


def write(source: Source, directory: Path, max_shard_bytes: int | None = None) -> None:
    """Writes both files, and the small ones that a later reader wants; all but the README.

    Args:
        max_shard_bytes: cuts the language model's file as llama.cpp's own splits are cut.

    Raises:
        UserError: a model or tokenizer that llama.cpp would compute otherwise, or groups that are not
            whole blocks.
    """
    bits, config = source.qat.bits, qwen3vl.config_of(source.config, source.directory)
    require_supported(config)
    if source.qat.group_size % BLOCK:
        raise UserError(
            f"GGUF holds groups of whole blocks of {BLOCK} and this run has {source.qat.group_size}: "
            "export it with --format qat"
        )
    name = Path(str(source.qat.info.get("base_model") or "model")).name
    tensors = text_tensors(source, config)
    cut = max_shard_bytes is not None and sum(tensor.entry.nbytes for tensor in tensors) > max_shard_bytes
    text = gguf.GGUFWriter(
        directory / text_file(bits),
        gguf.MODEL_ARCH_NAMES[ARCHITECTURE],
        split_max_size=max_shard_bytes if cut and max_shard_bytes else 0,
    )
    add_text(text, config, name, _FILE_TYPES[bits])
    text.add_uint32(GROUP_SIZE_KEY, source.qat.group_size)
    add_tokenizer(text, config, source.directory)
    kind = {"bfloat16": gguf.LlamaFileType.MOSTLY_BF16, "float16": gguf.LlamaFileType.MOSTLY_F16}[
        deployed_dtype(source)
    ]
    file = directory / f"mmproj-{kind.name.removeprefix('MOSTLY_')}.gguf"
    vision = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.MMPROJ])
    add_vision(vision, config, name, kind, source.directory)
    with one_thread():
        _write_file(text, tensors, "gguf")
        _write_file(vision, vision_tensors(source, config), "gguf mmproj")
    write_json(directory / "config.json", deployed_config(source.config, deployed_dtype(source)))
    copy_verbatim_files(source.directory, directory)


# ---------------------------------------------------------------- tensors


def text_tensors(source: Source, config: PreTrainedConfig) -> list[GgufTensor]:
    """The language model's tensors in the order of the weight file."""
    bits = source.qat.bits
    tensors = []
    for name in dense_names(source):
        if foreign_names.renamed(name, foreign_names.GGUF_TEXT):
            tensors.append(_dense(source, name, text_name(name, config)))
    for name, (outputs, inputs) in modules_of(source).shapes.items():
        row_bytes = inputs // BLOCK * BLOCK_BYTES[bits]
        make = partial(_blocks, bits=bits)
        (entry,) = packed_entries(
            source, name, [Part("weight", torch.uint8, (outputs, row_bytes), make)], LABEL
        )
        tensors.append(GgufTensor(text_name(entry.name, config), _TYPES[bits], (outputs, inputs), entry))
    return sorted(tensors, key=lambda tensor: _natural(tensor.name))


def vision_tensors(source: Source, config: PreTrainedConfig) -> list[GgufTensor]:
    """The vision tower's tensors; the patch convolution is cut into its two moments."""
    tensors = []
    for name in dense_names(source):
        if not foreign_names.renamed(name, foreign_names.GGUF_VISION):
            continue
        if foreign_names.is_patch_convolution(name):
            tensors += _patch_tensors(source, name)
        else:
            tensors.append(_dense(source, name, vision_name(name, config)))
    return sorted(tensors, key=lambda tensor: _natural(tensor.name))


def _blocks(weight: Any, bits: int) -> Tensor:
    return pack_blocks(weight.codes_OI, weight.scales_OG, bits)


def _dense(source: Source, name: str, stored_name: str) -> GgufTensor:
    """A tensor that is not quantized: matrices as they are, the rest as float32."""
    shape = source.weights.shapes[name]
    wide = len(shape) < 2 or foreign_names.is_position_table(name)
    dtype = torch.float32 if wide else dense_dtype(source, name)
    if dtype not in _DENSE_TYPES:
        raise UserError(
            f"GGUF cannot be written: {name} is {str(dtype).removeprefix('torch.')}; use --format qat"
        )
    entry = Entry(stored_name, dtype, shape, partial(dense_pieces, source, name, dtype))
    return GgufTensor(stored_name, _DENSE_TYPES[dtype], shape, entry)


def _patch_tensors(source: Source, name: str) -> list[GgufTensor]:
    outputs, channels, _, height, width = source.weights.shapes[name]
    shape = (outputs, channels, height, width)

    def moment(time: int) -> Iterator[Tensor]:
        return (piece[:, :, time] for piece in dense_pieces(source, name, torch.float32))

    return [
        GgufTensor(
            stored,
            gguf.GGMLQuantizationType.F32,
            shape,
            Entry(stored, torch.float32, shape, partial(moment, time)),
        )
        for time, stored in enumerate(patch_names())
    ]


def _natural(name: str) -> list[tuple[int, int | str]]:
    """Sorts block 2 before block 10."""
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in name.split(".")]


# ---------------------------------------------------------------- files


class _Streamed:
    """What the gguf writer needs of an array, without ever holding one."""

    def __init__(self, entry: Entry, advance: Callable[[int], None]):
        self.entry, self.advance, self.nbytes = entry, advance, entry.nbytes

    def tofile(self, file: Any) -> None:
        for piece in self.entry.pieces():
            file.write(raw_bytes(piece).data)
            self.advance(piece.nbytes)


def _write_file(writer: gguf.GGUFWriter, tensors: list[GgufTensor], label: str) -> None:
    for tensor in tensors:
        writer.add_tensor_info(
            tensor.name, tensor.shape, np.dtype(np.float32), tensor.entry.nbytes, raw_dtype=tensor.kind
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    with progress(label, sum(tensor.entry.nbytes for tensor in tensors)) as advance:
        for tensor in tensors:
            streamed: Any = _Streamed(tensor.entry, advance)
            writer.write_tensor_data(streamed)
    writer.close()
