"""`grace bench DIR` and `grace bench --synthetic SIZE`: 4 bits against bfloat16, in one run.

Two processes, one per model, are measured in turn; every ratio is the median over the repeats of one measurement
over the one beside it. On a CPU bfloat16 is transformers' own `generate`, on CUDA it is this engine with its graphs.

    decode_ratio, prefill_ratio      tokens/s over those of bfloat16: higher is better
    weight_bytes_ratio               bytes of the language model's weights over those in bfloat16
    load_ratio                       seconds from disk to the first token over those in bfloat16
"""

import argparse
import contextlib
import datetime
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from grace.errors import UserError
from grace.runtime.bench_report import draw, machine, table
from grace.runtime.bench_worker import Setup, serve
from grace.runtime.loading import checkpoint_kind

_LOADS = 3  # of each model, from disk


class Side:
    """A worker process."""

    def __init__(self, setup: Setup):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(setup, theirs), daemon=True)
        self._process.start()
        theirs.close()
        self._answer("start")

    def __call__(self, name: str, *args: Any) -> Any:
        """One method of the worker.

        Raises:
            UserError: what was asked for is wrong.
            RuntimeError: it failed there.
        """
        self._pipe.send((name, args))
        return self._answer(f"{name}{args}")

    def _answer(self, asked: str) -> Any:
        try:
            result, error = self._pipe.recv()
            if isinstance(error, UserError):
                raise error
            if error is not None:
                raise RuntimeError(f"bench: {asked} failed in its process ({error})")
            return result
        except EOFError:
            self._process.join()
            raise RuntimeError(
                f"bench: a measuring process ended with {self._process.exitcode}: is there enough memory?"
            ) from None

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._pipe.send(None)
        self._process.join(10)
        if self._process.is_alive():
            self._process.terminate()


def run_bench(args: argparse.Namespace) -> int:
    """Entry point of `grace bench`."""
    if (args.directory is None) == (args.synthetic is None):
        raise UserError("give one of DIR and --synthetic SIZE")
    if args.plot is not None:
        if args.plot.suffix not in (".png", ".svg"):
            raise UserError(f"--plot {args.plot}: give a name that ends in .png or .svg")
        if not os.access(args.plot.parent, os.W_OK):
            raise UserError(f"--plot {args.plot}: {args.plot.parent} is no folder that can be written to")
        import matplotlib  # noqa: F401 - missing: said before anything is measured
    plan = _plan(args)
    with _models(args) as (packed, dense):
        result = measure(args, packed, dense, plan)
    print(table(result), file=sys.stderr if args.json else sys.stdout)
    if args.plot is not None:
        draw(result, args.plot)
    if args.json:
        print(json.dumps(result))
    return 0


def _plan(args: argparse.Namespace) -> dict[str, Any]:
    quick = args.quick
    return {
        "batch": args.batch or ([1] if quick else [1, 4]),
        "prefill": args.prefill or ([512] if quick else [128, 512]),
        "decode_at": args.decode_at or ([64] if quick else [64, 512]),
        "repeats": 3 if quick else args.repeats,
        "new_tokens": min(args.new_tokens, 8) if quick else args.new_tokens,
    }


def measure(args: argparse.Namespace, packed: Path, dense: Path, plan: dict[str, Any]) -> dict[str, Any]:
    """All figures of a run."""
    device = args.device or "cpu"
    baseline = "library" if device == "cpu" else "engine"
    setups = (
        Setup(packed, "engine", args.kernel, args.head, device, args.threads),
        Setup(dense, baseline, device=device, threads=args.threads),
    )
    sides: list[Side] = []
    try:
        for setup in setups:
            sides.append(Side(setup))
        return {
            "benchmark": "bench",
            "model": str(args.synthetic or args.directory),
            "head": args.head,
            **_figures(sides, plan, device),
        }
    finally:
        for side in sides:
            side.close()


def _figures(sides: Sequence[Side], plan: dict[str, Any], device: str) -> dict[str, Any]:
    def pairs(repeats: int, name: str, *args: Any) -> list[tuple[float, float]]:
        _say(f"{name} {' '.join(str(arg) for arg in args)}")
        return [(sides[0](name, *args), sides[1](name, *args)) for _ in range(repeats)]

    load = pairs(_LOADS, "load", True)
    cached = pairs(1, "load", False)
    prefill = []
    for tokens in plan["prefill"]:
        pairs(1, "prefill", tokens)  # warms up
        prefill.append({"tokens": tokens, **_compared(pairs(plan["repeats"], "prefill", tokens), tokens)})
    decode = []
    for batch in plan["batch"]:
        for context in plan["decode_at"]:
            pairs(1, "decode", batch, context, 3)
            found = _compared(pairs(plan["repeats"], "decode", batch, context, plan["new_tokens"]), batch)
            decode.append({"batch": batch, "context": context, **found})
    about = [side("about") for side in sides]
    copy = sides[0]("copy_bandwidth")  # last, since its buffers would count as the model's memory
    for row in decode:
        for name, one in zip(("int4", "bf16"), about, strict=True):
            speed = one["step_bytes"] / row[f"{name}_s"]
            row |= {f"{name}_gb_s": speed / 1e9, f"{name}_of_copy": speed / copy}
    whole = [one["language_bytes"] + one["vision_bytes"] for one in about]
    return {
        "decode_ratio": decode[0]["ratio"],
        "prefill_ratio": prefill[-1]["ratio"],
        "weight_bytes_ratio": about[0]["language_bytes"] / about[1]["language_bytes"],
        "weight_bytes_ratio_with_vision": whole[0] / whole[1],
        "load_ratio": median(ours / theirs for ours, theirs in load),
        "load_cached_ratio": cached[0][0] / cached[0][1],
        "load_s": {name: median(pair[i] for pair in load) for i, name in enumerate(("int4", "bf16"))},
        "load_cached_s": {"int4": cached[0][0], "bf16": cached[0][1]},
        "copy_gb_s": copy / 1e9,
        "decode": decode,
        "prefill": prefill,
        "int4": about[0],
        "bf16": about[1],
        "settings": plan,
        **machine(device),
        "date": datetime.date.today().isoformat(),
    }


def _compared(pairs: Sequence[tuple[float, float]], tokens: int) -> dict[str, float]:
    """Medians of seconds and tokens/s, and of the ratio of speeds."""
    ours, theirs = (median(pair[i] for pair in pairs) for i in (0, 1))
    return {
        "ratio": median(theirs / ours for ours, theirs in pairs),
        "int4_tokens_per_s": tokens / ours,
        "bf16_tokens_per_s": tokens / theirs,
        "int4_s": ours,
        "bf16_s": theirs,
    }


def _say(what: str) -> None:
    print(f"bench: {what}", file=sys.stderr, flush=True)


# ---------------------------------------------------------------- models


@contextlib.contextmanager
def _models(args: argparse.Namespace) -> Iterator[tuple[Path, Path]]:
    """The AWQ directory and its bfloat16 twin, which is written to a temporary directory and removed again."""
    from grace.runtime.synthetic import SyntheticModel
    from grace.runtime.twin import dense_bytes, write_twin

    model = None if args.synthetic is None else SyntheticModel(args.synthetic)
    if model is None and checkpoint_kind(args.directory) != "awq":
        raise UserError(f"{args.directory} is not an AWQ directory: export with --format awq")
    dense = dense_bytes(args.directory) if model is None else model.weight_bytes(packed=False)
    packed = 0 if model is None else model.weight_bytes(packed=True)
    with _scratch(args.tmp) as folder:
        _require_room(folder, packed + dense)
        _say(f"writes {(packed + dense) / 1e9:.1f} GB to {folder} and removes it in the end")
        if model is None:
            write_twin(args.directory, folder / "bf16")
            yield args.directory, folder / "bf16"
        else:
            model.write(folder / "int4", folder / "bf16")
            yield folder / "int4", folder / "bf16"


@contextlib.contextmanager
def _scratch(parent: Path | None) -> Iterator[Path]:
    """A temporary directory that is gone after SIGTERM too."""

    def stop(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        with tempfile.TemporaryDirectory(prefix="grace-bench-", dir=parent) as name:
            yield Path(name)
    except FileNotFoundError as error:
        raise UserError(f"{parent} is not a directory: choose another --tmp") from error
    finally:
        signal.signal(signal.SIGTERM, before)


def _require_room(folder: Path, needed: int) -> None:
    """Raises `UserError` where disk or memory would not do."""
    free = shutil.disk_usage(folder).free
    if free < 1.05 * needed:
        raise UserError(
            f"{folder.parent} has {free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB are needed: choose another --tmp"
        )
    info = Path("/proc/meminfo")
    if not info.is_file():
        return
    sizes = dict(line.split(":", 1) for line in info.read_text().splitlines())
    available = int(sizes["MemAvailable"].split()[0]) * 1024
    if available < 1.1 * needed:
        raise UserError(
            f"{available / 1e9:.1f} GB of memory are free, about {1.1 * needed / 1e9:.1f} GB are needed: "
            "choose a smaller model"
        )
