"""Makes transformers build `Int4Linear` layers for AWQ checkpoints, with no other package installed.

`import grace.runtime` registers the quantizer here in place of the library's own, which needs gptqmodel.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from grace.checked_files import read_json, safetensors_header, shown
from grace.errors import UserError
from grace.runtime.int4_linear import Int4Linear

MODULES_FILE = "awq_quantized_modules.json"
GROUP_SIZES = (32, 64, 128)


class Int4AwqQuantizer(HfQuantizer):
    """Loads AWQ tensors (4 bits, "gemm" order, groups of 32, 64 or 128) into `Int4Linear` layers."""

    requires_calibration = True  # it only loads what is quantized already

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuses the AWQ variants that the kernels cannot run.

        Raises:
            UserError: other bits, order or group size.
        """
        config = self.quantization_config
        order = getattr(config, "format", None) or getattr(config, "version", None)
        order = str(getattr(order, "value", order)).lower()
        bits, group_size = getattr(config, "bits", None), getattr(config, "group_size", None)
        if bits != 4 or order != "gemm" or group_size not in GROUP_SIZES:
            raise UserError(
                f"grace.runtime runs AWQ with 4 bits, version gemm and groups of 32, 64 or 128; "
                "this checkpoint has "
                f"bits {bits}, version {order}, group_size {group_size}: load it with another runtime"
            )

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        config: Any = self.quantization_config
        group_size = int(config.group_size)
        files = kwargs.get("checkpoint_files") or ()
        names = listed_modules(files)
        if names is None:
            names = stored_modules(files) if files else self.modules_by_rule(model)
        put_int4_linears(model, names, group_size)

    def modules_by_rule(self, model: Any) -> list[str]:
        """Every linear that transformers' own rules do not exclude."""
        skip = self.get_modules_to_not_convert(
            model, getattr(self.quantization_config, "modules_to_not_convert", None), add_default_skips=True
        )
        return [
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and should_convert_module(name, skip)
        ]

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def listed_modules(checkpoint_files: Any) -> list[str] | None:
    """The module list beside the weights, or None where there is none (a checkpoint of another tool).

    Raises:
        UserError: the file is there but cannot be read.
    """
    if not checkpoint_files:
        return None
    path = Path(checkpoint_files[0]).parent / MODULES_FILE
    if not path.exists():
        return None
    try:
        names = read_json(path)["modules"]
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError("modules is not a list of names")
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} is damaged ({error}): export again") from error
    return names


def stored_modules(checkpoint_files: Any) -> list[str]:
    """The modules whose weights are AWQ tensors, by the names in the files.

    Other tools' lists of what is not quantized are written for one engine's way of matching names.
    """
    tensors = {name for path in checkpoint_files for name in safetensors_header(Path(path))}
    return sorted(name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight"))


def put_int4_linears(model: nn.Module, names: list[str], group_size: int) -> None:
    """Replaces the named linears by empty packed ones on the meta device.

    Raises:
        UserError: a name that is no linear of this model, or a shape that AWQ cannot hold.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for name in names:
        if name not in linears:
            raise UserError(
                f"{MODULES_FILE} lists {shown(name)}, which is no linear layer of this model: export again"
            )
        linear = linears[name]
        try:
            with torch.device("meta"):
                packed = Int4Linear(
                    linear.in_features, linear.out_features, linear.bias is not None, group_size
                )
        except ValueError as error:
            raise UserError(
                f"{name} cannot be an AWQ layer ({error}): check modules_to_not_convert"
            ) from error
        model.set_submodule(name, packed)


def register() -> None:
    """Puts the quantizer in transformers' table. `register_quantizer` refuses names that exist."""
    AUTO_QUANTIZER_MAPPING["awq"] = Int4AwqQuantizer  # type: ignore[assignment]
