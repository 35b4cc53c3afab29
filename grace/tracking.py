"""Where a run's numbers go: JSONL always, W&B when asked, one progress line for people.

Step values are means over all ranks already; the tracker averages them over the logging window, but for
`*_min` and `*_max`, of which it keeps the extremes. A step that has no such value does not count.
The window is part of the resume state, so an interrupted run logs the same numbers; what is named `perf/...`
and `tokens_per_s` are measurements of time and memory, which no two runs share.
"""

import contextlib
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from grace import tracking_wandb
from grace.errors import UserError
from grace.files import write_text
from grace.run_files import METRICS_FILE

Values = Mapping[str, float | Sequence[float] | None]
_RATES = {"tokens": "tokens_per_s", "waited": "perf/data_wait"}
_SHOWN = ("loss/total", "loss/ce", "loss/gdkd", "loss/rcka", "ib/beta", "tokens_per_s")


class Tracker:
    """Window means to `metrics.jsonl` and W&B, and a progress line on stderr.

    Only the main process writes; on the others every method does nothing but keep the window.

    Args:
        edges: of the bins of values that are lists, for W&B.
        peak_flops: FLOP/s of all devices, for `perf/mfu`; None where that is not known.
    """

    def __init__(
        self,
        run_dir: Path,
        total_steps: int,
        log_every: int,
        is_main: bool,
        edges: tracking_wandb.Edges | None = None,
        peak_flops: float | None = None,
    ):
        self.run_dir, self.total_steps, self.log_every, self.is_main = (
            run_dir,
            total_steps,
            log_every,
            is_main,
        )
        self.edges, self.peak_flops = edges or {}, peak_flops
        self.window: dict[str, Any] = {}
        self.window_counts: dict[str, int] = {}
        self.window_totals: dict[str, float] = {}
        self.first_step, self.start_time = 0, time.perf_counter()
        self.window_start = self.start_time
        self.run: Any = None
        self.progress: Progress | None = None

    # -------------------------------------------------------------- life cycle

    def start(self, step: int, window: Mapping[str, Any] | None) -> None:
        """Opens the log at `step` (0 for a new run), dropping lines an earlier, killed run wrote beyond it."""
        spent = 0.0
        if window is not None:
            spent = window["seconds"]
            self.window, self.window_counts = dict(window["sums"]), dict(window["counts"])
            self.window_totals = dict(window["totals"])
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
        if mode != "disabled" and self.is_main:
            self.run = tracking_wandb.start(self.run_dir, mode, project, config)

    def finish(self) -> None:
        """Closes the progress line and W&B."""
        if self.progress is not None:
            self.progress.stop()
        if self.run is not None:
            tracking_wandb.guarded(self.run.finish)

    def state(self) -> dict[str, Any]:
        """The open window, for the resume checkpoint."""
        return {
            "sums": self.window,
            "counts": self.window_counts,
            "totals": self.window_totals,
            "seconds": self.seconds(),
        }

    # -------------------------------------------------------------- logging

    def due(self, step: int) -> bool:
        """Whether the window ends with this step."""
        return step % self.log_every == 0 or step == self.total_steps

    def seconds(self) -> float:
        """How long the window has taken so far."""
        return time.perf_counter() - self.window_start

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """What happens inside is not training: it does not count as its time."""
        start = time.perf_counter()
        yield
        spent = time.perf_counter() - start
        self.window_start, self.start_time = self.window_start + spent, self.start_time + spent

    def add(
        self, step: int, values: Values, tokens: float, measured: Values | None = None, **totals: float
    ) -> None:
        """Adds one step's values; at the end of a window writes its means.

        Args:
            tokens: supervised tokens; their rate is logged as `tokens_per_s`.
            measured: written as it is, if the window ends here.
            totals: what else to log the rate of, as `perf/NAME_per_s`; `waited` are seconds spent on waiting for
                data, logged as the share `perf/data_wait`, and `flops` those of the models.
        """
        for name, value in values.items():
            if value is not None:
                self.window[name] = _joined(name, self.window[name], value) if name in self.window else value
                self.window_counts[name] = self.window_counts.get(name, 0) + 1
        for name, total in {"tokens": tokens, **totals}.items():
            self.window_totals[name] = self.window_totals.get(name, 0.0) + total
        if self.due(step):
            self._flush(step, measured or {})
        if self.progress is not None:
            self.progress.update(self.task, completed=step)

    def _flush(self, step: int, measured: Values) -> None:
        means = {name: _mean(name, total, self.window_counts[name]) for name, total in self.window.items()}
        elapsed = max(self.seconds(), 1e-9)
        for name, total in self.window_totals.items():
            means[_RATES.get(name, f"perf/{name}_per_s")] = total / elapsed
        if "flops" in self.window_totals:
            rate = self.window_totals["flops"] / elapsed
            means["perf/mfu"] = None if self.peak_flops is None else rate / self.peak_flops
        self.window, self.window_counts, self.window_totals = {}, {}, {}
        self.window_start = time.perf_counter()
        self.log(step, {**means, **measured})
        self._show(step, means)

    def log(self, step: int, values: Values) -> None:
        """Writes one JSON line, and the same values to W&B.

        Raises:
            UserError: the line cannot be written.
        """
        if not self.is_main:
            return
        path = self.run_dir / METRICS_FILE
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
        except OSError as error:
            raise UserError(
                f"{path} cannot be written ({error.strerror}): make room or mend it, then start the same command "
                "again: it goes on from the newest checkpoint"
            ) from error
        if self.run is not None:
            tracking_wandb.log(self.run, step, values, self.edges)

    def log_samples(self, step: int, rows: Sequence[Sequence[Any]]) -> None:
        """A W&B table of (image, question, answer, prediction)."""
        if self.run is not None and rows:
            tracking_wandb.log_samples(self.run, step, rows)

    def _show(self, step: int, means: Mapping[str, Any]) -> None:
        if not self.is_main:
            return
        note = "  ".join(f"{name.split('/')[-1]} {means[name]:.4g}" for name in _SHOWN if name in means)
        if self.progress is not None:
            self.progress.update(self.task, note=note)
            return
        per_step = (time.perf_counter() - self.start_time) / max(step - self.first_step, 1)
        eta = per_step * (self.total_steps - step)
        print(f"step {step}/{self.total_steps}  {note}  eta {eta:.0f}s", file=sys.stderr, flush=True)


def _joined(name: str, before: Any, value: Any) -> Any:
    """Two steps' values, or sums of such, together."""
    if name.endswith("_min"):
        return min(before, value)
    if name.endswith("_max"):
        return max(before, value)
    if isinstance(value, Sequence):
        return [a + b for a, b in zip(before, value, strict=True)]
    return before + value


def _mean(name: str, total: Any, count: int) -> Any:
    if name.endswith(("_min", "_max")):
        return total
    return [part / count for part in total] if isinstance(total, Sequence) else total / count


def is_timing(name: str) -> bool:
    """Whether a value measures time or memory: no two runs share it, not even an interrupted one and its twin."""
    return name == "tokens_per_s" or name.startswith("perf/")


def rewind_metrics(path: Path, step: int) -> None:
    """Keeps the complete lines of `path` up to `step`; a half-written last line, or a damaged one, is dropped."""
    if not path.exists():
        return
    kept = []
    for line in path.read_bytes().decode(errors="replace").split("\n"):
        try:
            at = json.loads(line).get("step", 0)
        except (ValueError, AttributeError, RecursionError):
            continue
        if isinstance(at, int) and at <= step:
            kept.append(line)
    write_text(path, "".join(f"{line}\n" for line in kept))
