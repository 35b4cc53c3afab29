"""A directory's weights: `model.safetensors`, or several files and the index that stock loaders follow."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from grace.checked_files import INDEX, WEIGHTS, weight_files
from grace.export.progress import progress
from grace.export.stream import Entry, TensorFile, write_safetensors


def write_weights(
    directory: Path,
    entries: Sequence[Entry],
    metadata: dict[str, str],
    label: str,
    max_shard_bytes: int | None = None,
) -> None:
    """Writes `entries` into one file, or into shards of at most `max_shard_bytes` and an index.

    The tensors of one module stay in one shard; a module larger than the bound has a shard of its own.

    Args:
        label: shown with the progress.

    Raises:
        ValueError: see `write_safetensors`.
    """
    shards = cut(entries, max_shard_bytes)
    total = sum(entry.nbytes for entry in entries)
    with progress(label, total) as advance:
        if len(shards) == 1:
            write_safetensors(directory / WEIGHTS, entries, metadata, advance)
            return
        weight_map = {}
        for number, shard in enumerate(shards, 1):
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            write_safetensors(directory / name, shard, metadata, advance)
            weight_map.update(dict.fromkeys((entry.name for entry in shard), name))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def cut(entries: Sequence[Entry], max_bytes: int | None) -> list[list[Entry]]:
    """Entries in the order of their names, in runs of at most `max_bytes` that never part a module."""
    modules: dict[str, list[Entry]] = {}
    for entry in sorted(entries, key=lambda entry: entry.name):
        modules.setdefault(entry.name.rpartition(".")[0], []).append(entry)
    shards: list[list[Entry]] = [[]]
    filled = 0
    for module in modules.values():
        size = sum(entry.nbytes for entry in module)
        if max_bytes is not None and shards[-1] and filled + size > max_bytes:
            shards.append([])
            filled = 0
        shards[-1] += module
        filled += size
    return shards


class Weights:
    """The tensors of a directory by name, wherever they lie; each read when asked for.

    Raises:
        DamagedFile: a file is damaged, or an index does not describe the files beside it.
        OSError: one cannot be read.
    """

    def __init__(self, directory: Path):
        files = [TensorFile(directory / name, held) for name, held in weight_files(directory).items()]
        self._files = {tensor: file for file in files for tensor in file.shapes}
        self.shapes = {name: file.shapes[name] for name, file in self._files.items()}
        self.dtypes: dict[str, torch.dtype] = {name: file.dtypes[name] for name, file in self._files.items()}

    def read(self, name: str) -> Tensor:
        """One whole tensor."""
        return self._files[name].read(name)

    def pieces(self, name: str) -> Iterator[Tensor]:
        """One tensor in slices of its first dimension, none of more than some 32 MB."""
        return self._files[name].pieces(name)
