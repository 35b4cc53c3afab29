"""`python -m grace.study`: runs the trials that are missing, and writes the report of those that are there.

    python -m grace.study [--out runs/study] [--quick] [--only TABLE ...] [--seeds 5] [--jobs 2] [--report-only] [--json]

Each trial is one file of its own when it is done, so that the same command goes on where it was stopped, with whatever
`--only`, `--seeds` and `--jobs`.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path

from grace.errors import UserError
from grace.files import locked, remove_leftovers, write_text
from grace.study.arms import all_tables, quick_tables
from grace.study.data import FULL, MOST_TUNING_SEEDS, QUICK, write_world
from grace.study.grid import Study
from grace.study.trial import Trial, run_trial, set_up_worker

MARK = "study.json"


def run_study(args: argparse.Namespace) -> int:
    """Entry point of `grace study`."""
    out = Path(args.out).resolve()
    sizes, tables = (QUICK, quick_tables()) if args.quick else (FULL, all_tables())
    known = [table.name for table in tables]
    if unknown := sorted(set(args.only) - set(known)):
        raise UserError(f"there is no table {unknown[0]!r}: --only takes {', '.join(known)}")
    seeds = args.seeds or (2 if args.quick else 5)
    if seeds > sizes.seeds:
        raise UserError(f"--seeds {seeds}: there is data for {sizes.seeds} seeds")
    study = Study(out, tables, seeds, 1 if args.quick else MOST_TUNING_SEEDS, only=args.only)
    if args.report_only:  # also of a study that is running
        if not (out / MARK).exists() or not (out / "world").exists():
            raise UserError(f"{out} holds no study: run it without --report-only")
        claim(out, args.quick)
        study.read()
    else:
        with locked(out, "--out"):
            claim(out, args.quick)
            remove_leftovers(out / "rows")
            if not (out / "world" / "world.json").exists():
                say("data: drawing the small world")
            write_world(out, sizes)
            study.read()
            run_missing(study, args.jobs)
    from grace.study.report import write_report

    summary = write_report(study, args.publish)
    if args.json:
        print(json.dumps(summary))
    return 0


def say(text: str) -> None:
    """One line of progress on stderr."""
    print(text, file=sys.stderr, flush=True)


def claim(out: Path, quick: bool) -> None:
    """Marks `out` as a study's directory, or checks that it is one of the same size.

    Raises:
        UserError: it holds something else.
    """
    mark, settings = out / MARK, {"quick": quick}
    if not mark.exists():
        if any(not path.name.startswith(".") for path in out.iterdir()):
            raise UserError(f"{out} is in use and holds no study: choose another --out")
        write_text(mark, json.dumps(settings))
    elif json.loads(mark.read_text()) != settings:
        raise UserError(f"{out} holds a study {'without' if quick else 'with'} --quick: choose another --out")


def run_missing(study: Study, jobs: int) -> None:
    """Runs trials, a process of one thread for each job, until none is missing."""
    started, done = time.monotonic(), 0
    with workers(jobs) as pool:
        running: dict[Future, Trial] = {}
        while True:
            for trial in waiting(study, set(running.values())):
                if len(running) >= jobs:
                    break
                running[pool.submit(run_trial, trial, study.out)] = trial
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                trial, row = running.pop(future), future.result()
                study.add(trial, row)
                done += 1
                left = study.missing()
                hours = (time.monotonic() - started) / done * left / 3600
                say(f"{told(trial, row)} ({row['seconds']:.0f}s); {left} to go, about {hours:.1f} h")


def waiting(study: Study, running: set[Trial]) -> Iterator[Trial]:
    """Trials to start now, each once."""
    keys = {study.key(trial) for trial in running}
    for trial in study.pending():
        if (key := study.key(trial)) not in keys:
            keys.add(key)
            yield trial


def told(trial: Trial, row: dict) -> str:
    """A finished trial in a line."""
    name = (
        f"{trial.recipe.removeprefix('small_world/').removesuffix('.yaml')} {' '.join(trial.overrides[3:])}"
    )
    if trial.saved_as:
        name = f"teacher {trial.saved_as}"
    if trial.teacher != "teacher":
        name += f" teacher={trial.teacher}"
    score = row.get("failed") or f"{row['scores']['exact_match']:.3f}"
    return f"{name} seed {trial.seed} on {trial.split}: {score}"


def workers(jobs: int) -> ProcessPoolExecutor:
    """Processes that import once and live as long as the study."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["grace.study.trial"])
    return ProcessPoolExecutor(jobs, mp_context=context, initializer=set_up_worker)
