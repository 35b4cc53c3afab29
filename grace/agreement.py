"""All processes of a run go on, or none does: one whose input is wrong must not leave the others waiting for it.

Processes only wait for each other in collectives. So whatever a process may find wrong by itself lies in an `agreed`
block, in which there are none but those that all go through before anything can be found; at its end they tell each
other, and all stop with one line from one of them.
"""

import contextlib
import os
import sys
from collections.abc import Iterator

import torch
from accelerate import Accelerator

from grace.errors import Told, UserError, told


@contextlib.contextmanager
def agreed(accelerator: Accelerator) -> Iterator[None]:
    """Runs the block in every process; a `UserError` in one of them ends all of them.

    Raises:
        UserError: in every process, if it was raised in one; with several processes it has been printed by then.
    """
    failure = None
    try:
        yield
    except UserError as error:
        failure = error
    settle(accelerator, failure)


def settle(accelerator: Accelerator, failure: UserError | None) -> None:
    """What an `agreed` block ends with: raises if any process comes with a failure.

    Raises:
        UserError: as `agreed`.
    """
    if accelerator.num_processes == 1:
        if failure is not None:
            raise failure
        return
    failed = torch.tensor([float(failure is not None)], device=accelerator.device)
    ranks: list[float] = accelerator.gather(failed).tolist()  # type: ignore[union-attr]
    if not any(ranks):
        return
    if ranks.index(1.0) == accelerator.process_index:
        assert failure is not None  # this process said so
        print(told(failure), file=sys.stderr, flush=True)
    accelerator.wait_for_everyone()  # a launcher ends all processes when the first one goes
    raise Told(str(failure or "another process has said why")) from failure


@contextlib.contextmanager
def same_in_all() -> Iterator[None]:
    """For what is wrong in all processes alike, before they can reach each other: the first one says so.

    Raises:
        UserError: as the block does.
    """
    try:
        yield
    except UserError as error:
        if os.environ.get("RANK", "0") != "0":
            raise Told(str(error)) from error
        raise
