"""Resume checkpoints written behind the training loop.

What is to be saved is copied to memory at once; a thread then hashes, writes and syncs it while the next steps run.
One is written at a time: a save that comes before the last one is done waits for it. A kill in the middle leaves the
checkpoint before, as without the thread (`grace.resume_checkpoint.save_checkpoint`). The memory of the copy, as much as a
checkpoint takes on disk, is kept for the next one.
"""

import copy
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from grace.checkpoint_files import FileInMemory, files_of
from grace.errors import UserError
from grace.resume_checkpoint import write_checkpoint


class CheckpointSaver:
    """Saves the checkpoints of one run; see `grace.resume_checkpoint.save_checkpoint` for what is kept of them."""

    def __init__(self, run_dir: Path, keep_last: int, keep_best: int = 0):
        self.run_dir, self.keep_last, self.keep_best = run_dir, keep_last, keep_best
        self._files: dict[str, FileInMemory] = {}
        self._thread: threading.Thread | None = None
        self._failure: tuple[int, BaseException] | None = None

    def save(
        self,
        step: int,
        tensors: Mapping[str, Mapping[str, Tensor]],
        state: Mapping[str, Any],
        score: float | None = None,
    ) -> None:
        """Copies everything and starts writing it; the tensors may change from then on.

        Raises:
            UserError: the checkpoint before this one could not be written.
        """
        self.wait()
        self._files = files_of(tensors, self._files)
        self._thread = threading.Thread(
            target=self._write, args=(step, copy.deepcopy(dict(state)), score), name="checkpoint"
        )
        self._thread.start()

    def wait(self) -> None:
        """Until the last checkpoint is on disk.

        Raises:
            UserError: it could not be written, with the reason; the ones before it are untouched.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if (failure := self.failure()) is not None:
            raise failure

    def failure(self) -> UserError | None:
        """Why a checkpoint could not be written, once; None while all is well, or the writing goes on."""
        if self._failure is None:
            return None
        (step, failure), self._failure = self._failure, None
        if not isinstance(failure, OSError | UserError):
            raise failure
        told = UserError(
            f"the checkpoint of step {step} cannot be written to {self.run_dir} ({getattr(failure, 'strerror', None) or failure}): "
            "make room or mend it, then start the same command again: it goes on from the checkpoint before"
        )
        told.__cause__ = failure
        return told

    def _write(self, step: int, state: Mapping[str, Any], score: float | None) -> None:
        try:
            write_checkpoint(self.run_dir, step, self._files, state, self.keep_last, self.keep_best, score)
        except BaseException as failure:  # noqa: BLE001 - whatever it is, the loop must hear of it
            self._failure = (step, failure)
