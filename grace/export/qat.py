"""The QAT checkpoint again: for publication, further training, or another export later."""

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch

from grace.checkpoint import QAT_FOLDER, copy_verbatim_files
from grace.export.shards import INDEX, Weights, write_weights
from grace.export.source import Source
from grace.export.stream import Entry
from grace.quant.grid import dequantize


def write(source: Source, directory: Path, max_shard_bytes: int | None = None) -> None:
    """Copies file by file, byte for byte; only with a bound on shards is the weight file cut anew."""
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
    copy_verbatim_files(source.directory, directory)
    shutil.copytree(source.directory / QAT_FOLDER, directory / QAT_FOLDER, copy_function=shutil.copyfile)


def check(source: Source, directory: Path) -> dict[str, Any]:
    """Checks that the written W_hat of every quantized layer is exactly scale * code.

    Raises:
        RuntimeError: one is not.
    """
    written = Weights(directory)
    for name, weight in source.qat.modules.items():
        expected_OI = dequantize(weight.codes_OI, weight.scales_OG, source.qat.group_size)
        if not torch.equal(written.read(f"{name}.weight").float(), expected_OI):
            raise RuntimeError(f"parity: the weights of {name} are not scale * code; nothing was published")
    return {"codes_identical": True, "weights_identical": True, "modules": len(source.qat.modules)}
