"""What every exported safetensors directory shares: dense tensors, config, files copied as they are."""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grace.checked_files import MEND
from grace.checkpoint import QuantizedWeight, copy_verbatim_files
from grace.errors import UserError
from grace.export.contents import Source, is_tied, modules_of
from grace.export.shards import write_weights
from grace.export.stream import Entry
from grace.models.foreign_names import layer_name


@dataclass(frozen=True)
class Part:
    """One stored tensor of a quantized linear, made from its codes and scales when it is written.

    With `grid_only` it is made from scales and zero points alone, and the codes are not read for it.
    """

    suffix: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[QuantizedWeight], Tensor]
    grid_only: bool = False


def dense_names(source: Source) -> list[str]:
    """The tensors that are not quantized; of tied embeddings only the first."""
    replaced = {f"{name}.weight" for name in source.qat.modules}
    if is_tied(source.config):
        replaced.add("lm_head.weight")
    return [name for name in source.weights.shapes if name not in replaced]


def dense_dtype(source: Source, name: str) -> torch.dtype:
    """What a dense tensor is stored as: as it is, but what we have wider as the base model's bfloat16."""
    stored = source.weights.dtypes[name]
    wide = stored.is_floating_point and stored.itemsize > 2
    return torch.bfloat16 if wide and source.ours else stored


def dense_pieces(source: Source, name: str, dtype: torch.dtype | None = None) -> Iterator[Tensor]:
    """A dense tensor piece by piece: rounded to its `dense_dtype`, then given as `dtype`.

    Raises:
        UserError: it holds NaN or infinities, or numbers that become infinite when rounded.
    """
    rounded = dense_dtype(source, name)
    given = dtype or rounded
    for piece in source.weights.pieces(name):
        _require_finite(source, name, piece, "holds NaN or infinite values")
        stored = piece.to(rounded).to(given)
        kind = str(rounded if rounded.itemsize < given.itemsize else given).removeprefix("torch.")
        _require_finite(source, name, stored, f"holds values too large for {kind}")
        yield stored


def _require_finite(source: Source, name: str, piece: Tensor, fault: str) -> None:
    if not bool(torch.isfinite(piece).all()):
        raise UserError(f"{source.directory} is damaged ({name} {fault}): {MEND}")


def as_stored(source: Source, name: str) -> Entry:
    """A dense tensor in the type that the source has it in; errors as of `dense_pieces` when it is written."""

    def pieces() -> Iterator[Tensor]:
        for piece in source.weights.pieces(name):
            _require_finite(source, name, piece, "holds NaN or infinite values")
            yield piece

    return Entry(name, source.weights.dtypes[name], source.weights.shapes[name], pieces)


def dense_entries(source: Source) -> list[Entry]:
    """Everything that is not quantized, as it will be stored."""
    return [
        Entry(
            name, dense_dtype(source, name), source.weights.shapes[name], partial(dense_pieces, source, name)
        )
        for name in dense_names(source)
    ]


def dense_linears(source: Source) -> list[str]:
    """Linears of the decoder that are not quantized, without the prefix that engines call differently.

    Other people's checkpoints leave some out; engines must be told.
    """
    weights = {name.removesuffix(".weight") for name in dense_names(source) if name.endswith("_proj.weight")}
    return sorted(short for name in weights if (short := layer_name(name)) is not None)


def packed_entries(
    source: Source, name: str, parts: Sequence[Part], label: str, stored_name: str | None = None
) -> list[Entry]:
    """The stored tensors of one linear, each made when it is written.

    Args:
        label: the format, for messages.
        stored_name: the module's name in the export, where it is not the base model's.
    """
    modules = modules_of(source)

    def made(part: Part) -> Tensor:
        try:
            return part.make(modules.without_codes(name) if part.grid_only else modules[name])
        except ValueError as error:
            raise UserError(
                f"{name} cannot be written as {label} ({error}): export it with --format qat"
            ) from error

    prefix = stored_name or name
    return [Entry(f"{prefix}.{part.suffix}", part.dtype, part.shape, partial(made, part)) for part in parts]


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


def deployed_dtype(source: Source) -> str:
    """The type that a deployed model's config names: that of its dense tensors."""
    half = any(dense_dtype(source, name) == torch.float16 for name in dense_names(source))
    return "float16" if half else "bfloat16"


def deployed_config(config: Mapping[str, Any], dtype: str = "bfloat16") -> dict[str, Any]:
    """The model's config with `dtype` as its type, readable by engines built on transformers 4 too.

    Those look for `rope_theta`, `rope_scaling` and `tie_word_embeddings` among the text settings, where
    transformers 5 writes `rope_parameters` and keeps the last outside; both are there, with the same values.
    """

    def retyped(value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        return {
            key: dtype if key in ("dtype", "torch_dtype") else retyped(item) for key, item in value.items()
        }

    whole = {**retyped(config), "dtype": dtype}
    text = whole.get("text_config")
    if isinstance(text, dict):
        text["tie_word_embeddings"] = is_tied(config)
        rope = text.get("rope_parameters")
        if isinstance(rope, dict) and "rope_theta" in rope:
            text.setdefault("rope_theta", rope["rope_theta"])
            text.setdefault(
                "rope_scaling", {key: value for key, value in rope.items() if key != "rope_theta"}
            )
    return whole


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
