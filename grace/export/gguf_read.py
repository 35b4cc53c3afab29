"""GGUF directories read back: GRACE's own, the language model (in one file or split) and its `mmproj`.

Nothing is mapped and no library sees the files before `grace.export.checked_gguf` has. The group size is in
the metadata, under a key of GRACE's own; without it every block of 32 is a group, which is as exact.

What llama.cpp's own tools quantized has scales below zero, and is refused.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grace.checked_files import MEND, DamagedFile, damage_of, shown
from grace.checkpoint import QatState
from grace.errors import UserError
from grace.export.checked_gguf import GgufEntry, GgufHeader, gguf_header
from grace.export.contents import (
    NARROW,
    Modules,
    Source,
    holds,
    require_group_size,
    without_packing,
)
from grace.export.gguf_blocks import BLOCK, BLOCK_BYTES, unpack_codes, unpack_scales
from grace.export.gguf_names import dense_name, patch_names
from grace.export.stream import read_pieces, read_tensor
from grace.models import foreign_names, qwen3vl

GROUP_SIZE_KEY = "grace.group_size"
_BITS = {"Q4_0": 4, "Q8_0": 8}
_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def read(directory: Path, config: Mapping[str, Any]) -> Source:
    """The files of a directory in the terms of the base model.

    Raises:
        UserError: damaged, incomplete, or quantized otherwise.
    """
    stored = without_packing(config)
    parsed = qwen3vl.config_of(stored, directory)
    with damage_of(directory, MEND):
        headers = _headers(directory)
        entries: dict[str, GgufEntry] = {}
        for header in headers:
            twice = sorted(set(entries) & set(header.tensors))
            if twice:
                raise DamagedFile(f"{shown(twice[0])} is in two files")
            entries |= header.tensors
        kinds = {entry.kind for entry in entries.values() if entry.kind in _BITS}
        if len(kinds) != 1:
            raise UserError(
                f"{directory} holds {' and '.join(sorted(kinds)) or 'no'} blocks: GRACE reads Q4_0 or Q8_0"
            )
        bits = _BITS[kinds.pop()]
        given = [header.metadata[GROUP_SIZE_KEY] for header in headers if GROUP_SIZE_KEY in header.metadata]
        group_size = require_group_size(given[0] if given else BLOCK, {})
        if group_size % BLOCK:
            raise DamagedFile(f"groups of {group_size} are not whole blocks of {BLOCK}")
        quantized, dense = _by_base_name(entries, parsed)
        shapes = {name: _matrix(name, entry) for name, entry in quantized.items()}
        require_group_size(group_size, shapes)
        weights = _Dense(dense)

    def blocks(name: str) -> Tensor:
        entry = quantized[name]
        row_bytes = entry.shape[1] // BLOCK * BLOCK_BYTES[bits]
        return read_tensor(entry.path, entry.start, (entry.shape[0], row_bytes), torch.uint8)

    modules = Modules(
        directory,
        shapes,
        bits,
        group_size,
        lambda name: unpack_codes(blocks(name), bits),
        lambda name: (unpack_scales(blocks(name), bits, group_size), None),
    )
    names = [header.metadata.get("general.name") for header in headers]
    info = {"base_model": next((name for name in names if isinstance(name, str)), None)}
    return Source(directory, QatState(bits, group_size, modules, info), stored, weights, "gguf")


def _headers(directory: Path) -> list[GgufHeader]:
    """All files of a directory, the language model's parts complete, and one vision tower.

    Raises:
        DamagedFile: a damaged file, or another set of files.
    """
    headers = [gguf_header(path) for path in sorted(directory.glob("*.gguf"))]
    kinds = [header.metadata.get("general.architecture") == "clip" for header in headers]
    towers = [header for header, is_tower in zip(headers, kinds, strict=True) if is_tower]
    texts = [header for header, is_tower in zip(headers, kinds, strict=True) if not is_tower]
    if len(towers) != 1:
        raise DamagedFile(f"{len(towers)} mmproj files, where one is the vision tower")
    counts = {header.metadata.get("split.count", 1) for header in texts}
    numbers = sorted(header.metadata.get("split.no", 0) for header in texts)
    if counts != {len(texts)} or numbers != list(range(len(texts))):
        raise DamagedFile(f"{len(texts)} files of a language model that is split into {sorted(counts)}")
    return [*texts, *towers]


def _by_base_name(
    entries: Mapping[str, GgufEntry], config: Any
) -> tuple[dict[str, GgufEntry], dict[str, tuple[GgufEntry, ...]]]:
    """Quantized linears by module, and the other tensors by name; a convolution has an entry per moment.

    Raises:
        KeyError: a tensor is missing.
        DamagedFile: one belongs to no tensor of the model.
    """
    quantized: dict[str, GgufEntry] = {}
    dense: dict[str, tuple[GgufEntry, ...]] = {}
    used: set[str] = set()
    for name in qwen3vl.parameter_shapes(config):
        patch = foreign_names.is_patch_convolution(name)
        there = patch_names() if patch else (dense_name(name, config),)
        used.update(there)
        found = tuple(entries[part] for part in there)
        if found[0].kind in _BITS:
            quantized[name.removesuffix(".weight")] = found[0]
        else:
            dense[name] = found
    unknown = sorted(set(entries) - used)
    if unknown:
        raise DamagedFile(f"no tensor of the model is called {shown(unknown[0])}")
    return quantized, dense


def _matrix(name: str, entry: GgufEntry) -> tuple[int, int]:
    if len(entry.shape) != 2:
        raise DamagedFile(f"{name} is no matrix")
    return entry.shape[0], entry.shape[1]


class _Dense:
    """The tensors that are not quantized, in the type that they were written from.

    llama.cpp wants some as float32; what all its numbers fit is the type of the model's matrices, or the
    narrowest that they fit.
    """

    def __init__(self, entries: Mapping[str, tuple[GgufEntry, ...]]):
        self._entries = entries
        self.shapes = {name: _joined_shape(parts) for name, parts in entries.items()}
        kinds = [parts[0].kind for parts in entries.values() if parts[0].kind != "F32"]
        common = [_TYPES[kind] for kind in sorted(set(kinds), key=kinds.count, reverse=True)]
        self._choices = [*common, *NARROW]
        self.dtypes = {name: self._dtype(parts) for name, parts in entries.items()}

    def _dtype(self, parts: tuple[GgufEntry, ...]) -> torch.dtype:
        if parts[0].kind != "F32":
            return _TYPES[parts[0].kind]
        stored = [_read(part) for part in parts]
        fitting = (dtype for dtype in self._choices if all(holds(dtype, tensor) for tensor in stored))
        return next(fitting, torch.float32)

    def read(self, name: str) -> Tensor:
        """One whole tensor."""
        parts = [_read(part).to(self.dtypes[name]) for part in self._entries[name]]
        return parts[0] if len(parts) == 1 else torch.stack(parts, 2)

    def pieces(self, name: str) -> Iterator[Tensor]:
        """One tensor in slices of its first dimension."""
        first, *more = self._entries[name]
        if more or first.kind == "F32":  # small ones
            yield self.read(name)
            return
        yield from read_pieces(first.path, first.start, self.shapes[name], self.dtypes[name])


def _joined_shape(parts: tuple[GgufEntry, ...]) -> tuple[int, ...]:
    outputs, *rest = parts[0].shape
    if any(part.shape != parts[0].shape or part.kind != parts[0].kind for part in parts):
        raise DamagedFile("the halves of the patch convolution do not fit")
    return (outputs, *rest) if len(parts) == 1 else (outputs, rest[0], len(parts), *rest[1:])


def _read(entry: GgufEntry) -> Tensor:
    return read_tensor(entry.path, entry.start, entry.shape, _TYPES[entry.kind])
