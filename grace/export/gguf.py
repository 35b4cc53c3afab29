"""GGUF for llama.cpp: the language model in one file, the vision tower in another (`mmproj`).

Quantized linears become Q4_0 or Q8_0 blocks written from the trained codes and scales
(`grace.export.gguf_blocks`); q and k keep their order, since llama.cpp rotates Qwen3's heads by halves as
transformers does. Everything else is bfloat16, or the same numbers as float32 where llama.cpp wants it:
vectors, the patch convolution (cut along time into two) and the table of positions. Names are those of
llama.cpp's converter.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig

from grace.checkpoint import copy_verbatim_files
from grace.errors import UserError
from grace.export.directory import (
    Part,
    Stored,
    dense_names,
    dense_pieces,
    module_shapes,
    one_thread,
    packed_entries,
    write_json,
)
from grace.export.gguf_blocks import BLOCK, BLOCK_BYTES, pack_blocks, unpack_blocks
from grace.export.gguf_metadata import (
    ARCHITECTURE,
    add_text,
    add_tokenizer,
    add_vision,
    require_supported,
)
from grace.export.progress import progress
from grace.export.source import Source
from grace.export.stream import Entry, raw_bytes
from grace.models import foreign_names, qwen3vl

LABEL = "GGUF"
VISION_FILE = "mmproj-BF16.gguf"
_TYPES = {4: gguf.GGMLQuantizationType.Q4_0, 8: gguf.GGMLQuantizationType.Q8_0}
_FILE_TYPES = {4: gguf.LlamaFileType.MOSTLY_Q4_0, 8: gguf.LlamaFileType.MOSTLY_Q8_0}
_SUFFIXES = (".weight", ".bias")


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
    bits, config = source.qat.bits, qwen3vl.config_for(str(source.directory))
    require_supported(config)
    if source.qat.group_size % BLOCK:
        raise UserError(
            f"GGUF holds groups of whole blocks of {BLOCK} and this run has {source.qat.group_size}: "
            "export it with --format qat"
        )
    name = Path(str(source.qat.info.get("base_model") or "model")).name
    text = gguf.GGUFWriter(
        directory / text_file(bits), gguf.MODEL_ARCH_NAMES[ARCHITECTURE], split_max_size=max_shard_bytes or 0
    )
    add_text(text, config, name, _FILE_TYPES[bits])
    add_tokenizer(text, config, source.directory)
    vision = gguf.GGUFWriter(directory / VISION_FILE, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.MMPROJ])
    add_vision(vision, config, name, source.directory)
    with one_thread():
        _write_file(text, text_tensors(source, config), "gguf")
        _write_file(vision, vision_tensors(source, config), "gguf mmproj")
    write_json(directory / "config.json", dict(source.config))
    copy_verbatim_files(source.directory, directory)


def read(source: Source, directory: Path) -> Stored:
    """The written files in the terms of the base model, by the gguf package's reader."""
    bits, config = source.qat.bits, qwen3vl.config_for(str(source.directory))
    files = [*sorted(directory.glob("model-*.gguf")), directory / VISION_FILE]
    stored = {tensor.name: tensor for path in files for tensor in gguf.GGUFReader(path).tensors}

    def codes(name: str) -> tuple[Tensor, Tensor]:
        tensor = stored[text_name(f"{name}.weight", config)]
        if tensor.tensor_type != _TYPES[bits]:
            raise ValueError(f"{name} is {tensor.tensor_type.name}")
        return unpack_blocks(torch.from_numpy(np.array(tensor.data)), bits, source.qat.group_size)

    def dense(name: str) -> Tensor:
        shape = source.weights.shapes[name]
        if foreign_names.is_patch_convolution(name):
            halves = [_numbers(stored[half]) for half in _patch_names()]
            return torch.stack([half.view(*shape[:2], *shape[3:]) for half in halves], 2)
        return _numbers(stored[_dense_name(name, config)]).view(shape)

    return Stored(codes, dense)


# ---------------------------------------------------------------- tensors


def text_tensors(source: Source, config: PreTrainedConfig) -> list[GgufTensor]:
    """The language model's tensors in the order of the weight file."""
    bits = source.qat.bits
    tensors = []
    for name in dense_names(source):
        if foreign_names.renamed(name, foreign_names.GGUF_TEXT):
            tensors.append(_dense(source, name, text_name(name, config)))
    for name, (outputs, inputs) in module_shapes(source).items():
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
    """A tensor that is not quantized: matrices as bfloat16, the rest as float32."""
    shape = source.weights.shapes[name]
    wide = len(shape) < 2 or foreign_names.is_position_table(name)
    dtype = torch.float32 if wide else torch.bfloat16
    kind = gguf.GGMLQuantizationType.F32 if wide else gguf.GGMLQuantizationType.BF16
    entry = Entry(stored_name, dtype, shape, partial(dense_pieces, source, name, dtype))
    return GgufTensor(stored_name, kind, shape, entry)


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
        for time, stored in enumerate(_patch_names())
    ]


# ---------------------------------------------------------------- names


def text_name(name: str, config: PreTrainedConfig) -> str:
    """llama.cpp's name of a tensor of the language model."""
    text: Any = config.text_config
    return _mapped(name, foreign_names.GGUF_TEXT, _name_map(ARCHITECTURE, text.num_hidden_layers))


def vision_name(name: str, config: PreTrainedConfig) -> str:
    """llama.cpp's name of a tensor of the vision tower, the patch convolution's weight excepted."""
    vision: Any = config.vision_config
    merger = foreign_names.gguf_merger_tensor(name, vision.deepstack_visual_indexes)
    names = _name_map(gguf.MODEL_ARCH.MMPROJ, vision.depth)
    return merger or _mapped(name, foreign_names.GGUF_VISION, names)


@cache
def _name_map(architecture: gguf.MODEL_ARCH, layers: int) -> gguf.TensorNameMap:
    """The package builds it anew at every call, with the names of every model there is."""
    return gguf.get_tensor_name_map(architecture, layers)


def _mapped(name: str, prefixes: foreign_names.Prefixes, names: gguf.TensorNameMap) -> str:
    found = names.get_name(foreign_names.renamed(name, prefixes) or name, try_suffixes=_SUFFIXES)
    if found is None:
        raise UserError(f"GGUF cannot be written: llama.cpp has no tensor for {name}; use --format qat")
    return found


def _dense_name(name: str, config: PreTrainedConfig) -> str:
    is_text = foreign_names.renamed(name, foreign_names.GGUF_TEXT) is not None
    return text_name(name, config) if is_text else vision_name(name, config)


def _patch_names() -> tuple[str, str]:
    stem = gguf.TENSOR_NAMES[gguf.MODEL_TENSOR.V_ENC_EMBD_PATCH]
    return f"{stem}.weight", f"{stem}.weight.1"


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


def _numbers(tensor: gguf.ReaderTensor) -> Tensor:
    """A float tensor as it was stored, flat."""
    data = torch.from_numpy(np.array(tensor.data))
    return (
        data.view(torch.bfloat16) if tensor.tensor_type == gguf.GGMLQuantizationType.BF16 else data
    ).flatten()
