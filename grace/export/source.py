"""What is exported: a finished quantized run, found and checked before anything is written."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from grace.checkpoint import (
    QAT_FOLDER,
    QAT_TENSORS,
    QatState,
    QuantizedWeight,
    is_qat,
    read_qat_info,
    read_weight,
)
from grace.errors import UserError
from grace.export.shards import Weights
from grace.export.stream import TensorFile
from grace.runtime.generate import require_tokenizer

AWQ_MODULES = "awq_quantized_modules.json"


@dataclass(frozen=True)
class Source:
    """A QAT checkpoint: codes and scales as trained, and the directory with everything else."""

    directory: Path
    qat: QatState
    config: Mapping[str, Any]
    weights: Weights

    @property
    def recipe(self) -> Mapping[str, Any]:
        """The resolved recipe of the run, section by section; empty if the checkpoint does not say."""
        recipe = self.qat.info.get("recipe")
        return recipe if isinstance(recipe, Mapping) else {}


class StoredModules(Mapping[str, QuantizedWeight]):
    """The quantized linears of a checkpoint, each read and checked when asked for, and not kept."""

    def __init__(self, file: TensorFile, names: list[str], bits: int, group_size: int):
        self.file, self.bits, self.group_size = file, bits, group_size
        self.shapes = {name: file.shapes[f"{name}.codes"] for name in names}

    def __getitem__(self, name: str) -> QuantizedWeight:
        """Codes and scales of one linear.

        Raises:
            KeyError: it is not quantized.
            UserError: codes or scales that training cannot have written.
        """
        if name not in self.shapes:
            raise KeyError(name)
        try:
            return read_weight(self.file.read, name, self.bits, self.group_size)
        except (KeyError, ValueError, OSError) as error:
            raise UserError(f"{self.file.path} is damaged ({_reason(error)}): train again") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def find_model(source: Path) -> Path:
    """The QAT checkpoint of a run directory, or `source` itself if it is one.

    Raises:
        UserError: no such directory, a run that has not finished, or a model without integer codes.
    """
    if not source.is_dir():
        raise UserError(f"{source} is not a directory: give a finished run or its model/")
    directory = source / "model" if (source / "model").is_dir() else source
    if is_qat(directory):
        return directory
    if directory is source and (source / "recipe.yaml").is_file():
        raise UserError(
            f"the run in {source} has not finished (no model/): start its training command again first"
        )
    if is_export(directory):
        raise UserError(f"{directory} is an export already: give the run it came from, or its QAT export")
    if (directory / "config.json").is_file():
        raise UserError(
            f"{directory} is a full-precision model without integer codes: export a run with quant.bits"
        )
    raise UserError(f"{source} is neither a run nor a QAT checkpoint: give a finished run or its model/")


def is_export(directory: Path) -> bool:
    """Whether a directory holds packed weights, of whatever format."""
    if (directory / AWQ_MODULES).is_file() or any(directory.glob("*.gguf")):
        return True
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and bool({"quantization", "quantization_config"} & set(config))


def open_source(source: Path) -> Source:
    """Reads and checks a run's integer state, config and the names in its weight file.

    Raises:
        UserError: anything missing, damaged or inconsistent.
    """
    directory = find_model(source)
    info = read_qat_info(directory)
    try:
        file = TensorFile(directory / QAT_FOLDER / QAT_TENSORS)
        modules = StoredModules(file, info["modules"], info["bits"], info["group_size"])
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("config.json is not an object")
        weights = Weights(directory)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"{directory} is damaged ({_reason(error)}): restore it or train again") from error
    if not modules:
        raise UserError(f"{directory} lists no quantized modules: train with quant.bits set")
    for name, shape in modules.shapes.items():
        if weights.shapes.get(f"{name}.weight") != shape:
            raise UserError(f"{directory} is inconsistent: its weights and grace_qat disagree on {name}")
    require_tokenizer(directory)
    return Source(directory, QatState(info["bits"], info["group_size"], modules, info), config, weights)


def _reason(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
