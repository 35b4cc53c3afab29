"""python benchmarks/int4_cpu.py [--threads N] [--out benchmarks/results/int4_cpu.json]

How fast the kernels of `Int4Linear` are on this CPU, at the linear shapes of Qwen3-VL-2B, as a ratio over
`nn.Linear` in bfloat16 and in fp32. Several copies of each layer take turns, so that weights come from
memory as they do in a model; paths are interleaved and the median is taken. With one thread the clock is
that thread's CPU time, which other processes on the machine hardly touch; with more it is the wall's.
From the columns follows the crossover: the number of tokens up to which ATen's kernel is the faster one
(`grace.kernels.crossover` times it per shape on each machine).

Prints a table and, last, one line of JSON.
"""

import argparse
import itertools
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from measure import cpu_name, machine, report
from torch import Tensor, nn

from grace.export import awq
from grace.kernels import dequant
from grace.kernels.crossover import DEFAULT_TOKENS
from grace.runtime.int4_linear import Int4Linear

TOKENS = (1, 2, 4, 8, 16, 32, 64, 256)
# (out, in) and how often in one decoder layer of the 2B model: q and o, k and v, gate and up, down.
SHAPES = (((2048, 2048), 2), ((1024, 2048), 2), ((6144, 2048), 2), ((2048, 6144), 1))
PATHS = ("dense bf16", "dense fp32", "native bf16", "aten bf16", "dequant bf16", "dequant fp32")


def layers_of(out_features: int, in_features: int) -> tuple[Int4Linear, nn.Linear, nn.Linear]:
    """One packed layer and its dense twins."""
    codes_OI = torch.randint(-8, 8, (out_features, in_features), dtype=torch.int8)
    scales_OG = (torch.rand(out_features, in_features // 128) * 0.01 + 0.001).bfloat16()
    packed = Int4Linear(in_features, out_features)
    packed.load_state_dict(awq.pack(codes_OI, scales_OG))
    with torch.device("meta"):
        empty = nn.Linear(in_features, out_features, bias=False)
    half = empty.to_empty(device="cpu").bfloat16()
    half.weight.data.copy_(codes_OI * scales_OG.repeat_interleave(128, 1))
    full = nn.Linear(in_features, out_features, bias=False)
    full.weight.data.copy_(half.weight)
    return packed, half, full


def calls_of(
    layers: list[tuple[Int4Linear, nn.Linear, nn.Linear]], x: Tensor
) -> dict[str, Callable[[], Any]]:
    """One call per path; each goes once through all copies of the layer."""
    x32, x16 = x.float(), x.bfloat16()

    def packed(kernel: str, activations: Tensor) -> Callable[[], Any]:
        def call() -> None:
            for layer, _, _ in layers:
                layer.kernel = kernel
                layer(activations)

        return call

    return {
        "dense bf16": lambda: [half(x16) for _, half, _ in layers],
        "dense fp32": lambda: [full(x32) for _, _, full in layers],
        "native bf16": packed("native", x16),
        "aten bf16": packed("aten", x16),
        "dequant bf16": packed("dequant", x16),
        "dequant fp32": packed("dequant", x32),
    }


@torch.inference_mode()
def measure(
    copies: int, repeats: int, seconds: float, clock: Callable[[], float]
) -> dict[str, dict[int, float]]:
    """Median seconds of one decoder layer's linears, by path and number of tokens."""
    totals: dict[str, dict[int, float]] = {path: dict.fromkeys(TOKENS, 0.0) for path in PATHS}
    for (out_features, in_features), count in SHAPES:
        layers = [layers_of(out_features, in_features) for _ in range(copies)]
        for tokens in TOKENS:
            calls = calls_of(layers, torch.randn(tokens, in_features))
            times: dict[str, list[float]] = {path: [] for path in PATHS}
            for call in calls.values():
                call()
            deadline = time.perf_counter() + seconds
            for repeat in range(repeats):
                if repeat >= 3 and time.perf_counter() > deadline:
                    break
                for path, call in calls.items():
                    start = clock()
                    call()
                    times[path].append(clock() - start)
            for path in PATHS:
                totals[path][tokens] += median(times[path]) / copies * count
    return totals


def crossover(fused: dict[int, float], dense: dict[int, float]) -> int | None:
    """Tokens at which two columns meet, log-linear between rows; None if the fused one wins throughout."""
    for low, high in itertools.pairwise(TOKENS):
        before, after = math.log(fused[low] / dense[low]), math.log(fused[high] / dense[high])
        if before < 0 <= after:
            return int(low * (high / low) ** (before / (before - after)))
    return None if fused[TOKENS[-1]] < dense[TOKENS[-1]] else 0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1, help="pinned; default: %(default)s")
    parser.add_argument("--copies", type=int, default=4, help="of each layer; default: %(default)s")
    parser.add_argument("--repeats", type=int, default=30, help="at most; default: %(default)s")
    parser.add_argument("--seconds", type=float, default=2.0, help="per row and shape; default: %(default)s")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    clock = time.thread_time if args.threads == 1 else time.perf_counter
    seconds = measure(args.copies, args.repeats, args.seconds, clock)

    native = dequant.cpu_multiplies_bfloat16()
    print(
        f"{cpu_name()}, {torch.backends.cpu.get_cpu_capability()}, bfloat16 arithmetic: {native}, "
        f"{args.threads} thread(s), {clock.__name__}"
    )
    print("speed over dense bf16 / over dense fp32; ms: one decoder layer's seven linears, dense bf16")
    print(f"{'tokens':>6} {'ms':>8}  " + "".join(f"{path:>16}" for path in PATHS[1:]))
    for tokens in TOKENS:
        half, full = seconds["dense bf16"][tokens], seconds["dense fp32"][tokens]
        cells = (
            f"{half / seconds[path][tokens]:7.2f}/{full / seconds[path][tokens]:.2f}" for path in PATHS[1:]
        )
        print(f"{tokens:6} {1e3 * half:8.2f}  " + "".join(f"{cell:>16}" for cell in cells))
    meeting = crossover(seconds["aten bf16"], seconds["dequant bf16"])
    where = (
        "aten is faster at every row"
        if meeting is None
        else f"aten and dequant bf16 meet at {meeting} tokens"
    )
    print(f"{where}; by default {DEFAULT_TOKENS}")
    result = {
        "benchmark": "int4_cpu",
        **machine(),
        "bfloat16_arithmetic": native,
        "clock": clock.__name__,
        "crossover_tokens": meeting,
        "default_crossover_tokens": DEFAULT_TOKENS,
        "seconds": {
            path: {str(tokens): value for tokens, value in row.items()} for path, row in seconds.items()
        },
    }
    report(result, args.out)


if __name__ == "__main__":
    main()
