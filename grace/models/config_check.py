"""config.json looked at before a library acts on it: a known model, of a size that can be.

A million layers would be built, and a width of 10^12 allocated, before anybody noticed that no file holds
them.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from grace.checked_files import DamagedFile, read_json, shown
from grace.errors import UserError

MODEL_TYPE = "qwen3_vl"
# Far above any model of the family, far below what hurts on the meta device.
_LIMITS: dict[str, dict[str, int]] = {
    "text_config": {
        "hidden_size": 2**17, "intermediate_size": 2**19, "num_hidden_layers": 512, "num_attention_heads": 1024,
        "num_key_value_heads": 1024, "head_dim": 2**12, "vocab_size": 2**22, "max_position_embeddings": 2**31 - 1,
    },
    "vision_config": {
        "hidden_size": 2**16, "intermediate_size": 2**18, "depth": 512, "num_heads": 1024, "out_hidden_size": 2**17,
        "num_position_embeddings": 2**22, "patch_size": 1024, "temporal_patch_size": 64, "spatial_merge_size": 64,
        "in_channels": 64,
    },
}  # fmt: skip


def read_config(directory: Path) -> dict[str, Any]:
    """The config.json of a Qwen3-VL directory, checked.

    Raises:
        UserError: none, not one, of another model, or of impossible sizes.
    """
    try:
        stored = read_json(directory / "config.json")
    except (OSError, DamagedFile) as error:
        raise UserError(
            f"{directory}/config.json cannot be read ({error}): give a Qwen3-VL directory"
        ) from error
    require_possible(stored, directory)
    return stored


def require_possible(stored: Mapping[str, Any], directory: Path) -> None:
    """Raises `UserError` unless this is a Qwen3-VL config whose sizes a model can have."""
    kind = stored.get("model_type")
    if kind != MODEL_TYPE:
        what = f"a {shown(kind)[1:-1]} model" if isinstance(kind, str) else "a model of unknown type"
        raise UserError(f"{directory} holds {what}: GRACE knows Qwen3-VL ({MODEL_TYPE})")
    for section, limits in _LIMITS.items():
        settings = stored.get(section, {})
        if not isinstance(settings, Mapping):
            raise _impossible(directory, section, settings)
        for name, most in limits.items():
            if name in settings and not (type(settings[name]) is int and 1 <= settings[name] <= most):
                raise _impossible(directory, f"{section}.{name}", settings[name])
    _require_types(stored, directory)
    vision = stored.get("vision_config", {})
    layers = vision.get("deepstack_visual_indexes", [])
    depth = vision.get("depth", _LIMITS["vision_config"]["depth"])
    if (
        not isinstance(layers, list)
        or len(layers) > 64
        or not all(type(at) is int and 0 <= at < depth for at in layers)
    ):
        raise _impossible(directory, "vision_config.deepstack_visual_indexes", layers)


def _require_types(stored: Mapping[str, Any], directory: Path) -> None:
    """Checks what libraries act on before they look at it: labels that they make up, tokens, positions.

    Raises:
        UserError: one is impossible.
    """
    text = stored.get("text_config", {})
    vocabulary = text.get("vocab_size", _LIMITS["text_config"]["vocab_size"])
    for place, settings in (("", stored), *((f"{name}.", stored.get(name, {})) for name in _LIMITS)):
        for name, fine in _FINE.items():
            if name in settings and not fine(settings[name]):
                raise _impossible(directory, f"{place}{name}", settings[name])
        for name in settings:
            if name.endswith("_token_id") and not _tokens(settings[name], vocabulary):
                raise _impossible(directory, f"{place}{name}", settings[name])
    for name in ("rope_parameters", "rope_scaling"):
        rope = text.get(name)
        if rope is not None and not isinstance(rope, Mapping):
            raise _impossible(directory, f"text_config.{name}", rope)
        sections = (rope or {}).get("mrope_section", [1, 1, 1])
        if not isinstance(sections, list) or len(sections) != 3 or not all(map(_count, sections)):
            raise _impossible(directory, f"text_config.{name}.mrope_section", sections)
        base = (rope or {}).get("rope_theta", 1.0)
        if not _positive(base):
            raise _impossible(directory, f"text_config.{name}.rope_theta", base)


def _count(value: Any) -> bool:
    return type(value) is int and 1 <= value <= 2**16


def _positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < 2**63


def _tokens(value: Any, vocabulary: int) -> bool:
    """Whether this is a token, some, or none; -1 stands for none."""
    many = value if isinstance(value, list) else [] if value is None else [value]
    return all(type(token) is int and -1 <= token < vocabulary for token in many)


_FINE: dict[str, Callable[[Any], bool]] = {
    "num_labels": _count,
    "id2label": lambda value: value is None or isinstance(value, Mapping),
    "model_type": lambda value: isinstance(value, str),
    "rope_theta": _positive,
    "rms_norm_eps": _positive,
}


def _impossible(directory: Path, name: str, value: Any) -> UserError:
    return UserError(f"{directory}/config.json is impossible ({name} is {shown(value)}): restore it")
