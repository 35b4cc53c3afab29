"""The Triton W4A16 kernels as one torch operator, `torch.ops.grace.w4a16_matmul`.

`torch.compile` and CUDA graphs see one opaque call: no synchronisation, no decision by values, memory from torch's
allocator only. Which settings a call takes depends on its shapes alone (`w4a16_tuning`).

Shape suffixes: T tokens, I input features, O output features, G groups along the input, W words (= O / 8).
"""

import contextlib
import functools
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from grace.kernels import cuda_timing
from grace.kernels.awq_layout import PER_WORD
from grace.kernels.w4a16_tuning import Config, Problem, Table, bucket, candidates, fastest, rule, table_path

GROUP_SIZES = (32, 64, 128)
DTYPES = (torch.bfloat16, torch.float16)
_INSTALLED = importlib.util.find_spec("triton") is not None
_NO_DEVICE_PROCESSORS = 4  # what the interpreter's settings are made for


def shape_obstacle(in_features: int, out_features: int, group_size: int) -> str | None:
    """Why the kernels cannot hold a layer of this shape, or None if they can."""
    if group_size not in GROUP_SIZES:
        return f"the Triton kernels take groups of {GROUP_SIZES}, this layer has {group_size}"
    if in_features % group_size or out_features % PER_WORD:
        return f"{in_features} -> {out_features} does not divide into groups of {group_size} and words of {PER_WORD}"
    return None


def device_obstacle(device: torch.device) -> str | None:
    """Why the kernels cannot run where the weights are, or None if they can."""
    if not _INSTALLED:
        return "triton is not installed: pip install triton"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the Triton kernels run on a CUDA device, the weights are on {device.type}"
    return None


def input_obstacle(x: Tensor) -> str | None:
    """Why the kernels cannot multiply these activations, or None if they can."""
    if x.dtype not in DTYPES:
        return f"the Triton kernels take bfloat16 and float16, the activations are {x.dtype}"
    return device_obstacle(x.device)


@torch.library.custom_op("grace::w4a16_matmul", mutates_args=())
def matmul(
    x_TI: Tensor,
    qweight_IW: Tensor,
    qzeros_GW: Tensor,
    scales_GO: Tensor,
    group_size: int,
    bias_O: Tensor | None = None,
) -> Tensor:
    """x W + b, summed in fp32.

    Args:
        x_TI: bfloat16 or float16, of any strides.
        qweight_IW, qzeros_GW: int32 words in AWQ's nibble order; any zero points.
        scales_GO: float16.
        bias_O: of any floating type, added in fp32.

    Returns:
        [T, O] in the type of x.

    Raises:
        ValueError: types, shapes or a device that the kernels do not take.
    """
    stored = (qweight_IW, qzeros_GW, scales_GO)
    _check(x_TI, *stored, group_size, bias_O)
    from grace.kernels import w4a16_triton

    with on_device(x_TI.device):
        return w4a16_triton.matmul(
            x_TI, *stored, group_size, bias_O, config_for(x_TI, scales_GO.shape[1], group_size)
        )


@matmul.register_fake
def _(
    x_TI: Tensor,
    qweight_IW: Tensor,
    qzeros_GW: Tensor,
    scales_GO: Tensor,
    group_size: int,
    bias_O: Tensor | None = None,
) -> Tensor:
    return x_TI.new_empty(x_TI.shape[0], scales_GO.shape[1])


def parts(x_TI: Tensor, qweight_IW: Tensor, qzeros_GW: Tensor, scales_GO: Tensor, group_size: int) -> Tensor:
    """The product without a bias in parts of the input [P, T, O], not yet added up; see `w4a16_triton.parts`.

    Raises:
        ValueError: as `matmul`.
    """
    stored = (qweight_IW, qzeros_GW, scales_GO)
    _check(x_TI, *stored, group_size, None)
    from grace.kernels import w4a16_triton

    with on_device(x_TI.device):
        return w4a16_triton.parts(
            x_TI, *stored, group_size, None, config_for(x_TI, scales_GO.shape[1], group_size)
        )


def on_device(device: torch.device) -> Any:
    """Makes a CUDA device the current one: Triton launches there."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _check(
    x: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor, group_size: int, bias: Tensor | None
) -> None:
    tensors = (x, qweight, qzeros, scales)
    if (
        any(tensor.ndim != 2 for tensor in tensors)
        or qweight.dtype != torch.int32
        or qzeros.dtype != torch.int32
    ):
        raise ValueError(
            "AWQ tensors are int32 [in, out / 8], int32 [in / g, out / 8] and float16 [in / g, out]"
        )
    inputs, words = qweight.shape
    obstacle = shape_obstacle(inputs, PER_WORD * words, group_size) or input_obstacle(x)
    if obstacle:
        raise ValueError(obstacle)
    groups = inputs // group_size
    wanted: dict[str, tuple[Tensor, tuple[int, ...]]] = {"activations": (x, (len(x), inputs)), "qzeros": (qzeros, (groups, words)),
              "scales": (scales, (groups, PER_WORD * words))}  # fmt: skip
    if bias is not None:
        wanted["bias"] = (bias, (PER_WORD * words,))
    for name, (tensor, shape) in wanted.items():
        if tuple(tensor.shape) != shape or tensor.device != qweight.device:
            raise ValueError(
                f"{name} are {tuple(tensor.shape)} on {tensor.device}, not {shape} on {qweight.device}"
            )
    if scales.dtype != torch.float16:
        raise ValueError(f"scales are {scales.dtype}, not float16")


# ---------------------------------------------------------------- settings


def config_for(x_TI: Tensor, outputs: int, group_size: int) -> Config:
    """The settings of a multiplication: from the device's table, else by the rule."""
    problem = Problem(bucket(x_TI.shape[0]), x_TI.shape[1], outputs, group_size, _name(x_TI.dtype))
    return _config(problem, x_TI.device)


@functools.lru_cache(maxsize=4096)
def _config(problem: Problem, device: torch.device) -> Config:
    known = _table(device).get(problem) if device.type == "cuda" else None
    return known or rule(problem, processors(device))


@functools.cache
def _table(device: torch.device) -> Table:
    import triton

    name = torch.cuda.get_device_name(device)
    return Table(table_path(name, triton.__version__), name, triton.__version__)


def processors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device; what the interpreter's settings are made for elsewhere."""
    if device.type != "cuda":
        return _NO_DEVICE_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def is_tuned(
    inputs: int, outputs: int, group_size: int, tokens: int, dtype: torch.dtype, device: torch.device
) -> bool:
    """Whether a CUDA device's table holds a shape."""
    problem = Problem(bucket(tokens), inputs, outputs, group_size, _name(dtype))
    return _table(device).get(problem) is not None


def tune(
    inputs: int, outputs: int, group_size: int, tokens: int, dtype: torch.dtype, device: torch.device
) -> tuple[Config, float]:
    """Times the settings of a shape on a CUDA device and writes the fastest to its table; returns it and its seconds.

    Timed on weights that come from memory, in a captured graph (`cuda_timing`). Never call it while one is captured.
    """
    problem = Problem(bucket(tokens), inputs, outputs, group_size, _name(dtype))
    from triton.runtime.errors import OutOfResources

    from grace.kernels import w4a16_triton

    operands = _operands(problem, dtype, device)

    def seconds(config: Config) -> float:
        def call(x: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor) -> Tensor:
            return w4a16_triton.matmul(x, qweight, qzeros, scales, group_size, None, config)

        try:
            return cuda_timing.graph_seconds([functools.partial(call, *one) for one in operands])
        except OutOfResources:  # made for a card with more shared memory
            return float("inf")

    with torch.cuda.device(device):
        config, best = fastest(candidates(problem, processors(device)), seconds)
    _table(device).put(problem, config, best)
    _config.cache_clear()
    return config, best


def _operands(
    problem: Problem, dtype: torch.dtype, device: torch.device
) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Activations, and random weights in as many copies as keep their codes out of the caches."""
    words, groups = problem.outputs // PER_WORD, problem.inputs // problem.group_size
    copies = cuda_timing.copies_for(4 * problem.inputs * words)

    def random_words(rows: int) -> Tensor:
        return torch.randint(-(2**31), 2**31, (rows, words), device=device, dtype=torch.int64).to(torch.int32)

    x_TI = torch.randn(problem.tokens, problem.inputs, device=device, dtype=dtype)
    scales_GO = torch.rand(groups, problem.outputs, device=device).half()
    return [(x_TI, random_words(problem.inputs), random_words(groups), scales_GO) for _ in range(copies)]
