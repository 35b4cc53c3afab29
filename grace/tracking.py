"""Where a run's numbers go: JSONL always, W&B when asked, one progress line for people.

Step values are means over all ranks already; the tracker averages them over the logging window.
The window's sums are part of the resume state, so an interrupted run logs the same numbers.
"""

import json
import os
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from grace.files import write_text

METRICS_FILE = "metrics.jsonl"
_SHOWN = ("loss/total", "loss/ce", "loss/gdkd", "loss/rcka", "ib/beta", "tokens_per_s")


class Tracker:
    """Window means to `metrics.jsonl` and W&B, and a progress line on stderr.

    Only the main process writes; on the others every method does nothing but keep the window.
    """

    def __init__(self, run_dir: Path, total_steps: int, log_every: int, is_main: bool):
        self.run_dir, self.total_steps, self.log_every, self.is_main = (
            run_dir,
            total_steps,
            log_every,
            is_main,
        )
        self.window: dict[str, float] = {}
        self.window_steps = 0
        self.window_tokens = 0.0
        self.window_start = time.perf_counter()
        self.run: Any = None
        self.progress: Progress | None = None

    # -------------------------------------------------------------- life cycle

    def start(self, step: int, window: Mapping[str, Any] | None) -> None:
        """Opens the log at `step` (0 for a new run), dropping lines an earlier, killed run wrote beyond it."""
        spent = 0.0
        if window is not None:
            spent = window["seconds"]
            self.window = dict(window["sums"])
            self.window_steps, self.window_tokens = window["steps"], window["tokens"]
        if not self.is_main:
            return
        self.run_dir.mkdir(parents=True, exist_ok=True)
        rewind_metrics(self.run_dir / METRICS_FILE, step)
        if sys.stderr.isatty():
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
            )
            self.progress = Progress(*columns, TextColumn("{task.fields[note]}"), transient=False)
            self.progress.start()
            self.task = self.progress.add_task("train", total=self.total_steps, completed=step, note="")
        self.first_step, self.start_time = step, time.perf_counter()
        self.window_start = self.start_time - spent

    def start_wandb(self, mode: str, project: str, config: Mapping[str, Any]) -> None:
        """Starts (or continues) the W&B run; a failure is reported and never stops training."""
        if mode == "disabled" or not self.is_main:
            return
        os.environ.setdefault("WANDB_SILENT", "true")
        os.environ.setdefault(
            "WANDB_DATA_DIR", str(self.run_dir.resolve() / "wandb")
        )  # pictures too stay in the run
        id_file = self.run_dir / "wandb_id.txt"
        try:
            import wandb

            run_id = id_file.read_text().strip() if id_file.exists() else uuid.uuid4().hex[:8]
            self.run = wandb.init(
                project=project,
                mode=cast(Any, mode),
                id=run_id,
                resume="allow",
                dir=str(self.run_dir),
                config=dict(config),
            )
            write_text(id_file, run_id)
        except Exception as error:  # noqa: BLE001 - W&B raises many types; training must not depend on it
            print(
                f"W&B is not available ({error}); training goes on with {METRICS_FILE} only", file=sys.stderr
            )

    def finish(self) -> None:
        """Closes the progress line and W&B."""
        if self.progress is not None:
            self.progress.stop()
        if self.run is not None:
            self._guarded(self.run.finish)

    def state(self) -> dict[str, Any]:
        """The open window, for the resume checkpoint."""
        return {
            "sums": self.window,
            "steps": self.window_steps,
            "tokens": self.window_tokens,
            "seconds": time.perf_counter() - self.window_start,
        }

    # -------------------------------------------------------------- logging

    def add(self, step: int, values: Mapping[str, float], tokens: float) -> None:
        """Adds one step's values; at the end of a window writes its means."""
        for name, value in values.items():
            self.window[name] = self.window.get(name, 0.0) + value
        self.window_steps += 1
        self.window_tokens += tokens
        if step % self.log_every == 0 or step == self.total_steps:
            self._flush(step)
        if self.progress is not None:
            self.progress.update(self.task, completed=step)

    def _flush(self, step: int) -> None:
        means = {name: total / self.window_steps for name, total in self.window.items()}
        elapsed = time.perf_counter() - self.window_start
        means["tokens_per_s"] = self.window_tokens / max(elapsed, 1e-9)
        self.window, self.window_steps, self.window_tokens = {}, 0, 0.0
        self.window_start = time.perf_counter()
        self.log(step, means)
        self._show(step, means)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Writes one JSON line, and the same values to W&B."""
        if not self.is_main:
            return
        with (self.run_dir / METRICS_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if self.run is not None:
            self._guarded(lambda: self.run.log(dict(values), step=step))

    def log_samples(self, step: int, rows: Sequence[Sequence[Any]]) -> None:
        """A W&B table of (image, question, answer, prediction)."""
        if self.run is None or not rows:
            return

        def send() -> None:
            import wandb

            table = wandb.Table(columns=["image", "question", "answer", "prediction"])
            for image, *texts in rows:
                table.add_data(wandb.Image(image) if image is not None else None, *texts)
            self.run.log({"samples": table}, step=step)

        self._guarded(send)

    def _guarded(self, send: Any) -> None:
        try:
            send()
        except Exception as error:  # noqa: BLE001 - see start_wandb
            print(f"W&B refused a log ({error}); training goes on", file=sys.stderr)

    def _show(self, step: int, means: Mapping[str, float]) -> None:
        if not self.is_main:
            return
        note = "  ".join(f"{name.split('/')[-1]} {means[name]:.4g}" for name in _SHOWN if name in means)
        if self.progress is not None:
            self.progress.update(self.task, note=note)
            return
        per_step = (time.perf_counter() - self.start_time) / max(step - self.first_step, 1)
        eta = per_step * (self.total_steps - step)
        print(f"step {step}/{self.total_steps}  {note}  eta {eta:.0f}s", file=sys.stderr, flush=True)


def rewind_metrics(path: Path, step: int) -> None:
    """Keeps the complete lines of `path` up to `step`; a half-written last line is dropped."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if record.get("step", 0) <= step:
            kept.append(line)
    write_text(path, "".join(f"{line}\n" for line in kept))
