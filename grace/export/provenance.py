"""What the model card beside an export says about where the model came from, for the card of the next one."""

import re
from pathlib import Path
from typing import Any

import yaml

from grace.checked_files import DamagedFile, read_text
from grace.export.contents import OWN

_CARD_LIMIT, _FRONT_LIMIT = 2**20, 2**14
_TITLE = re.compile(r"^# (.{1,200}), GRACE W[48]G\d+$", re.MULTILINE)
_KEPT_SECTIONS = ("Training", "Metrics")

# What to call a directory that is not a run of ours.
KIND_NAMES = {
    "awq": "an AWQ checkpoint",
    "compressed-tensors": "a compressed-tensors checkpoint",
    "gguf": "GGUF files",
    "mlx": "an MLX checkpoint",
    OWN: "a QAT checkpoint",
    "reference-qat": "a QAT checkpoint of the public GRACE code",
}


def provenance(directory: Path) -> dict[str, Any]:
    """What can be learnt from the README.md of a directory.

    Returns:
        `base_model` and `license` as its front matter has them, None where it does not; `sections`, those about
        training, of a card that GRACE wrote. A card that cannot be read says nothing.
    """
    try:
        text = read_text(directory / "README.md", _CARD_LIMIT)
    except (OSError, DamagedFile):
        return {"base_model": None, "license": None, "sections": []}
    front = _front_matter(text)
    title = _TITLE.search(text)
    base = front.get("base_model")
    base = base[0] if isinstance(base, list) and base else base
    if not isinstance(base, str):
        base = title.group(1) if title else None
    license = front.get("license")
    return {
        "base_model": base,
        "license": license if isinstance(license, str) and re.fullmatch(r"[\w.-]{1,64}", license) else None,
        "sections": _sections(text) if title else [],
    }


def _front_matter(text: str) -> dict[str, Any]:
    _, fence, rest = text.partition("---\n")
    front, end, _ = rest.partition("\n---")
    if not text.startswith("---\n") or not fence or not end or len(front) > _FRONT_LIMIT:
        return {}
    try:
        found = yaml.safe_load(front)
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _sections(text: str) -> list[str]:
    parts = re.split(r"^(?=## )", text, flags=re.MULTILINE)
    return [
        part.strip()
        for part in parts
        if part.partition("\n")[0].strip().removeprefix("## ") in _KEPT_SECTIONS
    ]
