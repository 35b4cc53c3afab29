"""Models of the published shapes with random weights: speed and memory do not depend on what the weights say.

One decoder layer is drawn and written once per layer, so a model takes seconds, and memory for one layer.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from grace.files import write_text
from grace.kernels import reference
from grace.kernels.awq_layout import ZERO_WORD
from grace.models.foreign_names import AWQ_NOT_CONVERTED
from grace.models.qwen3vl import config_for, decoder_linears, skeleton

NAMES = {f"qwen3-vl-{size}": f"Qwen/Qwen3-VL-{size.upper()}-Instruct" for size in ("2b", "4b", "8b")}
GROUP_SIZE = 128
_STD = 0.02
_CODE_STD = 4.61  # of uniform codes from -8 to 7
_QUANTIZATION = {
    "quant_method": "awq", "bits": 4, "group_size": GROUP_SIZE, "version": "gemm", "zero_point": True,
    "modules_to_not_convert": AWQ_NOT_CONVERTED,
}  # fmt: skip

Advance = Callable[[int, int], None]
Drawn = tuple[dict[str, Tensor], Tensor]
"""What the packed directory holds of a parameter, by last name, and the dense weight."""


class SyntheticModel:
    """The tensors of a model by name, made when they are asked for.

    Args:
        name: one of `NAMES`, or whatever `config_for` takes.
    """

    def __init__(self, name: str, seed: int = 0):
        self.config = config_for(NAMES.get(name, name))
        model = skeleton(self.config)
        tied = self.config.tie_word_embeddings
        self.shapes = {
            name: tuple(parameter.shape)
            for name, parameter in model.named_parameters()
            if not (tied and name == "lm_head.weight")
        }
        self.packed = sorted(decoder_linears(model))
        self._generator = torch.Generator().manual_seed(seed)

    def weight_bytes(self, packed: bool) -> int:
        """Bytes of all tensors, on disk as in memory."""
        total = 0
        for name, shape in self.shapes.items():
            numbers = torch.Size(shape).numel()
            if packed and name.removesuffix(".weight") in self.packed:
                total += numbers // 2 + numbers // GROUP_SIZE * 5 // 2
            else:
                total += 2 * numbers
        return total

    def write(self, packed: Path, dense: Path, advance: Advance = lambda done, total: None) -> None:
        """Writes an AWQ directory and its bfloat16 twin: the same weights, dequantized."""
        files: dict[str, list[str]] = {}
        for name in self.shapes:
            files.setdefault(_file_of(name), []).append(name)
        layer: dict[str, Drawn] = {}
        for done, (file, names) in enumerate(files.items()):
            first_layer = file.startswith("layer") and not layer
            drawn = (
                layer
                if layer and file.startswith("layer")
                else {_role(name): self._draw(name) for name in names}
            )
            layer = drawn if first_layer else layer
            tensors: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
            for name in names:
                stored, weight = drawn[_role(name)]
                tensors[0].update(
                    {name.rpartition(".")[0] + f".{part}": tensor for part, tensor in stored.items()}
                )
                tensors[1][name] = weight
            for directory, one in zip((packed, dense), tensors, strict=True):
                directory.mkdir(parents=True, exist_ok=True)
                save_file(one, directory / file, metadata={"format": "pt"})
            advance(done + 1, len(files))
        self._describe(packed, {"quantization_config": _QUANTIZATION})
        self._describe(dense, {})

    def _describe(self, directory: Path, more: dict[str, Any]) -> None:
        index = {}
        for file in sorted(directory.glob("*.safetensors")):
            with safe_open(file, "pt") as tensors:
                index |= dict.fromkeys(tensors.keys(), file.name)
        write_text(
            directory / "model.safetensors.index.json", json.dumps({"metadata": {}, "weight_map": index})
        )
        config = {
            **self.config.to_dict(),
            "architectures": ["Qwen3VLForConditionalGeneration"],
            "dtype": "bfloat16",
        }
        write_text(directory / "config.json", json.dumps({**config, **more}, indent=1))

    def _draw(self, name: str) -> Drawn:
        """One tensor: what the packed directory holds under which last names, and the dense weight."""
        shape = self.shapes[name]
        if name.removesuffix(".weight") in self.packed:
            out_features, in_features = shape
            groups, words = in_features // GROUP_SIZE, out_features // 8
            ends = -(1 << 31), (1 << 31) - 1
            codes = torch.randint(*ends, (in_features, words), dtype=torch.int32, generator=self._generator)
            scales = (
                torch.rand(groups, out_features, generator=self._generator).add_(0.5).mul_(_STD / _CODE_STD)
            )
            stored = {
                "qweight": codes,
                "qzeros": torch.full((groups, words), ZERO_WORD, dtype=torch.int32),
                "scales": scales.bfloat16().half(),
            }
            weight_IO = reference.dequantize(
                codes, stored["qzeros"], stored["scales"], GROUP_SIZE, torch.float32
            )
            return stored, weight_IO.bfloat16().t().contiguous()
        if len(shape) == 1:
            weight = torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
        else:
            weight = torch.empty(shape).normal_(0, _STD, generator=self._generator)
        weight = weight.bfloat16()
        return {name.rpartition(".")[2]: weight}, weight


def _file_of(name: str) -> str:
    found = re.search(r"\.layers\.(\d+)\.", name)
    return f"layer-{int(found[1]):03}.safetensors" if found else "rest.safetensors"


def _role(name: str) -> str:
    """A name without the number of its layer."""
    return re.sub(r"\.layers\.\d+\.", ".layers.", name)
