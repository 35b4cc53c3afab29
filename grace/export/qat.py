"""The QAT checkpoint again: for publication, further training, or another export later."""

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grace.checkpoint import (
    QAT_FOLDER,
    QAT_TENSORS,
    copy_verbatim_files,
    is_qat,
    read_weight,
    write_qat_info,
)
from grace.export.directory import dense_names, in_dtype, module_shapes, one_thread, write_json
from grace.export.progress import progress
from grace.export.shards import INDEX, Weights, write_weights
from grace.export.source import Source
from grace.export.stream import Entry, TensorFile, write_safetensors
from grace.quant.grid import dequantize


def write(source: Source, directory: Path, max_shard_bytes: int | None = None) -> None:
    """A run's checkpoint is copied file by file, byte for byte (only with a bound on shards is its weight file
    cut anew); codes that come from elsewhere are written as a run would have written them.
    """
    copy_verbatim_files(source.directory, directory)
    if not is_qat(source.directory):
        _write_anew(source, directory, max_shard_bytes)
        return
    shutil.copyfile(source.directory / "config.json", directory / "config.json")
    if max_shard_bytes is None:
        for path in [*source.directory.glob("*.safetensors"), *source.directory.glob(INDEX)]:
            shutil.copyfile(path, directory / path.name)
    else:
        weights = source.weights
        entries = [
            Entry(name, weights.dtypes[name], shape, partial(weights.pieces, name))
            for name, shape in weights.shapes.items()
        ]
        write_weights(directory, entries, {"format": "pt"}, "qat", max_shard_bytes)
    shutil.copytree(source.directory / QAT_FOLDER, directory / QAT_FOLDER, copy_function=shutil.copyfile)


def _write_anew(source: Source, directory: Path, max_shard_bytes: int | None) -> None:
    """W_hat in fp32, where it is exact, the rest in the type it has; codes, scales and what training starts from."""
    weights, group_size = source.weights, source.qat.group_size
    dense, state = [], []
    for name in dense_names(source):
        dense.append(Entry(name, weights.dtypes[name], weights.shapes[name], partial(weights.pieces, name)))
    for name, shape in module_shapes(source).items():
        dense.append(Entry(f"{name}.weight", torch.float32, shape, partial(_dequantized, source, name)))
        grouped = (shape[0], shape[1] // group_size)
        parts = {
            "codes": (torch.int8, shape, "codes_OI"), "scales": (torch.bfloat16, grouped, "scales_OG"),
            "latent": (torch.float32, shape, "latent_OI"), "theta": (torch.float32, grouped, "theta_OG"),
        }  # fmt: skip
        for part, (dtype, stored, field) in parts.items():
            state.append(Entry(f"{name}.{part}", dtype, stored, partial(_field, source, name, field)))
    write_json(directory / "config.json", in_dtype(source.config, "float32"))
    folder = directory / QAT_FOLDER
    folder.mkdir()
    with one_thread():
        write_weights(directory, dense, {"format": "pt"}, "qat", max_shard_bytes)
        with progress("qat state", sum(entry.nbytes for entry in state)) as advance:
            write_safetensors(folder / QAT_TENSORS, state, {}, advance)
    write_qat_info(folder, source.qat)


def _dequantized(source: Source, name: str) -> Tensor:
    weight = source.qat.modules[name]
    return dequantize(weight.codes_OI, weight.scales_OG, source.qat.group_size)


def _field(source: Source, name: str, field: str) -> Tensor:
    return getattr(source.qat.modules[name], field)


def check(source: Source, directory: Path) -> dict[str, Any]:
    """Checks that codes and scales are written as they were, and that W_hat of every linear is exactly scale * code.

    Raises:
        RuntimeError: one is not.
    """
    written, state = Weights(directory), TensorFile(directory / QAT_FOLDER / QAT_TENSORS)
    for name, weight in source.qat.modules.items():
        stored = read_weight(state.read, name, source.qat.bits, source.qat.group_size)
        if not torch.equal(stored.codes_OI, weight.codes_OI) or not torch.equal(
            stored.scales_OG, weight.scales_OG
        ):
            raise RuntimeError(f"parity: {name} was not written as trained; nothing was published")
        expected_OI = dequantize(weight.codes_OI, weight.scales_OG, source.qat.group_size)
        if not torch.equal(written.read(f"{name}.weight").float(), expected_OI):
            raise RuntimeError(f"parity: the weights of {name} are not scale * code; nothing was published")
    return {"codes_identical": True, "weights_identical": True, "modules": len(source.qat.modules)}
