"""Where a teacher lies and in how many bits: beside the student, on another device, over several, quantized.

A teacher only answers, so where it lies does not change what it says: on devices of one kind not in a single
bit. Its output layer always lies with the student: the losses multiply by it there.

One machine's processes are taken to see all of its GPUs, process i training on `cuda:i`: so
`accelerate launch` has it.
"""

import contextlib
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import AutoConfig, BitsAndBytesConfig, Qwen3VLConfig
from transformers.utils import import_utils

from grace.errors import UserError
from grace.models import qwen3vl

Place = TypeVar("Place")
NF4_BLOCK = 64  # weights that share one float32 scale


def teacher_devices(asked: str | None, own: torch.device, processes: int, gpus: int) -> list[torch.device]:
    """The devices of this process's teacher, in the order of its layers.

    Args:
        asked: None, beside the student; `cpu`; `cuda:N`; `cuda:+N`, the GPU N places after the student's;
            `spread`, the GPUs on which no process trains, each process having every `processes`-th of them.
        own: the device on which this process trains.
        processes: processes on this machine; each has a teacher of its own, also on the CPU.
        gpus: GPUs that this process sees.

    Raises:
        UserError: there is no such GPU, or one that another process trains or has its teacher on. All
            processes of a launch come to the same verdict.
    """
    if asked is None:
        return [own]
    if asked == "cpu":
        return [torch.device("cpu")]
    fault, several = f"teacher.device={asked}", f"{processes} process{'es' * (processes > 1)} on this machine"
    relative = asked == "spread" or asked.startswith("cuda:+")
    if relative and own.type != "cuda":
        raise UserError(
            f"{fault} is relative to the student's GPU, but the student is on {_name(own)}: set it to cpu, cuda:N or null"
        )
    if asked == "spread":
        if gpus < 2 * processes:
            raise UserError(
                f"{fault} needs at least {2 * processes} GPUs for {several}, there are {gpus}: "
                "start fewer processes, or set teacher.load_in or teacher.device=cpu"
            )
        return [torch.device("cuda", index) for index in range(_index(own) + processes, gpus, processes)]
    index = int(asked.removeprefix("cuda:"))  # "+4" is a number too
    if not relative and processes > 1:
        raise UserError(
            f"{fault} is one GPU for the teachers of {several}: set teacher.device=cuda:+{processes}, spread or null"
        )
    if relative and index < processes:
        raise UserError(
            f"{fault} is a GPU that another of {several} trains on: set teacher.device=cuda:+{processes}, spread or null"
        )
    if (index + processes - 1 if relative else index) >= gpus:
        raise UserError(
            f"{fault} does not exist for {several}, {gpus} GPU{'s are' if gpus != 1 else ' is'} there: "
            "set it to one of them, or to cpu or null"
        )
    return [torch.device("cuda", _index(own) + index if relative else index)]


def _index(gpu: torch.device) -> int:
    return gpu.index or 0  # a lone process trains on plain "cuda"


def _name(device: torch.device) -> str:
    """One name for each device: there is one CPU, also where a process is given "cpu:0"."""
    return f"cuda:{_index(device)}" if device.type == "cuda" else device.type


def _config(path: str) -> Qwen3VLConfig:
    """Of a directory or, unlike `config_for` alone, of any model that the Hub's cache has too."""
    if not Path(path).exists():
        with contextlib.suppress(OSError, ValueError):
            config = AutoConfig.from_pretrained(path)
            if isinstance(config, Qwen3VLConfig):
                return config
    return qwen3vl.config_for(path)


def load_teacher(
    path: str, dtype: torch.dtype, devices: Sequence[torch.device], own: torch.device, load_in: str | None
) -> qwen3vl.Qwen3VLForConditionalGeneration:
    """A frozen model over `devices`, in evaluation mode, its output layer on `own`.

    Args:
        devices: as `teacher_devices` gives them.
        own: the student's device.
        load_in: None, or "8bit" or "4bit" for the decoder linears.

    Raises:
        UserError: no model there, or bitsandbytes is missing.
    """
    options: dict[str, Any] = {}
    if load_in is not None:
        options["quantization_config"] = quantization(path, load_in, dtype)
    if len(devices) > 1:
        model = qwen3vl.skeleton(_config(path))
        places = spread(model, weight_bytes(model, dtype.itemsize, load_in), [_name(d) for d in devices])
        options["device_map"] = places | {qwen3vl.HEAD: _name(own)}
    elif load_in is not None:  # quantized on the way to its device
        options["device_map"] = {"": _name(devices[0])}
    model = qwen3vl.load_model(path, dtype, devices[0], **options)
    if [_name(device) for device in devices] != [_name(own)]:
        qwen3vl.put_head_on(model, own)
    return model.requires_grad_(False)


def quantization(path: str, load_in: str, dtype: torch.dtype) -> Any:
    """How transformers loads the decoder linears: LLM.int8 (products in float16) or NF4 (in `dtype`).

    Vision tower, embeddings, output layer and norms keep `dtype`.

    Raises:
        UserError: bitsandbytes is missing, or the model at `path` is quantized already.
    """
    if not import_utils.is_bitsandbytes_available():
        raise UserError(
            f"teacher.load_in={load_in} needs bitsandbytes {import_utils.BITSANDBYTES_MIN_VERSION} or newer: "
            "pip install 'grace[bitsandbytes]', or set it to null"
        )
    if getattr(_config(path), "quantization_config", None) is not None:
        raise UserError(f"teacher.load_in={load_in}: {path} is quantized already, set teacher.load_in=null")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells of each product's cast to float16
    return BitsAndBytesConfig(
        load_in_8bit=load_in == "8bit",
        load_in_4bit=load_in == "4bit",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=[qwen3vl.VISION, qwen3vl.HEAD],
    )


def weight_bytes(
    model: qwen3vl.Qwen3VLForConditionalGeneration, width: int, load_in: str | None
) -> dict[str, int]:
    """Bytes of every parameter as loaded, by name, a tied one counted once.

    Args:
        model: may stand on the meta device.
        width: bytes of a number that is not quantized.
    """
    linears = {f"{name}.weight" for name in qwen3vl.decoder_linears(model)} if load_in is not None else set()

    def held(name: str, count: int, rows: int) -> int:
        if name not in linears:
            return count * width
        if load_in == "8bit":
            return count + 4 * rows  # a float32 scale for each output
        return count // 2 + 4 * math.ceil(count / NF4_BLOCK)

    return {name: held(name, p.numel(), p.shape[0]) for name, p in model.named_parameters()}


def spread(
    model: qwen3vl.Qwen3VLForConditionalGeneration, sizes: Mapping[str, int], devices: Sequence[Place]
) -> dict[str, Place]:
    """Device of every block, the output layer's left out: consecutive blocks together, even in bytes.

    Args:
        sizes: as `weight_bytes` gives them.
    """
    held = block_bytes(model, sizes)
    total, before, places = max(1, sum(held.values())), 0, {}
    for block, size in held.items():
        middle = before + size / 2  # a block goes where most of it would lie if it could be cut
        places[block] = devices[min(len(devices) - 1, int(middle * len(devices) / total))]
        before += size
    return places


def block_bytes(model: qwen3vl.Qwen3VLForConditionalGeneration, sizes: Mapping[str, int]) -> dict[str, int]:
    """Bytes of every block but the output layer, in the order of a forward pass."""
    held = {block: 0 for block in qwen3vl.blocks(model) if block != qwen3vl.HEAD}
    for name, size in sizes.items():
        for block in held:
            if name.startswith(f"{block}."):
                held[block] += size
    return held
