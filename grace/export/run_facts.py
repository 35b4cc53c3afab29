"""What a QAT checkpoint says of its own making, looked at before a model card or the parity gate believes it."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from grace.checked_files import MEND, shown
from grace.errors import UserError
from grace.recipe_parts import parts_of


def require_facts(info: Mapping[str, Any], directory: Path) -> None:
    """Checks what is read of `grace_qat/info.json` besides the codes; all of it may be absent or null.

    Raises:
        UserError: something is of another type than training writes.
    """
    for name, fine in _FACTS.items():
        value: Any = info
        for key in name.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        if value is not None and not fine(value):
            raise UserError(f"{directory} is damaged ({name} in info.json is {shown(value)}): {MEND}")


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_text, value))


def _table(value: Any) -> bool:
    return isinstance(value, Mapping)


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _files(value: Any) -> bool:
    try:
        parts_of(value)
    except ValueError:
        return False
    return True


# By their place in info.json, a table before what is in it.
_FACTS: dict[str, Callable[[Any], bool]] = {
    "base_model": _text,
    "license": _text,
    "sections": _texts,
    "rounded": _table,
    "metrics": _table,
    "steps": _count,
    "recipe_sha256": _text,
    "recipe": _table,
    **{
        f"recipe.{section}": _table for section in ("student", "teacher", "data", "quant", "distill", "optim")
    },
    "recipe.student.base": _text,
    "recipe.teacher.path": _text,
    "recipe.data.path": _files,
    **{f"recipe.data.{name}": _text for name in ("validation_path", "image_root", "audit")},
    **{f"recipe.data.{name}": _count for name in ("min_pixels", "max_pixels", "max_length")},
    **{f"recipe.data.{name}": _texts for name in ("skip", "accept")},
}
