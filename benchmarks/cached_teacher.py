"""python benchmarks/cached_teacher.py [--seeds 3] [--k 16 32 64 128 256] [--work DIR] [--out FILE]

What distilling from the k likeliest tokens costs, in the small world: GRACE at 4 bits (recipes/small_world/grace_w4.yaml) under the
living teacher and under caches of every k. Gradients are compared on the first step's records, at the start of training
and at its end: the KD term's own, and the whole loss's. Accuracy is exact match on the test split after the recipe's
steps, with the standard error over its records; the spread over seeds is beside it.

`--speed` compares training speed instead: supervised tokens/s of whole training runs of 40 steps, loading included, living
teacher and cache of k = 64 in turns; on an idle machine.

Prints a table and, last, one line of JSON; a killed run goes on where it was.
"""

import argparse
import json
import math
import shutil
import statistics
import time
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, PartialState
from measure import machine, report
from torch import Tensor

from grace.cache_settings import open_cache
from grace.config import Recipe, load_recipe
from grace.data.records import load_records
from grace.data.small_world import write_small_world
from grace.models.processor import load_processor
from grace.parallel import make_accelerator
from grace.run import set_up
from grace.step import Weights, forward_backward
from grace.step_inputs import StepBatches
from grace.teacher_cache import fill_cache
from grace.train import teacher_side, train

RECIPE = "small_world/grace_w4.yaml"


def recipe_for(work: Path, name: str, k: int | None, *more: str) -> Recipe:
    """The recipe with k tokens of the cache, or the living teacher."""
    cached = [f"teacher.cache={work / 'cache'}", f"teacher.cache_top_k={k}"] if k else []
    paths = [f"data.path={work / 'data/qat_train.json'}", f"data.validation_path={work / 'data/test.json'}"]
    options = ["run.eval_records=6000", "run.eval_every=0", f"run.output_dir={work / 'runs' / name}"]
    return load_recipe(RECIPE, [*paths, *options, *cached, *more])


def gradients(recipe: Recipe, weights: Weights) -> Tensor:
    """The first step's gradient of every trained parameter, as one vector."""
    AcceleratorState._reset_state()  # one process, several set-ups
    processor = load_processor(recipe.student.path)
    records = load_records(recipe.data.path)
    cache = open_cache(recipe, processor, records) if recipe.teacher.cache else None
    run = set_up(recipe, make_accelerator(), processor.tokenizer, 1, cache)
    inputs = StepBatches(run, records, processor).inputs(0)
    signals, head_VE = teacher_side(run, inputs)
    forward_backward(run.parallel, inputs.student, signals, weights, "gdkd", head_VE)
    found = [p.grad.flatten() for p in run.model.parameters() if p.grad is not None]
    return torch.cat(found).double()


def cosines(work: Path, ks: list[int], student: str | None) -> dict[int, dict[str, float]]:
    """Of the KD term's gradient and of the whole one with the living teacher's, by k."""
    more = [f"student.path={student}"] if student else []

    def kinds(k: int | None) -> dict[str, Tensor]:
        recipe = recipe_for(work, "gradients", k, *more)
        ce = gradients(recipe, Weights(beta=0.0, omega=0.0))
        return {
            "kd": gradients(recipe, Weights(beta=1.0, omega=0.0)) - ce,
            "total": gradients(recipe, Weights(beta=0.5, omega=3.0)),
        }

    online = kinds(None)
    result = {}
    for k in ks:
        cached = kinds(k)
        result[k] = {
            name: float(torch.nn.functional.cosine_similarity(online[name], cached[name], dim=0))
            for name in online
        } | {"kd_norm_ratio": float(cached["kd"].norm() / online["kd"].norm())}
    return result


def trained(work: Path, k: int | None, seed: int) -> dict[str, float]:
    """Exact match, cross-entropy and steps/s of one training run; kept in its directory."""
    name = f"{'online' if k is None else k}_{seed}"
    done = work / f"{name}.json"
    if not done.exists():
        recipe = recipe_for(work, name, k, f"run.seed={seed}")
        AcceleratorState._reset_state()
        start = time.perf_counter()
        train(recipe)
        seconds = time.perf_counter() - start
        lines = [
            json.loads(line) for line in (work / "runs" / name / "metrics.jsonl").read_text().splitlines()
        ]
        result = {key: lines[-1][key] for key in ("val/exact_match", "val/exact_match_se", "val/ce")}
        kd = [line["loss/gdkd"] for line in lines if "loss/gdkd" in line]
        done.write_text(json.dumps(result | {"seconds": seconds, "gdkd_first": kd[0], "gdkd_last": kd[-1]}))
    return json.loads(done.read_text())


def tokens_per_s(work: Path, k: int | None, turn: int) -> float:
    """Median over the windows of a short run, the first left out."""
    name = f"speed_{k or 'online'}_{turn}"
    AcceleratorState._reset_state()
    train(
        recipe_for(
            work,
            name,
            k,
            "run.max_steps=40",
            "run.eval_records=0",
            "data.validation_path=null",
            "run.save_every=1000",
        )
    )
    lines = [json.loads(line) for line in (work / "runs" / name / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(line["tokens_per_s"] for line in lines[1:])


def speed(work: Path) -> dict[str, float]:
    """Tokens/s with the living teacher and with the cache, medians of three turns each."""
    shutil.rmtree(work / "runs", ignore_errors=True)
    turns = [(tokens_per_s(work, None, turn), tokens_per_s(work, 64, turn)) for turn in range(3)]
    online, cached = (statistics.median(values) for values in zip(*turns, strict=True))
    print(f"online {online:.0f} tokens/s, cached {cached:.0f} tokens/s: {cached / online:.2f}x")
    return {"online_tokens_per_s": online, "cached_tokens_per_s": cached, "speedup": cached / online}


def summary(rows: list[dict[str, float]]) -> dict[str, float]:
    """Means over seeds, and the spread of exact match."""
    values = [row["val/exact_match"] for row in rows]
    mean = sum(values) / len(values)
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / max(1, len(values) - 1))
    means = {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}
    return {key.removeprefix("val/"): value for key, value in means.items()} | {"exact_match_spread": spread}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--k", type=int, nargs="+", default=[16, 32, 64, 128, 256])
    parser.add_argument("--train-k", type=int, nargs="+", help="those of --k that are trained; default: all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path("runs/cached_teacher"), help="default: %(default)s")
    parser.add_argument("--speed", action="store_true", help="compare speed instead")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    args = parser.parse_args()
    if not (args.work / "data").exists():
        sizes = {"qat_train": 2000, "test": 6000}
        write_small_world(args.work / "data", 0, sizes)
    recipe = recipe_for(args.work, "cache", None, f"teacher.cache_top_k={max(args.k)}")
    cache = fill_cache(recipe, args.work / "cache", make_accelerator())
    PartialState()
    if args.speed:
        report(
            {"benchmark": "cached_teacher_speed", **machine(), "recipe": RECIPE, **speed(args.work)}, args.out
        )
        return
    chosen = (None, *(args.train_k or args.k))
    arms = {k: summary([trained(args.work, k, seed) for seed in range(args.seeds)]) for k in chosen}
    start = cosines(args.work, args.k, None)
    end = cosines(args.work, args.k, str(args.work / "runs/online_0/model"))
    print("k        exact match (SE, spread)     CE      GDKD first / last")
    for k, row in arms.items():
        print(f"{k or 'online':<8} {row['exact_match']:.4f} ({row['exact_match_se']:.4f}, {row['exact_match_spread']:.4f})   "
              f"{row['ce']:.4f}   {row['gdkd_first']:.2f} / {row['gdkd_last']:.2f}")  # fmt: skip
    print("k        cosine of the KD gradient, start / end   of the whole   size of the KD gradient")
    for k in args.k:
        one, two = start[k], end[k]
        print(f"{k:<8} {one['kd']:.4f} / {two['kd']:.4f}   {one['total']:.4f} / {two['total']:.4f}   "
              f"{one['kd_norm_ratio']:.3f} / {two['kd_norm_ratio']:.3f}")  # fmt: skip
    result = {
        "benchmark": "cached_teacher", **machine(), "recipe": RECIPE, "seeds": args.seeds, "vocabulary": 512,
        "cache_bytes": cache["bytes"], "cache_tokens": cache["tokens"],
        "arms": {str(k or "online"): row for k, row in arms.items()}, "cosines_start": start, "cosines_end": end,
    }  # fmt: skip
    report(result, args.out)


if __name__ == "__main__":
    main()
