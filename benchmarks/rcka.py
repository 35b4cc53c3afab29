"""python benchmarks/rcka.py [--threads N] [--dtype bfloat16] [--out benchmarks/results/rcka.json]

What relational CKA of a micro-batch costs on this CPU, forward and backward: one image after the other through
autograd (`rcka_per_image_plain`) against padded batches with the gradient formed in the forward pass
(`rcka_per_image`). The two take turns and the median is taken. With one thread the clock is that thread's CPU
time, which other processes on the machine hardly touch; with more it is the wall's. Memory is what the process
holds at the most, above what it held before.

Floor: the multiply-adds that the cheaper space needs, symmetric products counted half, at the rate of one
large matrix product measured in the same run.

Prints a table and, last, one line of JSON.
"""

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from measure import cpu_name, machine, peak_gb, report
from torch import Tensor

from grace.distill.rcka import rcka_per_image, rcka_per_image_plain
from grace.distill.rcka_fused import ImageShape, cheaper_space, multiply_adds

# Tokens of each image, and features of student and teacher.
CASES = {
    "16 x 196": ([196] * 16, 2048, 4096),
    "16 x 64..196": ([64 + 132 * i // 15 for i in range(16)], 2048, 4096),
    "64 x 9": ([9] * 64, 128, 256),
    "4 x 1024": ([1024] * 4, 2048, 4096),
    "64 x 1024, narrow": ([1024] * 64, 64, 96),
}
PATHS = {"plain": rcka_per_image_plain, "batched": rcka_per_image}
Loss = Callable[[list[Tensor], list[Tensor]], tuple[Tensor, Tensor]]


def run(loss: Loss, student: list[Tensor], teacher: list[Tensor]) -> None:
    for image in student:
        image.grad = None
    loss(student, teacher)[0].sum().backward()


def measure(
    case: tuple[list[int], int, int],
    dtype: torch.dtype,
    repeats: int,
    seconds: float,
    clock: Callable[[], float],
) -> dict[str, dict[str, Any]]:
    """Median seconds and peak bytes of each path."""
    sizes, d_student, d_teacher = case
    student = [torch.randn(n, d_student).to(dtype).requires_grad_() for n in sizes]
    teacher = [torch.randn(n, d_teacher).to(dtype) for n in sizes]
    memory = {path: peak_mb(loss, student, teacher) for path, loss in PATHS.items()}
    times: dict[str, list[float]] = {path: [] for path in PATHS}
    deadline = time.perf_counter() + seconds
    for repeat in range(repeats):
        if repeat >= 3 and time.perf_counter() > deadline:
            break
        for path, loss in PATHS.items():
            start = clock()
            run(loss, student, teacher)
            times[path].append(clock() - start)
    return {path: {"seconds": median(times[path]), "peak_mb": memory[path]} for path in PATHS}


def peak_mb(loss: Loss, student: list[Tensor], teacher: list[Tensor]) -> float:
    """What one call adds at its peak, the gradients it returns included."""
    for image in student:
        image.grad = None
    return 1e3 * peak_gb(lambda: run(loss, student, teacher))[0]


def matmul_rate(clock: Callable[[], float]) -> float:
    """Multiply-adds per second of a large float32 product."""
    a = torch.randn(2048, 2048)
    times = []
    for _ in range(7):
        start = clock()
        torch.mm(a, a)
        times.append(clock() - start)
    return 2048**3 / min(times)


def needed(case: tuple[list[int], int, int]) -> int:
    """Multiply-adds of the cheaper space."""
    shapes = [ImageShape(n, *case[1:]) for n in case[0]]
    return sum(multiply_adds(shape, cheaper_space(shape)) for shape in shapes)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1, help="pinned; default: %(default)s")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the inputs")
    parser.add_argument("--repeats", type=int, default=15, help="at most; default: %(default)s")
    parser.add_argument("--seconds", type=float, default=6.0, help="per row; default: %(default)s")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    clock = time.thread_time if args.threads == 1 else time.perf_counter
    rate = matmul_rate(clock)

    print(
        f"{cpu_name()}, {torch.backends.cpu.get_cpu_capability()}, {args.threads} thread(s), {clock.__name__}; "
        f"matrix product {2e-9 * rate:.0f} GFLOP/s; inputs in {args.dtype}"
    )
    print(
        f"{'images x tokens':18} {'widths':>10} {'plain ms':>9} {'batched':>9} {'ratio':>6} "
        f"{'plain MB':>9} {'batched':>8} {'GFLOP':>7} {'of rate':>8}"
    )
    rows = {}
    for name, case in CASES.items():
        result = measure(case, getattr(torch, args.dtype), args.repeats, args.seconds, clock)
        plain, batched = result["plain"], result["batched"]
        row = {
            **result,
            "ratio": plain["seconds"] / batched["seconds"],
            "space": cheaper_space(ImageShape(max(case[0]), *case[1:])),
            "floor_flop": 2 * needed(case),
            "fraction_of_matmul_rate": needed(case) / rate / batched["seconds"],
        }
        rows[name] = row
        print(
            f"{name:18} {case[1]:>5}/{case[2]:<4} {1e3 * plain['seconds']:9.2f} {1e3 * batched['seconds']:9.2f} "
            f"{row['ratio']:6.2f} {plain['peak_mb']:9.0f} {batched['peak_mb']:8.0f} "
            f"{1e-9 * row['floor_flop']:7.2f} {row['fraction_of_matmul_rate']:8.0%}"
        )
    result = {
        "benchmark": "rcka",
        **machine(),
        "clock": clock.__name__,
        "dtype": args.dtype,
        "matmul_flop_per_second": 2 * rate,
        "rows": rows,
    }
    report(result, args.out)


if __name__ == "__main__":
    main()
