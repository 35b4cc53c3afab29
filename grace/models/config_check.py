"""config.json looked at before a library acts on it: a known model, of a size that can be.

A million layers would be built, and a width of 10^12 allocated, before anybody noticed that no file holds
them.
"""

from collections.abc import Mapping
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
    vision = stored.get("vision_config", {})
    layers = vision.get("deepstack_visual_indexes", [])
    depth = vision.get("depth", _LIMITS["vision_config"]["depth"])
    if (
        not isinstance(layers, list)
        or len(layers) > 64
        or not all(type(at) is int and 0 <= at < depth for at in layers)
    ):
        raise _impossible(directory, "vision_config.deepstack_visual_indexes", layers)


def _impossible(directory: Path, name: str, value: Any) -> UserError:
    return UserError(f"{directory}/config.json is impossible ({name} is {shown(value)}): restore it")
