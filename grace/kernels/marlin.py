"""gptqmodel's Marlin kernel for AWQ layers, where that package is installed. Nothing here imports it before it is used.

Its own layout, made once per layer and type of activations; the stored tensors are copied first, since gptqmodel
repacks in place. Scales are held in the activations' type: exact for GRACE's own, which bfloat16 holds.

Written against gptqmodel 7.6 (`gptqmodel.nn_modules.qlinear.marlin_awq.AwqMarlinLinear`); not run on a GPU yet.
"""

import importlib.util
from typing import Any

import torch
from torch import Tensor, nn

INSTALL = "pip install gptqmodel==7.6.0"
GROUP_SIZES = (32, 64, 128)
DTYPES = (torch.bfloat16, torch.float16)


def shape_obstacle(group_size: int) -> str | None:
    """Why Marlin cannot hold a layer of this shape, or None if it can."""
    if group_size not in GROUP_SIZES:
        return f"Marlin takes groups of {GROUP_SIZES}, this layer has {group_size}"
    return None


def device_obstacle(device: torch.device) -> str | None:
    """Why Marlin cannot run where the weights are, or None if it can."""
    if importlib.util.find_spec("gptqmodel") is None:
        return f"gptqmodel is not installed: {INSTALL}"
    if device.type != "cuda":
        return f"gptqmodel's Marlin runs on a CUDA device, the weights are on {device.type}"
    layer = _layer_class()
    usable, error = layer.validate_once()
    if not usable:
        return f"gptqmodel's Marlin cannot run here ({error})"
    try:
        layer.validate_device(device)
    except NotImplementedError as error:
        return f"gptqmodel's Marlin cannot run on this device ({error})"
    return None


def input_obstacle(x: Tensor) -> str | None:
    """Why Marlin cannot multiply these activations, or None if it can."""
    if x.dtype not in DTYPES:
        return f"Marlin takes bfloat16 and float16, the activations are {x.dtype}"
    return None


def prepare(
    qweight_IW: Tensor, qzeros_GW: Tensor, scales_GO: Tensor, group_size: int, dtype: torch.dtype
) -> Any:
    """gptqmodel's layer over copies of AWQ tensors."""
    layer = _layer_class()(
        bits=4,
        group_size=group_size,
        desc_act=False,
        sym=False,
        in_features=qweight_IW.shape[0],
        out_features=scales_GO.shape[1],
        bias=False,
        dtype=dtype,
        register_buffers=False,
    )
    tensors = {"qweight": qweight_IW, "qzeros": qzeros_GW, "scales": scales_GO.to(dtype)}
    for name, tensor in tensors.items():
        layer.register_parameter(name, nn.Parameter(tensor.clone(), requires_grad=False))
    layer.bias = None
    layer.post_init()
    return layer


def _layer_class() -> Any:
    from gptqmodel.nn_modules.qlinear.marlin_awq import (  # pyright: ignore[reportMissingImports]
        AwqMarlinLinear,
    )

    return AwqMarlinLinear
