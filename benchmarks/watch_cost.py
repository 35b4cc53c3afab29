"""python benchmarks/watch_cost.py [--device cuda] [--layers 2] [--out benchmarks/results/watch_cost.json]

What watching a run costs. Twice: in real optimizer steps of the small world (`recipes/small_world/grace_w4.yaml` on its
packaged models and a world made here), and on decoder layers of the Qwen3-VL-2B shape, where it is set against
one pass of the fake quantizer over the same layers, of which a micro-batch makes two (forward, backward).

Per step are the sums of gates and images; per log window the norms by optimizer group, the quantizer's health and
memory. The share is that of a window of `run.log_every` steps; the bound is 1 %.

Prints tables and, last, one line of JSON.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from measure import machine, report
from torch import nn

from grace import step_stats, train
from grace.config import load_recipe
from grace.data.small_world import write_small_world
from grace.models import qwen3vl
from grace.models.processor import load_processor
from grace.parallel import make_accelerator
from grace.quant.fake_quant import QuantLinear, kernels_for
from grace.quant.health import QuantHealth
from grace.run import set_up
from grace.run_data import load_run_data
from grace.step_inputs import StepBatches

PUBLISHED = "Qwen/Qwen3-VL-2B-Instruct"


def timed(call: Callable[[], Any], repeats: int, device: str = "cpu") -> float:
    """Median seconds."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return median(seconds)


def small_world(steps: int) -> dict[str, float]:
    """Seconds of a step and of what watching adds to it, on the small world."""
    with tempfile.TemporaryDirectory() as scratch:
        world = write_small_world(Path(scratch) / "world", seed=0, splits={"qat_train": 256})
        recipe = load_recipe(
            "small_world/grace_w4.yaml",
            [
                f"data.path={world / 'qat_train.json'}",
                f"run.output_dir={scratch}/run",
                "data.validation_path=null",
            ],
        )
        processor = load_processor(recipe.student.path)
        run = set_up(recipe, make_accelerator(), processor.tokenizer, steps)
        inputs = StepBatches(run, load_run_data(recipe).records, processor)
        batches = [inputs[step] for step in range(steps)]
        step_s = median(
            timed(lambda i=i, b=b: train.one_step(run, b, i), 1)
            for i, b in enumerate(batches[1:])  # type: ignore[arg-type]
        )
        first: Any = batches[0]
        signals, _ = train.teacher_side(run, first)
        loss_N = torch.rand(16)
        parts: Any = type("Parts", (), {"relation_N": loss_N, "compared_N": loss_N > 0})

        def per_step() -> None:
            for signal in signals:
                assert signal is not None
                step_stats.gate_sums(signal.gate_T)
                step_stats.image_sums(parts)
            step_stats.step_work(first.student)

        def per_window() -> None:
            run.watch.measure(run.watch.grad_norms())

        train.one_step(run, first, 0)
        every = recipe.run.log_every
        step_stats_s, window_s = timed(per_step, 20), timed(per_window, 20)
        share = (step_stats_s + window_s / every) / step_s
    return {
        "step_s": step_s,
        "per_step_s": step_stats_s,
        "per_window_s": window_s,
        "log_every": every,
        "share": share,
    }


def published_shape(layers: int, device: str) -> dict[str, float]:
    """Seconds of a measurement, and of one pass of the quantizer, for decoder layers of the 2B shape."""
    config = qwen3vl.config_for(PUBLISHED)
    config.text_config.num_hidden_layers = layers
    shapes = [
        (linear.out_features, linear.in_features)
        for linear in qwen3vl.decoder_linears(qwen3vl.skeleton(config)).values()
    ]
    torch.manual_seed(0)
    linears = {
        str(i): QuantLinear.from_linear(nn.Linear(inputs, outputs, bias=False, device=device), name=str(i))
        for i, (outputs, inputs) in enumerate(shapes)
    }
    health = QuantHealth(linears)

    @torch.no_grad()
    def quantize() -> None:
        for layer in linears.values():
            kernels_for(layer.weight).forward(layer.weight, layer.theta, 128, 4, torch.bfloat16)

    measured = timed(lambda: health.health(health.sums()), 20, device)
    passed = timed(quantize, 5, device)
    return {
        "layers": layers,
        "weights": sum(layer.weight.numel() for layer in linears.values()),
        "remembered_bytes": sum(codes.numel() for codes in health.codes.values()),
        "measure_s": measured,
        "quantize_s": passed,
        "ratio": measured / passed,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    shape = published_shape(args.layers, args.device)
    world = small_world(args.steps)
    print(f"small world: step {world['step_s'] * 1e3:.0f} ms; watching {world['per_step_s'] * 1e3:.2f} ms a step and "
          f"{world['per_window_s'] * 1e3:.2f} ms a window of {world['log_every']}: {world['share']:.2%}")  # fmt: skip
    print(f"2B shape, {shape['layers']} layers: a measurement {shape['measure_s'] * 1e3:.1f} ms, "
          f"a pass of the quantizer {shape['quantize_s'] * 1e3:.1f} ms: {shape['ratio']:.2f}")  # fmt: skip
    report({"small_world": world, "published_shape": shape, "machine": machine(args.device)}, args.out)


if __name__ == "__main__":
    main()
