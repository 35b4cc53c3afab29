"""python benchmarks/decode_cuda.py [--model qwen3-vl-2b] [--context 512] [--out benchmarks/results/decode_cuda.json]

Decoding on this CUDA device with 4-bit and with bfloat16 weights, in the same engine: `GraphDecoder`, one captured
graph per batch size, fused projections and the bfloat16 head in both. Random weights of the published shape, the same
for both, one model at a time in memory; the Triton settings are timed first.

For batches of 1 to 64 with `--context` tokens in every row: tokens/s of both, their ratio (bound: 2.0 at batch 1, 1.5 at
16, never below 1), and for a prompt of `--context` tokens the time to its last logits (bound: 0.9 of bfloat16's speed).
A step's time is the median of single steps, each synchronised. A machine without a CUDA device is told so (exit code 2).

Prints a table and, last, one line of JSON.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from measure import machine, report

from grace.data.template import Sample
from grace.errors import UserError, run_command
from grace.runtime.graphs import BUCKETS, GraphDecoder, tune
from grace.runtime.loading import load_model
from grace.runtime.synthetic import NAMES, SyntheticModel

STEPS = 30
VOCABULARY = 1000  # ids drawn from


def prompt(tokens: int) -> Sample:
    """Random text."""
    ids_L = torch.randint(0, VOCABULARY, (tokens,))
    return Sample(ids_L, torch.full_like(ids_L, -100), torch.zeros_like(ids_L), None, None, "")


def seconds(work: Callable[[], Any], repeats: int) -> float:
    """Median of single runs, the first left out."""
    times = []
    for _ in range(repeats + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return median(times[1:])


def measure(directory: Path, context: int, device: str = "cuda") -> dict[str, Any]:
    """Seconds of a step by batch, of a prompt, and bytes on the device."""
    model = load_model(directory, torch.bfloat16).to(device)
    decoder = GraphDecoder(model, BUCKETS[-1], context + STEPS + 1)
    tune(decoder, lambda line: print(line, file=sys.stderr))
    decoder.warm_up()
    first = prompt(context)
    result: dict[str, Any] = {"prefill": seconds(lambda: decoder.prefill(0, first), 5), "steps": {}}
    for rows in BUCKETS:
        batch = list(range(rows))
        for row in batch:
            decoder.prefill(row, first)
        result["steps"][rows] = seconds(lambda batch=batch: decoder.decode(batch, [1] * len(batch)), STEPS)
    result["bytes"] = sum(
        tensor.nbytes for tensor in {**dict(model.named_parameters()), **dict(model.named_buffers())}.values()
    )
    return result


def run(args: argparse.Namespace) -> int:
    if not torch.cuda.is_available():
        raise UserError("this benchmark needs a CUDA device, and there is none here")
    with tempfile.TemporaryDirectory() as name:
        packed, dense = Path(name) / "awq", Path(name) / "bf16"
        SyntheticModel(args.model).write(packed, dense)
        four = measure(packed, args.context)
        torch.cuda.empty_cache()
        half = measure(dense, args.context)
    print(f"{torch.cuda.get_device_name()}, {args.model}, {args.context} tokens of context")
    print(f"{'batch':>6}{'int4 tokens/s':>15}{'bf16 tokens/s':>15}{'ratio':>8}")
    ratios = {}
    for rows in BUCKETS:
        one, other = four["steps"][rows], half["steps"][rows]
        ratios[rows] = other / one
        print(f"{rows:6}{rows / one:15.0f}{rows / other:15.0f}{ratios[rows]:8.2f}")
    prefill = half["prefill"] / four["prefill"]
    print(f"prompt of {args.context}: {1e3 * four['prefill']:.1f} ms, {prefill:.2f} of bfloat16's speed")
    about = {"benchmark": "decode_cuda", **machine("cuda"), "model": args.model, "context": args.context}
    report({**about, "int4": four, "bf16": half, "decode_ratio": ratios, "prefill_ratio": prefill}, args.out)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=list(NAMES), default="qwen3-vl-2b")
    parser.add_argument("--context", type=int, default=512, help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    args = parser.parse_args()
    return run_command(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
