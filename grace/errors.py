"""The two ways a command can fail, and how each one leaves the process.

The user's mistake is a `UserError`: one line on stderr, exit code 2. Anything else is our
mistake: the trace is shown and the exit code is 1.
"""

import sys
import traceback
from collections.abc import Callable


class UserError(Exception):
    """The user's input is wrong. The message is one line: what is wrong and how to mend it."""


def run_command(command: Callable[[], int | None]) -> int:
    """Runs `command` and turns its outcome into a process exit code (0, 1, 2 or 130)."""
    try:
        return command() or 0
    except UserError as error:
        message = " ".join(str(error).split())
        print(f"error: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception:  # noqa: BLE001 - the last line of defence, with the trace
        traceback.print_exc()
        return 1
