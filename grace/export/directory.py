"""What every exported safetensors directory shares: dense tensors, config, files copied as they are."""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from grace.checkpoint import QuantizedWeight, copy_verbatim_files
from grace.errors import UserError
from grace.export.shards import write_weights
from grace.export.source import Source, StoredModules
from grace.export.stream import Entry


@dataclass(frozen=True)
class Part:
    """One stored tensor of a quantized linear, made from its codes and scales when it is written."""

    suffix: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[QuantizedWeight], Tensor]


@dataclass(frozen=True)
class Stored:
    """An export read back, under the names and in the shapes of the base model.

    Attributes:
        codes: codes int8 [O, I] and scales bfloat16 [O, I / g] of a quantized linear.
        dense: any other tensor.
    """

    codes: Callable[[str], tuple[Tensor, Tensor]]
    dense: Callable[[str], Tensor]


def dense_names(source: Source) -> list[str]:
    """The tensors that are not quantized; of tied embeddings only the first."""
    tied = bool(source.config.get("tie_word_embeddings", False))
    replaced = {f"{name}.weight" for name in source.qat.modules} | ({"lm_head.weight"} if tied else set())
    return [name for name in source.weights.shapes if name not in replaced]


def dense_pieces(source: Source, name: str, dtype: torch.dtype = torch.bfloat16) -> Iterator[Tensor]:
    """A dense tensor piece by piece: floating ones rounded to bfloat16, then given as `dtype`."""
    for piece in source.weights.pieces(name):
        yield piece.to(torch.bfloat16).to(dtype) if piece.is_floating_point() else piece


def dense_entries(source: Source) -> list[Entry]:
    """Everything that is not quantized: floating tensors as bfloat16, others as they are."""
    entries = []
    for name in dense_names(source):
        stored = source.weights.dtypes[name]
        dtype = torch.bfloat16 if stored.is_floating_point else stored
        entries.append(Entry(name, dtype, source.weights.shapes[name], partial(dense_pieces, source, name)))
    return entries


def packed_entries(
    source: Source, name: str, parts: Sequence[Part], label: str, stored_name: str | None = None
) -> list[Entry]:
    """The stored tensors of one linear, each made when it is written.

    Args:
        label: the format, for messages.
        stored_name: the module's name in the export, where it is not the base model's.
    """
    modules = cast(StoredModules, source.qat.modules)

    def made(part: Part) -> Tensor:
        try:
            return part.make(modules[name])
        except ValueError as error:
            raise UserError(
                f"{name} cannot be written as {label} ({error}): export it with --format qat"
            ) from error

    prefix = stored_name or name
    return [Entry(f"{prefix}.{part.suffix}", part.dtype, part.shape, partial(made, part)) for part in parts]


def module_shapes(source: Source) -> dict[str, tuple[int, int]]:
    """[out, in] of every quantized linear, from the file's header."""
    shapes = cast(StoredModules, source.qat.modules).shapes
    return {name: cast(tuple[int, int], shape) for name, shape in shapes.items()}


def write_directory(
    source: Source,
    directory: Path,
    entries: Sequence[Entry],
    config: Mapping[str, Any],
    label: str,
    max_shard_bytes: int | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes weights, `config.json`, and the tokenizer, processor and template files as they are."""
    with one_thread():
        write_weights(directory, entries, dict(metadata or {"format": "pt"}), label, max_shard_bytes)
    write_json(directory / "config.json", config)
    copy_verbatim_files(source.directory, directory)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Packing waits for memory and disk: a second thread gains little, and on a busy machine costs much."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def deployed_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The model's config with bfloat16 as its type, readable by engines built on transformers 4 too.

    Those look for `rope_theta`, `rope_scaling` and `tie_word_embeddings` among the text settings, where
    transformers 5 writes `rope_parameters` and keeps the last outside; both are there, with the same values.
    """
    whole = in_dtype(config, "bfloat16")
    text = whole.get("text_config")
    if isinstance(text, dict):
        text.setdefault("tie_word_embeddings", bool(config.get("tie_word_embeddings", False)))
        rope = text.get("rope_parameters")
        if isinstance(rope, dict) and "rope_theta" in rope:
            text.setdefault("rope_theta", rope["rope_theta"])
            text.setdefault(
                "rope_scaling", {key: value for key, value in rope.items() if key != "rope_theta"}
            )
    return whole


def in_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """A config and its parts with `dtype` as their type, under whichever name they give it."""

    def changed(value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        return {
            key: dtype if key in ("dtype", "torch_dtype") else changed(item) for key, item in value.items()
        }

    return {**changed(config), "dtype": dtype}


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
