"""python benchmarks/w4a16.py [--models 2b 4b 8b] [--no-tune] [--out benchmarks/results/w4a16.json]

The Triton W4A16 kernels on this CUDA device, at the linears of Qwen3-VL with q, k, v and gate, up fused.

- Few tokens (1 to 64): time, bytes of codes, scales and zeros per second, that as a share of the device's measured copy
  bandwidth (bytes read plus bytes written, a large copy), and the speed over the dense bfloat16 product.
- Prompts (128 to 2048 tokens): the speed over the dense bfloat16 product.

Every time is that of a captured graph whose calls take turns with copies of the weights, several times the cache in all:
weights come from memory as in a model. Settings not yet in the device's table are timed first, with --no-tune they go by
the rule. The dense product is torch's. Repeats of both are interleaved, medians taken; `gptqmodel` adds a column when
its Marlin can run. A machine without a CUDA device is told so (exit code 2).

Prints a table and, last, one line of JSON.
"""

import argparse
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from measure import machine, report
from torch import Tensor

from grace.errors import UserError, run_command
from grace.kernels import cuda_timing, marlin, w4a16

FEW, PROMPTS = (1, 2, 4, 8, 16, 32, 64), (128, 512, 2048)
GROUP_SIZE = 128
ROUNDS = 3
DEVICE, DTYPE = torch.device("cuda"), torch.bfloat16
# (in, out) of a decoder layer's four products: qkv, output, gate and up, down.
MODELS = {
    "2b": ((2048, 4096), (2048, 2048), (2048, 12288), (6144, 2048)),
    "4b": ((2560, 6144), (4096, 2560), (2560, 19456), (9728, 2560)),
    "8b": ((4096, 6144), (4096, 4096), (4096, 24576), (12288, 4096)),
}


def copy_bandwidth() -> float:
    """Bytes read and written per second by copies of 1 GiB."""
    source = torch.empty(2**30, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.nbytes / cuda_timing.graph_seconds([lambda: target.copy_(source)] * 4)


def packed_weights(inputs: int, outputs: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random AWQ tensors."""
    shapes = ((inputs, outputs // 8), (inputs // GROUP_SIZE, outputs // 8))
    words = [torch.randint(-(2**31), 2**31, shape, device=DEVICE).to(torch.int32) for shape in shapes]
    scales_GO = (torch.rand(inputs // GROUP_SIZE, outputs, device=DEVICE) * 0.01 + 0.001).half()
    return words[0], words[1], scales_GO


def medians(ways: dict[str, list[Callable[[], Any]]]) -> dict[str, float]:
    """Median seconds of a call of each way, rounds interleaved."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, calls in ways.items():
            times[name].append(cuda_timing.graph_seconds(calls))
    return {name: median(values) for name, values in times.items()}


def measure_shape(inputs: int, outputs: int, tune: bool) -> dict[int, dict[str, float]]:
    """Seconds by number of tokens and way."""
    packed_bytes = inputs * outputs // 2
    packed = [packed_weights(inputs, outputs) for _ in range(cuda_timing.copies_for(packed_bytes))]
    dense = [
        torch.randn(outputs, inputs, device=DEVICE, dtype=DTYPE)
        for _ in range(cuda_timing.copies_for(4 * packed_bytes))
    ]
    others = []
    if marlin.device_obstacle(DEVICE) is None:
        others = [marlin.prepare(*stored, GROUP_SIZE, DTYPE) for stored in packed]
    found = {}
    for tokens in (*FEW, *PROMPTS):
        shape = (inputs, outputs, GROUP_SIZE, tokens, DTYPE, DEVICE)
        if tune and not w4a16.is_tuned(*shape):
            w4a16.tune(*shape)
        x = torch.randn(tokens, inputs, device=DEVICE, dtype=DTYPE)
        ways: dict[str, list[Callable[[], Any]]] = {
            "triton": [functools.partial(w4a16.matmul, x, *stored, GROUP_SIZE) for stored in packed],
            "dense": [functools.partial(F.linear, x, weight) for weight in dense],
        }
        if others:
            ways["gptqmodel"] = [functools.partial(layer, x) for layer in others]
        found[tokens] = medians(ways)
    return found


def stored_bytes(inputs: int, outputs: int) -> float:
    """Codes, scales and zeros."""
    return inputs * outputs / 2 + inputs / GROUP_SIZE * outputs * 2.5


def figures(seconds: dict[str, float], inputs: int, outputs: int, copy: float) -> dict[str, float]:
    """What is reported of a shape and number of tokens."""
    rate = stored_bytes(inputs, outputs) / seconds["triton"]
    result = {
        "microseconds": 1e6 * seconds["triton"],
        "bytes_per_s": rate,
        "share_of_copy": rate / copy,
        "speed_over_dense": seconds["dense"] / seconds["triton"],
    }
    if "gptqmodel" in seconds:
        result["speed_over_gptqmodel"] = seconds["gptqmodel"] / seconds["triton"]
    return result


@torch.inference_mode()
def run(args: argparse.Namespace) -> int:
    if not torch.cuda.is_available():
        raise UserError("this benchmark needs a CUDA device, and there is none here")
    torch.manual_seed(0)
    copy = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}, copies at {copy / 1e9:.0f} GB/s read and written, {DTYPE}")
    print(f"{'model':6}{'in':>7}{'out':>7}{'tokens':>8}{'us':>9}{'GB/s':>8}{'of copy':>9}{'over dense':>12}")
    results: dict[str, Any] = {}
    for model in args.models:
        for inputs, outputs in MODELS[model]:
            for tokens, seconds in measure_shape(inputs, outputs, not args.no_tune).items():
                row = figures(seconds, inputs, outputs, copy)
                results[f"{model} {inputs}x{outputs} {tokens}"] = row
                print(
                    f"{model:6}{inputs:7}{outputs:7}{tokens:8}{row['microseconds']:9.1f}"
                    f"{row['bytes_per_s'] / 1e9:8.0f}{row['share_of_copy']:9.2f}{row['speed_over_dense']:12.2f}",
                    flush=True,
                )
            torch.cuda.empty_cache()
    about = {"benchmark": "w4a16", **machine("cuda"), "copy_bytes_per_s": copy, "tuned": not args.no_tune}
    report({**about, "results": results}, args.out)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=["2b", "4b", "8b"])
    parser.add_argument("--no-tune", action="store_true", help="settings by the rule alone")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    args = parser.parse_args()
    return run_command(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
