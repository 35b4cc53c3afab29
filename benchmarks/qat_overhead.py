"""python benchmarks/qat_overhead.py [--threads N] [--device cuda --layers 28] [--out benchmarks/results/qat_overhead.json]

What quantization-aware training costs over fine-tuning the same model in bf16; DESIGN section 9 allows 5 %.
Decoder layers of the Qwen3-VL-2B shape, fp32 latents under bf16 autocast as `grace.train` has them: forward,
backward and fused AdamW, 4 micro-batches of 2k tokens a step, without and with gradient checkpointing. Both
models live in one process and take turns micro-batch by micro-batch; medians, and the ratios of neighbours.
With one thread the clock is that thread's processor time, which other processes on the machine hardly touch;
with more, and on a GPU, it is the wall's.

Why W_hat is formed in every micro-batch, not once a step. Bytes moved per weight and micro-batch:

                            forward                    backward                 together
    bf16 fine-tuning        cast      4 in, 2 out      cast      2 in, 4 out    12
    QAT                     quantize  4 in, 2 out      gradients 6 in, 4 out    16
    QAT, W_hat kept         nothing after the first    gradients 6 in, 4 out    10 + 6 / micro-batches

Beside that stand 6 T flops (8 T with checkpointing) for T tokens. QAT's forward pass moves what autocast's cast
of the same weight moves; what it adds is one more read of the latent in the backward pass. Keeping W_hat
would win those bytes back, for 2 bytes a weight held all step and a cache that gathers (FSDP, ZeRO-3),
recomputation, evaluation and resume could each leave stale. The bound is met without.

An estimate for the full 2B model (1.41e9 decoder weights) on an H100, not a measurement: 5.6 GB more at about
2.6 TB/s are 2.2 ms a micro-batch. For T = 2048 fine-tuning takes some 65 ms of it: 17.3 TFLOP at 600 TFLOP/s
(29 ms), casts and gradient accumulation (34 GB, 13 ms), unfused norms, rotations and activations (about 60 GB,
23 ms). That makes about 3 %, and 1 % for T = 8192. `--device cuda --layers 28` measures it.

Prints tables and, last, one line of JSON.
"""

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles
from typing import Any

# Two threads on one core wait a time slice for each other at every operation; must be set before torch starts.
os.environ.setdefault("OMP_PROC_BIND", "true")

import torch
from measure import machine, peak_gb, report
from torch import Tensor
from transformers import Qwen3VLForConditionalGeneration

from grace.models import qwen3vl
from grace.quant import fake_quant

PUBLISHED = "Qwen/Qwen3-VL-2B-Instruct"
ARMS = ("bf16", "qat")
BITS, GROUP_SIZE = 4, 128


class Arm:
    """One model with its optimizer: the decoder alone, on given embeddings."""

    def __init__(self, layers: int, quantized: bool, device: str):
        config = qwen3vl.config_for(PUBLISHED)
        config._attn_implementation = "sdpa"
        text, vision = config.text_config, config.vision_config
        text.num_hidden_layers, text.vocab_size = layers, 512
        vision.depth, vision.deepstack_visual_indexes = 1, []
        torch.manual_seed(0)
        with torch.device(device):
            self.model = Qwen3VLForConditionalGeneration(config)
        linears = qwen3vl.quantize_decoder(self.model, BITS, GROUP_SIZE) if quantized else {}
        self.decoder = self.model.model.language_model.train()
        self.decoder.embed_tokens.requires_grad_(False)
        thetas = [linear.theta for linear in linears.values()]
        theta_ids = {id(theta) for theta in thetas}
        others = [p for p in self.decoder.parameters() if p.requires_grad and id(p) not in theta_ids]
        groups: list[dict[str, Any]] = [{"params": others, "weight_decay": 1e-3}]
        if quantized:
            groups.append({"params": thetas, "lr": 1e-4, "weight_decay": 0.0})
        self.optimizer = torch.optim.AdamW(groups, lr=1e-5, fused=True)

    def micro_batch(self, embeddings_BLD: Tensor, direction_BLD: Tensor) -> float:
        """Forward and backward; the gradients accumulate."""
        with torch.autocast(embeddings_BLD.device.type, torch.bfloat16):
            hidden_BLD = self.decoder(inputs_embeds=embeddings_BLD, use_cache=False).last_hidden_state
            loss = (hidden_BLD * direction_BLD).float().mean()
        loss.backward()
        return loss.item()

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def seconds_of(work: Callable[[], Any], device: str) -> float:
    """With one CPU thread its processor time, which other processes hardly touch; else the wall's."""
    clock = time.thread_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    if device != "cpu":
        torch.cuda.synchronize()
    start = clock()
    work()
    if device != "cpu":
        torch.cuda.synchronize()
    return clock() - start


def some_inputs(args: argparse.Namespace) -> list[Tensor]:
    """Embeddings, and what the loss weighs the final hidden states with."""
    width = qwen3vl.config_for(PUBLISHED).text_config.hidden_size
    return [torch.randn(1, args.tokens, width, device=args.device) for _ in range(2)]


def compare(arms: dict[str, Arm], args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a step per arm and QAT's overhead: arms alternate, micro-batch by micro-batch."""
    inputs = some_inputs(args)
    pieces = [f"micro-batch {index + 1}" for index in range(args.micro_batches)] + ["optimizer"]
    times: dict[str, dict[str, list[float]]] = {name: {piece: [] for piece in pieces} for name in ARMS}
    deadline = time.perf_counter() + args.seconds
    for repeat in range(args.repeats):
        if repeat and time.perf_counter() > deadline:
            break
        for number, piece in enumerate(pieces):
            for name in ARMS if (repeat + number) % 2 else ARMS[::-1]:
                arm = arms[name]
                work = arm.step if piece == "optimizer" else lambda arm=arm: arm.micro_batch(*inputs)
                times[name][piece].append(seconds_of(work, args.device))
    step = {name: sum(median(times[name][piece]) for piece in pieces) for name in ARMS}
    ratios = [
        qat / bf16
        for piece in pieces[:-1]
        for qat, bf16 in zip(times["qat"][piece], times["bf16"][piece], strict=True)
    ]
    return {
        "seconds": {name: {piece: median(times[name][piece]) for piece in pieces} for name in ARMS},
        "repeats": len(times["bf16"]["optimizer"]),
        "overhead_percent": 100 * (step["qat"] / step["bf16"] - 1),
        "neighbours_percent": [100 * (ratio - 1) for ratio in quantiles(ratios, n=4)],
    }


def quantizer_alone(arm: Arm, device: str, repeats: int = 15) -> dict[str, dict[str, float]]:
    """The first layer's seven linears: quantizer and the casts it replaces, against copies."""
    linears = list(qwen3vl.quantized_linears(arm.model).values())[:7]
    pairs = [(linear.weight.detach(), linear.theta.detach()) for linear in linears]
    grads = [torch.randn_like(weight).bfloat16() for weight, _ in pairs]
    kernels = fake_quant.kernels_for(pairs[0][0])
    spare = [torch.empty_like(weight) for weight, _ in pairs]
    works: dict[str, tuple[int, Callable[[], Any]]] = {  # bytes moved per weight
        "copy": (8, lambda: [b.copy_(w) for b, (w, _) in zip(spare, pairs, strict=True)]),
        "copy to new memory": (8, lambda: [w.clone() for w, _ in pairs]),  # as all that follow
        "cast to bf16": (6, lambda: [w.bfloat16() for w, _ in pairs]),
        "quantize to bf16": (6, lambda: [kernels.forward(w, t, GROUP_SIZE, BITS, torch.bfloat16) for w, t in pairs]),
        "cast gradient": (6, lambda: [grad.float() for grad in grads]),
        "both gradients": (10, lambda: [kernels.backward(w, t, g, GROUP_SIZE, BITS) for (w, t), g in zip(pairs, grads, strict=True)]),
    }  # fmt: skip
    count = sum(weight.numel() for weight, _ in pairs)
    rows: dict[str, dict[str, float]] = {}
    for name, (size, work) in works.items():
        work()
        seconds = median(seconds_of(work, device) for _ in range(repeats))
        rate = count * size / seconds / 1e9
        rows[name] = {"ms": 1e3 * seconds, "gb_per_s": rate}
    return rows


def from_parts(alone: dict[str, dict[str, float]], step: dict[str, Any], layers: int, forwards: int) -> float:
    """Overhead in percent, from what the quantizer takes beyond the casts; the rest of both steps is the same."""
    ms = {name: row["ms"] for name, row in alone.items()}
    extra = (
        forwards * (ms["quantize to bf16"] - ms["cast to bf16"]) + ms["both gradients"] - ms["cast gradient"]
    )
    micro_batches = list(step["seconds"]["bf16"].values())[:-1]
    return 100 * layers * extra / 1e3 / (sum(micro_batches) / len(micro_batches))


def measure(arms: dict[str, Arm], args: argparse.Namespace) -> dict[str, Any]:
    """Prints both tables; the figures for the line of JSON."""
    alone = quantizer_alone(arms["qat"], args.device)
    print(
        f"{machine(args.device)['device']}, {torch.get_num_threads()} thread(s); one layer's seven linears:"
    )
    new_memory = alone["copy to new memory"]["gb_per_s"]
    for name, row in alone.items():
        share = f"{100 * row['gb_per_s'] / new_memory:5.0f} % of a copy to new memory"
        print(f"  {name:<20}{row['ms']:9.2f} ms{row['gb_per_s']:9.1f} GB/s{share}")
    inputs = some_inputs(args)
    memory = {
        name: peak_gb(lambda arm=arm: arm.micro_batch(*inputs), args.device)[0] for name, arm in arms.items()
    }
    if (
        args.device != "cpu"
    ):  # resident memory says nothing about a few MB; tests/quant counts tensors instead
        print(
            f"peak of a micro-batch and its gradients: bf16 {memory['bf16']:.3f} GB, qat {memory['qat']:.3f} GB"
        )
    for arm in arms.values():  # the optimizer's state comes into being
        arm.step()
    print(
        f"{args.layers} layers, {args.micro_batches} x {args.tokens} tokens; seconds of a step, QAT's overhead"
    )
    print(
        f"  {'checkpointing':<15}{'bf16':>8}{'qat':>8}{'overhead':>10}{'from parts':>12}{'neighbours (quartiles)':>28}"
    )
    steps = {}
    for forwards, mode in enumerate(("off", "on"), start=1):
        if mode == "on":
            for arm in arms.values():
                qwen3vl.enable_checkpointing(arm.model)
        row = steps[mode] = compare(arms, args)
        row["from_parts_percent"] = from_parts(alone, row, args.layers, forwards)
        bf16, qat = (sum(row["seconds"][name].values()) for name in ARMS)
        quartiles = "".join(f"{value:7.1f} %" for value in row["neighbours_percent"])
        overheads = f"{row['overhead_percent']:8.1f} %{row['from_parts_percent']:10.1f} %"
        print(f"  {mode:<15}{bf16:8.3f}{qat:8.3f}{overheads}{quartiles:>28}", flush=True)
    return {
        "overhead_percent": {mode: row["overhead_percent"] for mode, row in steps.items()},
        "micro_batch_peak_gb": memory if args.device != "cpu" else None,
        "quantizer_alone": alone,
        "checkpointing": steps,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda; default: %(default)s")
    parser.add_argument("--layers", type=int, default=2, help="28 is the whole model; default: %(default)s")
    parser.add_argument("--tokens", type=int, default=2048, help="of a micro-batch; default: %(default)s")
    parser.add_argument("--micro-batches", type=int, default=4, help="of a step; default: %(default)s")
    parser.add_argument("--repeats", type=int, default=20, help="steps at most; default: %(default)s")
    parser.add_argument("--seconds", type=float, default=60, help="per table row; default: %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU; default: %(default)s")
    parser.add_argument("--torch-ops", action="store_true", help="on cuda: without the Triton kernels")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.device != "cpu" and not args.torch_ops:
        from grace.kernels import fake_quant_triton

        fake_quant.use_kernels("cuda", fake_quant_triton)
    arms = {name: Arm(args.layers, name == "qat", args.device) for name in ARMS}
    result = {
        "benchmark": "qat_overhead",
        **machine(args.device),
        "layers": args.layers,
        "tokens": args.tokens,
        "micro_batches": args.micro_batches,
        "kernels": "torch" if args.device == "cpu" or args.torch_ops else "triton",
        "bound_percent": 5.0,
        **measure(arms, args),
    }
    report(result, args.out)


if __name__ == "__main__":
    main()
