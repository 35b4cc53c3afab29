"""The QAT checkpoint again: for publication, further training, or another export later.

A trained one is copied, fp32 latents and all. Made from other formats it holds codes, scales and W_hat, and
no latents: it can be loaded and exported, and a new run can start from its weights. A rounded model has them.

Shape suffixes: O output features, I input features, G groups along the input.
"""

import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from grace.checked_files import MEND
from grace.checkpoint import FORMAT_VERSION, QAT_FOLDER, QAT_TENSORS, QuantizedWeight, copy_verbatim_files
from grace.errors import UserError
from grace.export.contents import OWN, ROUNDED, Source, modules_of
from grace.export.directory import (
    Part,
    as_stored,
    dense_names,
    deployed_config,
    one_thread,
    packed_entries,
    write_json,
)
from grace.export.progress import progress
from grace.export.shards import INDEX, Weights, write_weights
from grace.export.stream import Entry, write_safetensors
from grace.files import sha256_of
from grace.quant.grid import dequantize

LABEL = "QAT"


def write(source: Source, directory: Path, max_shard_bytes: int | None = None) -> None:
    """Writes the directory, all but its README; a trained one file by file, byte for byte.

    With a bound on shards the weight file is cut anew.
    """
    if source.kind != OWN:
        _write_converted(source, directory, max_shard_bytes)
        return
    shutil.copyfile(source.directory / "config.json", directory / "config.json")
    if max_shard_bytes is None:
        for name in dense_names(source):  # a copy of the files would not look at them
            for _ in as_stored(source, name).pieces():
                pass
        for path in [*source.directory.glob("*.safetensors"), *source.directory.glob(INDEX)]:
            shutil.copyfile(path, directory / path.name)
    else:
        weights = source.weights
        entries = [as_stored(source, name) for name in weights.shapes]
        write_weights(directory, entries, {"format": "pt"}, "qat", max_shard_bytes)
    copy_verbatim_files(source.directory, directory)
    shutil.copytree(source.directory / QAT_FOLDER, directory / QAT_FOLDER, copy_function=shutil.copyfile)


def _write_converted(source: Source, directory: Path, max_shard_bytes: int | None) -> None:
    """W_hat as float32, whatever else as it is, and `grace_qat/` with codes and scales."""
    group_size = source.qat.group_size
    weights = [as_stored(source, name) for name in dense_names(source)]
    state: list[Entry] = []
    for name, (outputs, inputs) in modules_of(source).shapes.items():
        parts = [
            Part("codes", torch.int8, (outputs, inputs), lambda weight: weight.codes_OI),
            Part(
                "scales",
                torch.bfloat16,
                (outputs, inputs // group_size),
                lambda weight: weight.scales_OG.bfloat16(),
            ),
        ]
        if source.kind == ROUNDED:
            parts += [
                Part(
                    "latent", torch.float32, (outputs, inputs), lambda weight: cast(Tensor, weight.latent_OI)
                ),
                Part(
                    "theta",
                    torch.float32,
                    (outputs, inputs // group_size),
                    lambda weight: cast(Tensor, weight.theta_OG),
                ),
            ]
        state += packed_entries(source, name, parts, LABEL)
        wide = Part("weight", torch.float32, (outputs, inputs), partial(_wide, group_size))
        weights += packed_entries(source, name, [wide], LABEL)
    with one_thread():
        write_weights(directory, weights, {"format": "pt"}, "qat", max_shard_bytes)
        (directory / QAT_FOLDER).mkdir()
        file = directory / QAT_FOLDER / QAT_TENSORS
        with progress("qat state", sum(entry.nbytes for entry in state)) as advance:
            write_safetensors(file, state, {"format": "pt"}, advance)
    known = ("base_model", "license", "sections", "rounded")  # what is not known is left out, not null
    info = {
        **{key: source.qat.info[key] for key in known if source.qat.info.get(key) is not None},
        "converted_from": source.kind,
        "format_version": FORMAT_VERSION,
        "bits": source.qat.bits,
        "group_size": group_size,
        "modules": sorted(source.qat.modules),
        "state_sha256": sha256_of(file),
    }
    write_json(directory / QAT_FOLDER / "info.json", info)
    write_json(directory / "config.json", deployed_config(source.config, "float32"))
    copy_verbatim_files(source.directory, directory)


def _wide(group_size: int, weight: QuantizedWeight) -> Tensor:
    return dequantize(weight.codes_OI, weight.scales_OG, group_size)


def check(source: Source, directory: Path, stored: Mapping[str, QuantizedWeight]) -> dict[str, Any]:
    """Checks that codes and scales are those of the source, and the written W_hat exactly scale * code.

    Args:
        stored: the quantized linears as read back.

    Raises:
        RuntimeError: something differs.
    """
    written = Weights(directory)
    for name, weight in source.qat.modules.items():
        again = stored[name]
        codes = torch.equal(again.codes_OI, weight.codes_OI)
        if not codes or not torch.equal(again.scales_OG.float(), weight.scales_OG.float()):
            raise RuntimeError(f"parity: {name} was not written as it was; nothing was published")
        expected_OI = _wide(source.qat.group_size, weight)
        if not torch.equal(written.read(f"{name}.weight").float(), expected_OI):
            raise RuntimeError(f"parity: the weights of {name} are not scale * code; nothing was published")
    return {"codes_identical": True, "weights_identical": True, "modules": len(source.qat.modules)}


def require_consistent(source: Source) -> None:
    """Raises `UserError` if the weights of a QAT checkpoint are not those of its codes and scales."""
    for name, weight in source.qat.modules.items() if source.kind == OWN else ():
        if not torch.equal(
            source.weights.read(f"{name}.weight").float(), _wide(source.qat.group_size, weight)
        ):
            raise UserError(
                f"{source.directory} is damaged (the weights of {name} are not scale * code): {MEND}"
            )
