"""The bfloat16 twin of an AWQ directory: the same weights dequantized, for comparisons.

Shape suffixes: I input features, O output features, G groups along the input, W words (= O / 8).
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from grace.files import write_text
from grace.kernels.awq_layout import unpack_transposed
from grace.runtime.hf_quantizer import MODULES_FILE

_PARTS = ("qweight", "qzeros", "scales")
_OF_THE_PACKED = ("config.json", MODULES_FILE, "grace_export.json")  # what they say is not true of the twin


def dense_bytes(directory: Path) -> int:
    """Bytes of the twin's weights."""
    total = 0
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - no mapping
                numbers = torch.Size(tensors.get_slice(name).get_shape()).numel()
                last = name.rpartition(".")[2]
                total += 2 * numbers * (8 if last == "qweight" else last not in _PARTS)
    return total


def write_twin(directory: Path, out: Path) -> None:
    """Writes the twin: weights as bfloat16, and the directory's other files."""
    out.mkdir(parents=True)
    for file in directory.iterdir():
        if file.is_file() and file.suffix not in (".safetensors", ".md") and file.name not in _OF_THE_PACKED:
            shutil.copy(file, out)
    for file in sorted(directory.glob("*.safetensors")):
        save_file(dict(_dense(file)), out / file.name, metadata={"format": "pt"})
    index = {}
    for file in sorted(out.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            index |= dict.fromkeys(tensors.keys(), file.name)
    write_text(out / "model.safetensors.index.json", json.dumps({"metadata": {}, "weight_map": index}))
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    del config["quantization_config"]
    write_text(out / "config.json", json.dumps(config, indent=1))


def _dense(file: Path) -> Iterator[tuple[str, Tensor]]:
    with safe_open(file, "pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118 - no mapping
            module, _, last = name.rpartition(".")
            if last == "qweight":
                yield (
                    f"{module}.weight",
                    _weight(*(tensors.get_tensor(f"{module}.{part}") for part in _PARTS)),
                )
            elif last not in _PARTS:
                yield name, tensors.get_tensor(name)


def _weight(qweight_IW: Tensor, qzeros_GW: Tensor, scales_GO: Tensor) -> Tensor:
    """scales * (q - zeros), rounded once."""
    codes_OI, zeros_OG = unpack_transposed(qweight_IW), unpack_transposed(qzeros_GW)
    codes_OGg = codes_OI.unflatten(1, (zeros_OG.shape[1], -1)).float()
    weight_OGg = codes_OGg.sub_(zeros_OG[..., None]).mul_(scales_GO.t().float()[..., None])
    return weight_OGg.flatten(1).bfloat16()
