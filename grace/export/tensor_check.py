"""Whether the tensors of a directory are those that its config.json asks for, before any is read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grace.checked_files import MEND, shown
from grace.errors import UserError
from grace.export.contents import Source, Tensors, is_tied, modules_of


def require_shapes(source: Source, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Compares a source with the tensors that its config.json asks for, before any is read.

    Raises:
        UserError: one is missing, has another shape, or is not asked for.
    """
    modules = {f"{name}.weight": shape for name, shape in modules_of(source).shapes.items()}
    require_tensors(source.directory, source.config, source.weights, expected, modules)


def require_tensors(
    directory: Path,
    config: Mapping[str, Any],
    weights: Tensors,
    expected: Mapping[str, tuple[int, ...]],
    packed: Mapping[str, tuple[int, ...]] | None = None,
) -> None:
    """Compares tensors with those that a config.json asks for, before any is read.

    Args:
        packed: the shapes of those that are stored as codes instead.

    Raises:
        UserError: one is missing, has another shape, is not asked for, or holds integers.
    """
    _require_one_tie(directory, config)
    held = {**weights.shapes, **(packed or {})}
    for name, shape in expected.items():
        if is_tied(config) and name == "lm_head.weight":
            continue
        if name not in held:
            raise UserError(f"{directory} is damaged ({name} is missing): {MEND}")
        if tuple(held[name]) != tuple(shape):
            raise UserError(
                f"{directory} is damaged ({name} is {tuple(held[name])}, its config.json says {tuple(shape)}): {MEND}"
            )
    unknown = sorted(set(held) - set(expected) - {"lm_head.weight"})
    if unknown:
        raise UserError(f"{directory} holds {shown(unknown[0])}, which its config.json does not have: {MEND}")
    whole = sorted(name for name, dtype in weights.dtypes.items() if not dtype.is_floating_point)
    if whole:
        kind = str(weights.dtypes[whole[0]]).removeprefix("torch.")
        raise UserError(f"{directory} is damaged ({whole[0]} is {kind}, no weights): {MEND}")


def _require_one_tie(directory: Path, config: Mapping[str, Any]) -> None:
    """Raises `UserError` where head and embeddings are one by a setting that loaders do not look at.

    They would make up a head.
    """
    text = config.get("text_config")
    inner = text.get("tie_word_embeddings") if isinstance(text, Mapping) else None
    if inner and "tie_word_embeddings" not in config:
        raise UserError(
            f"{directory}/config.json has tie_word_embeddings inside text_config alone, where loaders do not look: "
            "say it at top level too"
        )
