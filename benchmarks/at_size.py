"""python benchmarks/at_size.py [--student qwen3-vl-2b] [--teacher qwen3-vl-8b] [--steps 200] [OVERRIDE...]

The published recipe at its own shapes without its weights and data: does it fit, stay finite, and how fast is it?
Student and teacher get random weights, records are made-up captions (benchmarks/fake_sharegpt4v.py) of about the
published number of tokens, and `grace.train recipes/qwen3vl_2b_w4g128.yaml` runs for some steps; with --config_file
through `accelerate launch`. OVERRIDE is any `section.key=value` of the recipe. Needs 30 GB of disk at 2B and 8B.

What cannot be seen this way is anything about accuracy: there is nothing to learn.

Prints loss, speed, utilisation and memory and, last, one line of JSON; exits with 1 where a loss is not finite.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, Literal

import fake_sharegpt4v
import torch
from fake_sharegpt4v import Source
from measure import machine, report
from random_weights import write_published_shape

from grace.models.tiny import write_tiny_model
from grace.runtime.synthetic import NAMES

# ShareGPT4V's captions by source (arXiv:2311.12793, section 3.2: 50, 30 and 20 of 100 thousand), 942 characters long.
# The small world's tokenizer makes about 3.5 times the tokens of Qwen's from random letters, hence the fewer characters.
CAPTION = 942 * 2 // 7
CAPTIONS = {
    "coco/train2017": Source(50, (640, 480), 1.0, 20, CAPTION),
    "llava/llava_pretrain/images": Source(30, (336, 336), 1.0, 20, CAPTION),
    "sam/images": Source(20, (1500, 1000), 1.0, 20, CAPTION),
}


def write_model(name: str, role: Literal["student", "teacher"], folder: Path) -> Path:
    """A dense model directory with random weights."""
    if name == "tiny":
        return write_tiny_model(folder / role, role)
    return write_published_shape(name, folder / role, packed=False)


def train(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Runs the recipe; its metrics, a line for each step."""
    student = write_model(args.student, "student", folder)
    teacher = write_model(args.teacher, "teacher", folder)
    records = fake_sharegpt4v.write(folder / "data", args.steps * args.records, 16, sources=CAPTIONS)
    run = folder / "run"
    launcher = (
        ["accelerate.commands.launch", "--config_file", args.config_file, "-m"] if args.config_file else []
    )
    command = [
        sys.executable, "-m", *launcher, "grace.train", args.recipe,
        f"student.path={student}", "student.base=null", f"teacher.path={teacher}",
        f"data.path={records}", f"data.image_root={records.parent / 'images'}",
        f"optim.batch_size={args.records}", f"run.max_steps={args.steps}", f"run.save_every={args.steps}",
        f"run.output_dir={run}", "run.log_every=1", *args.overrides,
    ]  # fmt: skip
    subprocess.run(command, check=True)
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def summary(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Losses of all steps; medians of the later half, when caches are warm."""
    steps = [line for line in lines if "loss/total" in line]
    later = steps[len(steps) // 2 :]

    def middle(name: str) -> float | None:
        values = [line[name] for line in later if line.get(name) is not None]
        return median(values) if values else None

    def most(name: str) -> float | None:
        values = [line[name] for line in steps if line.get(name) is not None]
        return max(values) if values else None

    losses = [line["loss/total"] for line in steps]
    return {
        "steps": len(steps),
        "finite": bool(losses) and all(loss is not None and math.isfinite(loss) for loss in losses),
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        "supervised_tokens_per_s": middle("tokens_per_s"),
        "input_tokens_per_s": middle("perf/input_tokens_per_s"),
        "mfu": middle("perf/mfu"),
        "device_memory_gib": most("perf/device_memory_gib"),
        "host_memory_gib": most("perf/host_memory_gib"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--student", choices=(*NAMES, "tiny"), default="qwen3-vl-2b")
    parser.add_argument("--teacher", choices=(*NAMES, "tiny"), default="qwen3-vl-8b")
    parser.add_argument("--steps", type=int, default=200, help="default: %(default)s")
    parser.add_argument("--records", type=int, default=32, help="of a step; default: %(default)s")
    parser.add_argument(
        "--recipe", default="recipes/qwen3vl_2b_w4g128.yaml", help="default: the published one"
    )
    parser.add_argument("--config_file", metavar="FILE", help="of `accelerate launch`; default: one process")
    parser.add_argument(
        "--folder", type=Path, help="for models, data and run; default: a temporary one, removed"
    )
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        start = time.perf_counter()
        found = summary(train(args, Path(scratch)))
    for name, value in found.items():
        print(f"{name:>24}: {value if not isinstance(value, float) else format(value, '.5g')}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = {
        key: getattr(args, key)
        for key in ("student", "teacher", "recipe", "records", "config_file", "overrides")
    }
    seconds = {"seconds_in_all": time.perf_counter() - start}
    report({"benchmark": "at_size", **machine(device), **settings, **found, **seconds}, args.out)
    raise SystemExit(not found["finite"])


if __name__ == "__main__":
    main()
