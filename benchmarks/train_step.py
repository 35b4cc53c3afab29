"""python benchmarks/train_step.py [--device cuda --layers 28 --teacher-layers 36 --sequence 4096] [--out FILE]

One GRACE step (teacher first, then the student with accumulation, then AdamW) at Qwen3-VL widths: tokens/s, peak
memory and where the time goes, beside the dense formulation in the same run. Dense is what the public code does, built
from this project's own oracles: logits of both models at every position, plain losses on them, micro-batch by
micro-batch, a fake quantizer of plain autograd operations. "Cached" is the fused step without its teacher.

The default is a slice of the real shape that fits this CPU: two decoder layers of each model, the whole
vocabulary, one picture of 196 visual tokens in every sequence, a third of the positions supervised. Weights are random.
The token budget is what fits the dense path's memory, from the growth of both peaks between two sequence lengths.

Prints tables and, last, one line of JSON.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from measure import machine, peak_gb, report
from torch import Tensor, nn

import grace.step as step_module
import grace.student as student_module
from grace.data.batch import Batch
from grace.distill.cached import CachedSignals, cached_record, collate_cached
from grace.distill.gdkd import confidence_gate, dkd_per_token
from grace.distill.rcka import rcka_loss
from grace.distill.teacher import IGNORE_INDEX, supervised
from grace.models import qwen3vl
from grace.parallel import Replicas
from grace.quant import grid
from grace.step import forward_backward
from grace.student import Objective, StudentWithLoss, Weights, autocast

IMAGE_TOKENS, PATCH_GRID = 196, (1, 28, 28)
TOP_K = 64  # tokens that the cached teacher keeps
WEIGHTS = Weights(beta=0.5, omega=3.0)


class DenseQuantLinear(nn.Linear):
    """The quantizer as plain operations: autograd keeps each intermediate."""

    theta: Tensor

    def forward(self, input: Tensor) -> Tensor:
        weight_OGS = grid.grouped(self.weight, 128)
        exact = self.theta.exp().unsqueeze(-1)
        scale = exact + (grid.snapped_scale(self.theta).unsqueeze(-1) - exact).detach()
        ratio = (weight_OGS / scale).clamp(-8, 7)
        codes = ratio + (grid.rounded_ratio(ratio.detach(), torch.ones_like(scale[..., 0])) - ratio).detach()
        return F.linear(input, (codes * scale).reshape(self.weight.shape).to(input.dtype))


def models(args: argparse.Namespace) -> tuple[Any, Any]:
    """Student (float32) and teacher (bfloat16, frozen) with random weights."""
    pair = []
    for name, layers, dtype in (
        ("Qwen/Qwen3-VL-2B-Instruct", args.layers, torch.float32),
        ("Qwen/Qwen3-VL-8B-Instruct", args.teacher_layers, torch.bfloat16),
    ):
        config = qwen3vl.config_for(name)
        config.text_config.num_hidden_layers = layers
        config.vision_config.depth, config.vision_config.deepstack_visual_indexes = 2, [0]
        with torch.device(args.device):
            torch.set_default_dtype(dtype)
            pair.append(qwen3vl.Qwen3VLForConditionalGeneration(config).eval())
            torch.set_default_dtype(torch.float32)
    student, teacher = pair
    qwen3vl.freeze_vision(student)
    return student, teacher.requires_grad_(False)


def batch_of(length: int, model: Any, device: str) -> Batch:
    """One sequence: a picture, a question, an answer over the last third."""
    tokens = torch.randint(1000, 100_000, (1, length))
    image = torch.zeros(1, length, dtype=torch.bool)
    image[:, 4 : 4 + IMAGE_TOKENS] = True
    tokens[image] = model.config.image_token_id
    labels = torch.full_like(tokens, IGNORE_INDEX)
    labels[:, -length // 3 :] = tokens[:, -length // 3 :]
    pixels = torch.randn(PATCH_GRID[1] * PATCH_GRID[2], 3 * 2 * 16 * 16)
    grid_thw = torch.tensor([PATCH_GRID])
    return Batch(tokens, torch.ones_like(tokens), image.long(), labels, pixels, grid_thw, ["random"]).to(
        device
    )


def dense_step(student: Any, teacher: Any, batches: list[Batch]) -> None:
    """Forward and backward as the public code does it."""
    for batch in batches:
        with torch.no_grad():
            states = qwen3vl.hidden_states(teacher, batch)
            teacher_BLV = F.linear(states.final_BLD, qwen3vl.head_weight(teacher))
            teacher_visual = qwen3vl.visual_tokens(teacher, states.last_layer_input_BLD, batch)
        with autocast(batch.labels_BL.device, torch.bfloat16):
            states = qwen3vl.hidden_states(student, batch)
            student_BLV = F.linear(states.final_BLD, qwen3vl.head_weight(student))
            visual = qwen3vl.visual_tokens(student, states.last_layer_input_BLD, batch)
        targets = batch.labels_BL[:, 1:]
        valid = targets != IGNORE_INDEX
        logits = student_BLV.float()
        ce = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX)
        teacher_TV, targets_T = teacher_BLV[:, :-1][valid], targets[valid]
        gate_T = confidence_gate(teacher_TV)
        dkd_T = dkd_per_token(logits[:, :-1][valid], teacher_TV, targets_T)
        kd = (gate_T * dkd_T).sum() / gate_T.sum()
        loss = ce + WEIGHTS.beta * kd + WEIGHTS.omega * rcka_loss(visual, teacher_visual)
        (loss / len(batches)).backward()


@torch.inference_mode()
def cached_signals(teacher: Any, batches: Sequence[Batch]) -> list[CachedSignals]:
    """What a data loader would hand over: read from a cache, and of the teacher nothing else."""
    signals = []
    for batch in batches:
        states = qwen3vl.hidden_states(teacher, batch)
        hidden_TE, targets_T = supervised(states.final_BLD, batch.labels_BL)
        visual = qwen3vl.visual_tokens(teacher, states.last_layer_input_BLD, batch)
        record = cached_record(hidden_TE, qwen3vl.head_weight(teacher), targets_T, visual, TOP_K)
        signals.append(collate_cached([record]))
    return signals


@contextmanager
def timed(owner: Any, name: str, clock: dict[str, float], key: str, device: str) -> Iterator[None]:
    """Adds the time spent in `owner.name` to `clock[key]`."""
    inner = getattr(owner, name)

    def call(*args: Any, **options: Any) -> Any:
        start = now(device)
        result = inner(*args, **options)
        clock[key] = clock.get(key, 0.0) + now(device) - start
        return result

    setattr(owner, name, call)
    try:
        yield
    finally:
        setattr(owner, name, inner)


def now(device: str) -> float:
    """Seconds, after what was sent to the device is done."""
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(
    work: Callable[[], None], optimizer: torch.optim.Optimizer, args: argparse.Namespace
) -> tuple[float, float, float]:
    """(seconds of forward and backward, seconds of the optimizer, peak GB), the best of the repeats."""
    rows = []
    for _ in range(args.repeats + 1):  # the first makes the optimizer's state
        optimizer.zero_grad(set_to_none=True)
        start = now(args.device)
        peak, _ = peak_gb(work, args.device)
        middle = now(args.device)
        optimizer.step()
        rows.append((middle - start, now(args.device) - middle, peak))
    return min(row[0] for row in rows[1:]), min(row[1] for row in rows[1:]), max(row[2] for row in rows[1:])


def adamw(model: torch.nn.Module) -> torch.optim.AdamW:
    """The optimizer of every path."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)


def run_path(name: str, args: argparse.Namespace, accelerator: Accelerator) -> dict[str, Any]:
    """Both sequence lengths on one path."""
    torch.manual_seed(0)
    student, teacher = models(args)
    qwen3vl.quantize_decoder(student, 4, 128)
    if name == "dense":
        for layer in qwen3vl.quantized_linears(student).values():
            layer.__class__ = DenseQuantLinear
    else:
        qwen3vl.put_loss_head(student)
    if args.checkpointing:
        qwen3vl.enable_checkpointing(student)
    kernels = "triton" if args.device != "cpu" else "torch"
    vocabulary = student.config.text_config.vocab_size
    objective = Objective("gdkd", 2.0, 1.0, 4.0, vocabulary, student_module.row_kernel(kernels))
    parallel = Replicas(
        accelerator, StudentWithLoss(student, objective, torch.bfloat16), adamw, max_grad_norm=1.0
    )
    result: dict[str, Any] = {"lengths": {}}
    for length in (args.sequence // 2, args.sequence):
        batches = [batch_of(length, student, args.device) for _ in range(args.accumulate)]
        clock: dict[str, float] = {}
        cached = cached_signals(teacher, batches) if name == "cached" else []

        def work(batches: list[Batch] = batches, cached: list[Any] = cached) -> None:
            if name == "dense":
                dense_step(student, teacher, batches)
            else:
                signals, head_VE = cached, None
                if name == "fused":
                    signals = step_module.run_teacher(teacher, batches, vocabulary)
                    head_VE = qwen3vl.head_weight(teacher)
                forward_backward(parallel, batches, signals, WEIGHTS, "gdkd", head_VE)

        with (
            timed(step_module, "run_teacher", clock, "teacher and gates", args.device),
            timed(student_module, "micro_batch_loss", clock, "losses, head included", args.device),
        ):
            seconds, optimizer_s, peak = measure(work, parallel.optimizer, args)
        parts = {key: value / (args.repeats + 1) for key, value in clock.items()}
        result["lengths"][length] = {
            "tokens_per_s": length * args.accumulate / (seconds + optimizer_s),
            "peak_gb": peak, "forward_backward_s": seconds, "optimizer_s": optimizer_s, **parts,
        }  # fmt: skip
    return result


def budget(paths: dict[str, Any], args: argparse.Namespace) -> float:
    """Tokens of a micro-batch that the fused path fits into the dense path's peak, over the dense path's own."""
    short, long = args.sequence // 2, args.sequence
    fused, dense = (
        {length: row["peak_gb"] for length, row in paths[name]["lengths"].items()}
        for name in ("fused", "dense")
    )
    per_token = max((fused[long] - fused[short]) / (long - short), 1e-9)
    return 1 + (dense[long] - fused[long]) / per_token / long


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--teacher-layers", type=int, default=2)
    parser.add_argument("--sequence", type=int, default=1536)
    parser.add_argument(
        "--accumulate", type=int, default=2, help="micro-batches of one sequence; default: %(default)s"
    )
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    args = parser.parse_args()
    accelerator = Accelerator(mixed_precision="no", cpu=args.device == "cpu")
    paths = {name: run_path(name, args, accelerator) for name in ("fused", "dense", "cached")}
    for name, path in paths.items():
        for length, row in path["lengths"].items():
            parts = ", ".join(
                f"{key} {value:.2f}" for key, value in row.items() if key not in ("tokens_per_s", "peak_gb")
            )
            print(
                f"{name:6} {length:6} tokens: {row['tokens_per_s']:8.1f} tokens/s, {row['peak_gb']:.2f} GB above the weights; {parts}"
            )
    longest = {name: path["lengths"][args.sequence]["tokens_per_s"] for name, path in paths.items()}
    result = {
        "benchmark": "train_step", **machine(args.device), "layers": [args.layers, args.teacher_layers],
        "sequence": args.sequence, "accumulate": args.accumulate, "checkpointing": args.checkpointing,
        "speedup": longest["fused"] / longest["dense"], "cached_speedup": longest["cached"] / longest["fused"],
        "token_budget_ratio": budget(paths, args), "paths": paths,
    }  # fmt: skip
    print(
        f"fused over dense: {result['speedup']:.2f}x tokens/s, {result['token_budget_ratio']:.1f}x tokens in the same memory; "
        f"cached over living teacher: {result['cached_speedup']:.2f}x tokens/s"
    )
    report(result, args.out)


if __name__ == "__main__":
    main()
