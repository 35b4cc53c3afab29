"""python benchmarks/fused_loss.py [--device cuda] [--tokens 512 2048 8192] [--out benchmarks/results/fused_loss.json]

Time and memory of `fused_ce_gdkd` at Qwen3-VL size (V = 151,936, student width 2,048, teacher width 4,096, bfloat16),
forward and backward, against two dense ways of the same loss:

- dense: both models' logits at every position of the sequence, as a model's forward pass gives them, then
  the plain losses of `grace.distill` at the supervised third;
- supervised: logits at the supervised positions only.

The floor is the four matrix products that nothing can avoid (student logits, teacher logits, gradient of
hidden states and of the head), timed in the same run. Memory is what the call adds at its peak, less the
head's gradient (T x 2,048 gradients of the hidden states included). Paths take turns; times are the best.

Prints a table and, last, one line of JSON.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measure import machine, peak_gb, report
from torch import Tensor

from grace.distill.gdkd import confidence_gate, dkd_per_token, fused_ce_gdkd

SEQUENCE = 3  # positions per supervised one


def dense(
    hidden_LD: Tensor,
    head_VD: Tensor,
    teacher_LE: Tensor,
    teacher_VE: Tensor,
    targets_T: Tensor,
    at_T: Tensor,
) -> None:
    """Full-sequence logits of both models, then the plain losses, then backward."""
    student_TV, teacher_TV = F.linear(hidden_LD, head_VD)[at_T], F.linear(teacher_LE, teacher_VE)[at_T]
    ce = F.cross_entropy(student_TV.float(), targets_T, reduction="sum")
    gate_T = confidence_gate(teacher_TV)
    kd = (gate_T * dkd_per_token(student_TV, teacher_TV, targets_T)).sum()
    ((ce + kd) / len(targets_T)).backward()


def products(hidden_TD: Tensor, head_VD: Tensor, teacher_TE: Tensor, teacher_VE: Tensor, rows: int) -> None:
    """The four products, chunk by chunk into buffers that are there."""
    logits = head_VD.new_empty(rows, len(head_VD))
    grad_VD = torch.zeros_like(head_VD)
    for start in range(0, len(hidden_TD), rows):
        x, t = hidden_TD[start : start + rows], teacher_TE[start : start + rows]
        out = logits[: len(x)]
        torch.mm(t, teacher_VE.T, out=out)
        torch.mm(x, head_VD.T, out=out)
        torch.mm(out, head_VD)
        grad_VD.addmm_(out.T, x)


def measure(tokens: int, args: argparse.Namespace) -> dict[str, Any]:
    """Best seconds and peak GB of every path at one number of supervised tokens."""
    make: dict[str, Any] = {"device": args.device, "dtype": torch.bfloat16}
    hidden = torch.randn(tokens, args.width, **make).requires_grad_()
    head = (torch.randn(args.vocabulary, args.width, **make) * args.width**-0.5).requires_grad_()
    teacher = torch.randn(tokens, args.teacher_width, **make)
    teacher_head = torch.randn(args.vocabulary, args.teacher_width, **make) * args.teacher_width**-0.5
    targets = torch.randint(args.vocabulary, (tokens,), device=args.device)
    head_grad_gb = head.numel() * head.element_size() / 1e9

    def fused() -> None:
        total, _ = fused_ce_gdkd(
            hidden, head, teacher, teacher_head, targets, ce_scale=1 / tokens, gdkd_scale=1 / tokens
        )
        total.backward()

    paths: dict[str, Callable[[], None]] = {"fused": fused}
    if tokens <= args.dense_up_to:
        at = torch.arange(tokens, device=args.device) * SEQUENCE
        wide = hidden.detach().repeat_interleave(SEQUENCE, 0).requires_grad_()
        teacher_wide = teacher.repeat_interleave(SEQUENCE, 0)
        paths["dense"] = lambda: dense(wide, head, teacher_wide, teacher_head, targets, at)
        every = torch.arange(tokens, device=args.device)
        paths["supervised"] = lambda: dense(hidden, head, teacher, teacher_head, targets, every)
        rows = 512 if args.device == "cpu" else 2048
        paths["products"] = lambda: products(hidden.detach(), head.detach(), teacher, teacher_head, rows)
    result: dict[str, Any] = {"tokens": tokens, "seconds": {}, "extra_gb": {}}
    for _ in range(args.repeats):
        for name, path in paths.items():
            head.grad = hidden.grad = None
            start = time.perf_counter()
            peak, _ = peak_gb(path, args.device)
            seconds = time.perf_counter() - start
            result["seconds"][name] = min(seconds, result["seconds"].get(name, seconds))
            result["extra_gb"][name] = max(peak - head_grad_gb, result["extra_gb"].get(name, 0.0))
    fused_s = result["seconds"]["fused"]
    if "products" in paths:
        result["floor_fraction"] = result["seconds"]["products"] / fused_s
    result["speedup"] = {
        name: s / fused_s for name, s in result["seconds"].items() if name not in ("fused", "products")
    }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument(
        "--dense-up-to", type=int, default=512, help="more tokens: fused alone; default: %(default)s"
    )
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--teacher-width", type=int, default=4096)
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    args = parser.parse_args()
    torch.manual_seed(0)
    results = []
    print(f"{'tokens':>6} {'path':>12} {'s':>8} {'over fused':>11} {'extra GB':>9}")
    for tokens in args.tokens:
        results.append(measure(tokens, args))
        for name, seconds in results[-1]["seconds"].items():
            ratio, extra = seconds / results[-1]["seconds"]["fused"], results[-1]["extra_gb"][name]
            print(f"{tokens:6} {name:>12} {seconds:8.2f} {ratio:11.2f} {extra:9.2f}", flush=True)
    shape = {"vocabulary": args.vocabulary, "width": args.width, "teacher_width": args.teacher_width}
    result = {"benchmark": "fused_loss", **machine(args.device), **shape, "rows": results}
    report(result, args.out)


if __name__ == "__main__":
    main()
