"""The ways a command can end before it is done, and how each one leaves the process.

The user's mistake is a `UserError`: one line on stderr, exit code 2. `Preempted` is nobody's: exit code 75, on which a
job script starts the same command again. Anything else is our mistake: the trace is shown and the exit code is 1.
"""

import argparse
import io
import os
import select
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn


class UserError(Exception):
    """The user's input is wrong. The message is one line: what is wrong and how to mend it."""


class Told(UserError):
    """One that another process of the run, or this one, has printed already."""


class Preempted(Exception):
    """The machine is wanted for something else, and what is done so far is saved. The message is one line."""


PREEMPTED_CODE = 75  # EX_TEMPFAIL of sysexits.h: try again later


class Parser(argparse.ArgumentParser):
    """A command-line parser whose errors are one line on stderr, with exit code 2.

    Args:
        rest: name of a positional with `nargs="*"` that also takes what stands after an option
            (`RECIPE --dry-run key=value`), which argparse by itself calls unrecognized.
    """

    def __init__(self, *args: Any, rest: str | None = None, **kwargs: Any):
        super().__init__(*args, allow_abbrev=False, **kwargs)
        self.rest = rest

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, extras = super().parse_known_args(args, namespace)
        if self.rest and not any(extra.startswith("-") for extra in extras):
            setattr(found, self.rest, [*getattr(found, self.rest), *extras])
            extras = []
        if extras:  # here and not in `parse_args`, so that the message names the sub-command
            self.error(f"unrecognized arguments: {' '.join(extras)}")
        return found, extras

    def error(self, message: str) -> NoReturn:
        is_first = os.environ.get("RANK", "0") == "0"  # of the processes that were all given these arguments
        self.exit(2, f"error: {' '.join(message.split())} (see `{self.prog} --help`)\n" if is_first else None)


def told(error: UserError) -> str:
    """The line that says what is wrong."""
    return f"error: {' '.join(str(error).split())}"


def run_command(command: Callable[[], int | None]) -> int:
    """Runs `command` and turns its outcome into a process exit code (0, 1, 2, 75, 130 or 141)."""
    try:
        code = command() or 0
        sys.stdout.flush()
        return code
    except Told:
        return 2
    except UserError as error:
        print(told(error), file=sys.stderr)
        return 2
    except Preempted as reason:
        if os.environ.get("RANK", "0") == "0":  # all processes stop together
            print(f"stopped: {reason}", file=sys.stderr)
        return PREEMPTED_CODE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception:  # noqa: BLE001 - the last line of defence, with the trace
        if (fault := _output_fault()) is not None:
            return fault
        traceback.print_exc()
        return 1


def _output_fault() -> int | None:
    """The exit code if standard output takes nothing any more, which is said unless its reader has gone; else None."""
    try:
        sys.stdout.flush()
        watched = select.poll()
        watched.register(sys.stdout.fileno(), 0)
        if not any(event & select.POLLERR for _, event in watched.poll(0)):
            return None
        raise BrokenPipeError
    except io.UnsupportedOperation:  # no file, as in a test
        return None
    except BrokenPipeError:
        code = 128 + signal.SIGPIPE  # as a shell has it
    except OSError as error:
        print(f"error: standard output cannot be written ({error.strerror})", file=sys.stderr)
        code = 2
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at Python's end
    return code
