"""A machine that is wanted for something else: SIGTERM or SIGUSR1 lets the step end, and the loop saves and stops.

Slurm sends SIGTERM at the end of a job's time or when it is preempted, and SIGUSR1 ahead of it where asked to
(`#SBATCH --signal`). A second signal is as before: it ends the process.
"""

import contextlib
import signal
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Whether this process has been asked to stop, and by what."""

    def __init__(self) -> None:
        self.name: str | None = None

    def on_any_rank(self, accelerator: Accelerator) -> bool:
        """Whether any process has: signals reach them at different moments, and all must stop after the same step."""
        asked = torch.tensor(float(self.name is not None), device=accelerator.device)
        return bool(accelerator.reduce(asked, reduction="sum").item() > 0)  # type: ignore[union-attr]


@contextlib.contextmanager
def listening() -> Iterator[StopRequest]:
    """Takes the two signals over while the block runs."""
    request = StopRequest()
    before: dict[signal.Signals, Any] = {}

    def ask(number: int, _frame: FrameType | None) -> None:
        request.name = signal.Signals(number).name
        print(f"{request.name}: stopping after this step", file=sys.stderr, flush=True)
        for one in SIGNALS:
            signal.signal(one, before[one])

    for one in SIGNALS:
        before[one] = signal.signal(one, ask)
    try:
        yield request
    finally:
        for one in SIGNALS:
            signal.signal(one, before[one])


def ignore_in_worker(_worker: int) -> None:
    """For a loader's worker processes: a signal to the whole job must not take the batches from under the last step.

    They end with their parent.
    """
    for one in SIGNALS:
        signal.signal(one, signal.SIG_IGN)
