"""python benchmarks/save.py [--every 10] [--blocks 5] [--width 2048] [--tokens 1024] [--out FILE]

What saving costs a training loop: steps of two decoder layers at the 2B shape with AdamW (weights and two moments are saved,
float32), without checkpoints, with the background saver of `grace.checkpoint_saver`, and with the same checkpoints
written in the loop. The three take turns, block by block, and what is compared are the medians of their blocks; with two
cores the writing thread takes time from the steps too, which counts.

Prints a table and, last, one line of JSON.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from measure import machine, report
from torch import nn

from grace.checkpoint_saver import CheckpointSaver
from grace.resume_checkpoint import save_checkpoint

WIDTH, TOKENS = 2048, 1024


class Block(nn.Module):
    """The linears of a decoder layer at the 2B shape, without attention."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix = nn.ModuleList([nn.Linear(width, width, bias=False) for _ in range(3)])
        self.gate, self.up = (nn.Linear(width, 3 * width, bias=False) for _ in range(2))
        self.down = nn.Linear(3 * width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.mix:
            x = x + layer(x)
        return x + self.down(nn.functional.silu(self.gate(x)) * self.up(x))


def block_of_steps(
    kind: str, block: int, state: tuple[nn.Module, torch.optim.Optimizer], args: Any, saver: CheckpointSaver
) -> tuple[float, float]:
    """(seconds a step, seconds a save holds the loop) of as many steps as lie between two checkpoints, and one of these.

    In its place of the one before, as in a run.
    """
    model, optimizer = state
    x = torch.randn(args.tokens, args.width)
    held = 0.0
    start = time.perf_counter()
    for step in range(args.every):
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        if step == 0 and kind != "none":  # the next ones run beside the writing
            before = time.perf_counter()
            moments = (
                (i, key, value)
                for i, one in enumerate(optimizer.state.values())
                for key, value in one.items()
            )
            tensors = {
                "trainable": dict(model.named_parameters()),
                "optimizer": {f"{i}.{key}": value for i, key, value in moments},
            }
            if kind == "background":
                saver.save(block, tensors, {})
            else:
                save_checkpoint(saver.run_dir, block, tensors, {}, 1)
            held += time.perf_counter() - before
    before = time.perf_counter()
    saver.wait()
    held += time.perf_counter() - before
    return (time.perf_counter() - start) / args.every, held


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--every", type=int, default=10, help="steps between checkpoints; default: %(default)s"
    )
    parser.add_argument("--blocks", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--width", type=int, default=WIDTH, help="of the layers; default: %(default)s")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of a step; default: %(default)s")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    args = parser.parse_args()
    torch.manual_seed(0)
    model = nn.Sequential(Block(args.width), Block(args.width))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    work = Path(tempfile.mkdtemp(prefix="grace-save-", dir="."))
    kinds: dict[str, list[tuple[float, float]]] = {"none": [], "background": [], "in the loop": []}
    savers = {kind: CheckpointSaver(work / kind.replace(" ", "_"), keep_last=1) for kind in kinds}
    try:
        for block in range(args.blocks + 1):
            for kind, rows in kinds.items():
                row = block_of_steps(kind, block, (model, optimizer), args, savers[kind])
                if block:  # the first makes the optimizer's state and the saver's memory, and warms up
                    rows.append(row)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    middle = {
        kind: [statistics.median(row[i] for row in rows) for i in (0, 1)] for kind, rows in kinds.items()
    }
    size = 3 * 4 * sum(p.numel() for p in model.parameters()) / 1e9
    base = middle["none"][0]
    print(f"checkpoints of {size:.3g} GB, one in {args.every} steps")
    for kind, (step, held) in middle.items():
        print(
            f"{kind:12} {step:.4f} s a step, {100 * (step / base - 1):+.1f} %; a save holds the loop for {held:.3f} s"
        )
    result = {
        "benchmark": "save", **machine(), "gb": size, "steps_between": args.every, "blocks": args.blocks,
        "step_s": base, "gb_per_step_second": size / (args.every * base),
        "overhead": {k: v[0] / base - 1 for k, v in middle.items()}, "held_s": {k: v[1] for k, v in middle.items()},
    }  # fmt: skip
    report(result, args.out)


if __name__ == "__main__":
    main()
