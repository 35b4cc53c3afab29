"""`grace demo`: the whole of GRACE on the built-in small world, from images to a report.

    grace demo [--out runs/demo] [--quick] [--from-scratch] [--seed 0] [--json]

Stages: data, models, arms, test scores, export, report. Each leaves its result on disk under a
final name, so a demo that was interrupted continues where it stopped.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from grace.demo import scoring, weights
from grace.demo.arms import Arm, demo_arms, path_overrides
from grace.errors import UserError
from grace.files import write_text

WORKERS = 2  # one thread each: tiny models gain nothing from more
EXAMPLES = 8  # test scenes whose answers are shown
QUICK = ("run.max_steps=20", "run.eval_records=64")


@dataclass(frozen=True)
class Settings:
    """What a demo directory was made with; another demo cannot continue in it."""

    seed: int
    quick: bool
    from_scratch: bool

    @property
    def test_limit(self) -> int | None:
        return 200 if self.quick else None


def run_demo(args: argparse.Namespace) -> int:
    """Entry point of `grace demo`."""
    from grace.demo.report import write_report

    out, settings = Path(args.out), Settings(args.seed, args.quick, args.from_scratch)
    start = time.perf_counter()
    scoring.set_up_process(WORKERS)
    claim(out, settings)
    say(f"GRACE demo in {out}: data, models, arms, test scores, export, report")
    write_data(out, settings)
    provide_models(out, settings)
    arms = demo_arms(settings.quick)
    seconds = train_arms(out, arms, settings)
    chosen = choose(out, arms)
    export(out, chosen["grace"])
    scores = score_models(out, chosen, settings)
    report = write_report(out, asdict(settings), scores, arms, chosen, seconds, time.perf_counter() - start)
    if args.json:
        print(json.dumps(report))
    return 0


def say(text: str) -> None:
    """One line of progress on stderr."""
    print(text, file=sys.stderr, flush=True)


def claim(out: Path, settings: Settings) -> None:
    """Marks `out` as a demo directory, or checks that it is one made with the same settings.

    Raises:
        UserError: it holds something else.
    """
    mark = out / "demo.json"
    if not mark.exists():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"{out} is in use and holds no demo: choose another --out")
        try:
            out.mkdir(parents=True, exist_ok=True)
            write_text(mark, json.dumps(asdict(settings)))
        except OSError as error:
            raise UserError(f"cannot write to {out} ({error.strerror}): choose another --out") from error
    elif json.loads(mark.read_text()) != asdict(settings):
        raise UserError(
            f"{out} holds a demo with other settings ({mark.read_text()}): choose another --out or remove it"
        )


def once(path: Path, make: Callable[[], Any]) -> Any:
    """The JSON at `path`, made and stored first if it is not there."""
    if not path.exists():
        write_text(path, json.dumps(make()))
    return json.loads(path.read_text())


# ---------------------------------------------------------------- data and models


def write_data(out: Path, settings: Settings) -> None:
    """Writes the splits that this demo needs."""
    from grace.data.small_world import SPLIT_SIZES, write_small_world

    names = ["qat_train", "validation", "test"]
    if settings.from_scratch:
        names += [weights.split_of(role, stage) for role in weights.ROLES for stage in weights.STAGES]
    sizes = {name: SPLIT_SIZES[name] // (10 if settings.quick else 1) for name in names}
    if not (out / "data").exists():
        say(f"data: drawing {sum(sizes.values())} scenes of scanned digits")
        write_small_world(out / "data", seed=settings.seed, splits=sizes)


def provide_models(out: Path, settings: Settings) -> None:
    """Teacher and full-precision student: the packaged weights, or trained here by the same recipes."""
    missing = [role for role in weights.ROLES if not (out / role).exists()]
    if not settings.from_scratch:
        for role in missing:
            packaged = weights.copy_packaged(role, out / role)
            say(f"{role}: packaged weights ({packaged / weights.ABOUT} says how they were made)")
        return
    tasks, extra = {}, QUICK if settings.quick else ()
    for role in missing:
        log = out / "logs" / f"{role}.log"
        say(f"{role}: training from scratch; progress in {log}")
        arguments = (role, out / role, out / "from_scratch", out / "data", settings.seed, extra, log)
        tasks[role] = (weights.make, arguments)
    in_pool(tasks, lambda role, seconds: say(f"{role}: trained ({seconds:.0f}s)"))


# ---------------------------------------------------------------- arms


def in_pool(
    tasks: Mapping[str, tuple[Callable[..., Any], tuple[Any, ...]]], done: Callable[[str, Any], None]
) -> None:
    """Runs named tasks in worker processes of one thread each, calling `done` as each ends."""
    with ProcessPoolExecutor(
        WORKERS, mp_context=get_context("spawn"), initializer=scoring.set_up_process, initargs=(1,)
    ) as pool:
        futures = {pool.submit(function, *arguments): name for name, (function, arguments) in tasks.items()}
        for future in as_completed(futures):
            done(futures[future], future.result())


def train_arms(out: Path, arms: list[Arm], settings: Settings) -> dict[str, float]:
    """Trains what is not trained yet; returns the seconds of each arm."""
    times = out / "scores" / "train_seconds.json"
    seconds: dict[str, float] = json.loads(times.read_text()) if times.exists() else {}
    tasks = {}
    for arm in arms:
        if arm.name not in seconds or not (out / "arms" / arm.name / "model").exists():
            overrides = path_overrides(out, arm, settings.seed, QUICK if settings.quick else ())
            tasks[arm.name] = (
                scoring.train_in_worker,
                (arm.recipe, overrides, out / "logs" / f"{arm.name}.log"),
            )

    def done(name: str, took: float) -> None:
        seconds[name] = took
        write_text(times, json.dumps(seconds))
        values = validation_of(out, name)
        say(
            f"arms: {len(seconds)}/{len(arms)} {name}: validation exact match {values['val/exact_match']:.3f} ({took:.0f}s)"
        )

    if tasks:
        say(f"arms: training {len(tasks)} runs; progress in {out / 'logs'}")
        in_pool(tasks, done)
    return seconds


def validation_of(out: Path, name: str) -> dict[str, float]:
    """The last validation line of a finished arm."""
    lines = (out / "arms" / name / "metrics.jsonl").read_text().splitlines()
    return next(record for line in reversed(lines) if "val/exact_match" in (record := json.loads(line)))


def choose(out: Path, arms: list[Arm]) -> dict[str, Arm]:
    """The run of each family with the best validation exact match (ties: lower CE)."""
    best: dict[str, tuple[tuple[float, float], Arm]] = {}
    for arm in arms:
        values = validation_of(out, arm.name)
        key = (values["val/exact_match"], -values["val/ce"])
        if arm.family not in best or key > best[arm.family][0]:
            best[arm.family] = (key, arm)
    return {family: arm for family, (_, arm) in best.items()}


# ---------------------------------------------------------------- export and scores


def export(out: Path, arm: Arm) -> None:
    """Leaves `qat/` and `awq/` of the chosen GRACE run, with the parity figures."""
    from grace.export.pack import export_run

    for name in ("qat", "awq"):
        if not (out / name).exists():
            say(f"export: {name}")
            parity = export_run(out / "arms" / arm.name, out / name, formats=(name,))
            if name == "awq":
                write_text(out / "scores" / "parity.json", json.dumps(parity, default=str))


def score_models(out: Path, chosen: Mapping[str, Arm], settings: Settings) -> dict[str, dict[str, Any]]:
    """Test scores, bytes and decode speed of every row of the table."""
    models: dict[str, tuple[Path, str, int | None]] = {
        "teacher": (out / "teacher", "dense", None),
        "student": (out / "student", "dense", None),
        "student_control": (out / "arms" / chosen["student_control"].name / "model", "dense", None),
        "rtn_w4": (out / "student", "rtn4", 4),
        "rtn_w2": (out / "student", "rtn2", 2),
        "qat": (out / "arms" / chosen["qat"].name / "model", "dense", 4),
        "kd": (out / "arms" / chosen["kd"].name / "model", "dense", 4),
        "grace": (out / "arms" / chosen["grace"].name / "model", "dense", 4),
        "awq": (out / "awq", "packed", 4),
    }
    data, folder = out / "data" / "test.json", out / "scores"
    tasks = {
        name: (scoring.score, (path, kind, data, EXAMPLES, settings.test_limit))
        for name, (path, kind, _) in models.items()
        if not (folder / f"{name}.json").exists()
    }

    def done(name: str, result: dict[str, Any]) -> None:
        write_text(folder / f"{name}.json", json.dumps(result))
        say(f"test: {name}: exact match {result['exact_match']:.3f} ({result['seconds']:.0f}s)")

    if tasks:
        in_pool(tasks, done)
    results = {}
    for name, (path, kind, bits) in models.items():
        speed = once(
            folder / f"{name}_speed.json", lambda path=path, kind=kind: scoring.decode_speed(path, kind, data)
        )
        results[name] = {
            **json.loads((folder / f"{name}.json").read_text()),
            "weight_bytes": scoring.weight_bytes(out / "student" if kind == "packed" else path, bits),
            "decode_tokens_per_s": speed,
        }
    return results
