"""A directory's weights: `model.safetensors`, or several files and the index that stock loaders follow."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grace.export.progress import progress
from grace.export.stream import Entry, TensorFile, write_safetensors

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


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
        SafetensorError: a file is damaged.
        OSError: one cannot be read.
        ValueError: an index that does not describe the files beside it.
    """

    def __init__(self, directory: Path):
        names = [WEIGHTS]
        listed: dict[str, Any] | None = None
        if not (directory / WEIGHTS).exists() and (directory / INDEX).is_file():
            listed = json.loads((directory / INDEX).read_text(encoding="utf-8")).get("weight_map")
            if not isinstance(listed, dict) or not listed:
                raise ValueError(f"{INDEX} has no weight_map")
            names = sorted({str(name) for name in listed.values()})
            strange = [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]
            if strange:
                raise ValueError(f"{INDEX} names {strange[0]!r}, which is no file beside it")
        files = {name: TensorFile(directory / name) for name in names}
        self._files = {tensor: file for file in files.values() for tensor in file.shapes}
        if listed is not None and {name: file.path.name for name, file in self._files.items()} != listed:
            raise ValueError(f"{INDEX} and the files beside it disagree")
        self.shapes = {name: file.shapes[name] for name, file in self._files.items()}
        self.dtypes: dict[str, torch.dtype] = {name: file.dtypes[name] for name, file in self._files.items()}

    def read(self, name: str) -> Tensor:
        """One whole tensor."""
        return self._files[name].read(name)

    def pieces(self, name: str) -> Iterator[Tensor]:
        """One tensor in slices of its first dimension, none of more than some 32 MB."""
        return self._files[name].pieces(name)
