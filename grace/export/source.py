"""What is exported: a finished quantized run, one of our exports or another's checkpoint, told apart by content.

Everything is found and checked before anything is written.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from grace.checked_files import MEND, damage_of, reading, require_regular, shown
from grace.checkpoint import QAT_FOLDER, QAT_TENSORS, QatState, is_qat, read_qat_info
from grace.errors import UserError
from grace.export import awq, compressed_tensors, mlx, reference_qat
from grace.export.awq import AWQ_MODULES
from grace.export.contents import OWN, Modules, Source, require_group_size, surveyed
from grace.export.provenance import provenance
from grace.export.run_facts import require_facts
from grace.export.shards import Weights
from grace.export.stream import TensorFile
from grace.export.tensor_check import require_shapes
from grace.models import qwen3vl
from grace.models.config_check import read_config
from grace.runtime.generate import require_tokenizer

__all__ = ["Source", "find_model", "kind_of", "open_source"]


def find_model(source: Path) -> Path:
    """The model directory of a run, or `source` itself if it is one.

    Raises:
        UserError: no such directory, or a run that has not finished.
    """
    if not source.is_dir():
        raise UserError(f"{source} is not a directory: give a finished run or a quantized model")
    directory = source / "model" if (source / "model").is_dir() else source
    if directory is source and (source / "recipe.yaml").is_file():
        raise UserError(
            f"the run in {source} has not finished (no model/): start its training command again first"
        )
    return directory


def kind_of(directory: Path) -> str:
    """What a quantized directory is: `OWN`, a format's name, or `reference-qat`.

    Raises:
        UserError: not a quantized model, or quantized by a method that is not read here.
    """
    if is_qat(directory):
        return OWN
    if (directory / reference_qat.SIDECAR).exists():
        return reference_qat.KIND
    if any(directory.glob("*.gguf")):
        return "gguf"
    if not (directory / "config.json").exists():
        raise UserError(
            f"{directory} is neither a run nor a quantized model (no config.json): give a finished run or its model/"
        )
    config = read_config(directory)
    block = config.get("quantization_config")
    method = block.get("quant_method") if isinstance(block, Mapping) else None
    if method is None and "quantization" in config:
        return "mlx"
    if method in ("awq", "compressed-tensors"):
        return str(method)
    if method is None and ("awq_packing" in config or (directory / AWQ_MODULES).exists()):
        return "awq"
    if method is None and block is None:
        raise UserError(
            f"{directory} is a full-precision model without integer codes: export a run with quant.bits"
        )
    raise UserError(
        f"{directory} is quantized with {shown(method).strip(chr(39))}: GRACE reads AWQ, compressed-tensors, GGUF, MLX and QAT"
    )


def open_source(source: Path) -> Source:
    """Reads and checks everything about a quantized model but the weights themselves.

    Raises:
        UserError: anything missing, damaged, inconsistent, or of a kind that is not read.
    """
    with reading(source):
        return _opened(source)


def _opened(source: Path) -> Source:
    directory = find_model(source)
    require_regular(directory)
    kind = kind_of(directory)
    config = read_config(directory)
    if kind == OWN:
        found = _read_own(directory, config)
    else:
        found = reader(kind)(directory, config)
        about = {name: value for name, value in provenance(directory).items() if value}
        info = {**found.qat.info, **about, "converted_from": kind}
        found = surveyed(replace(found, qat=replace(found.qat, info=info)))
    require_shapes(found, qwen3vl.parameter_shapes(qwen3vl.config_of(found.config, directory)))
    require_tokenizer(directory)
    return found


def read_back(directory: Path, name: str) -> Source:
    """What was written as one of `grace.export.pack.FORMATS`; errors as of `open_source`."""
    config = read_config(directory)
    return _read_own(directory, config) if name == OWN else reader(name)(directory, config)


def reader(kind: str) -> Any:
    """What reads a kind of directory: `read(directory, config)`, which gives a `Source`.

    Raises:
        ModuleNotFoundError: it needs a package that is not installed.
    """
    if kind == "gguf":
        from grace.export import gguf_read  # needs the gguf package, which nothing else here does

        return gguf_read.read
    formats = {
        "awq": awq,
        "compressed-tensors": compressed_tensors,
        "mlx": mlx,
        reference_qat.KIND: reference_qat,
    }
    return formats[kind].read


def _read_own(directory: Path, config: Mapping[str, Any]) -> Source:
    """A QAT checkpoint: codes and scales as trained, and the weights that they give."""
    info = read_qat_info(directory)
    require_facts(info, directory)
    bits, group_size = info["bits"], info["group_size"]
    with damage_of(directory, "restore it or train again"):
        file = TensorFile(directory / QAT_FOLDER / QAT_TENSORS)
        weights = Weights(directory)
        shapes: dict[str, Any] = {name: file.shapes[f"{name}.codes"] for name in info["modules"]}
        if any(file.dtypes[f"{name}.scales"] != torch.bfloat16 for name in shapes):
            raise ValueError(f"{QAT_TENSORS} holds scales that are not bfloat16")
        require_group_size(group_size, shapes)
    if not shapes:
        raise UserError(f"{directory} lists no quantized modules: train with quant.bits set")
    for name, shape in shapes.items():
        if weights.shapes.get(f"{name}.weight") != shape:
            raise UserError(
                f"{directory} is inconsistent: its weights and grace_qat disagree on {shown(name)}: {MEND}"
            )

    modules = Modules(
        directory,
        shapes,
        bits,
        group_size,
        lambda name: file.read(f"{name}.codes"),
        lambda name: (file.read(f"{name}.scales"), None),
    )
    return Source(directory, QatState(bits, group_size, modules, info), config, weights)
