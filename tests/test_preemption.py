"""Signals that ask a run to stop."""

import os
import signal
import subprocess
import sys
import time

import pytest
from accelerate import Accelerator

from grace.preemption import SIGNALS, listening


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noted_and_handlers_come_back(number: signal.Signals, capsys) -> None:
    before = [signal.getsignal(one) for one in SIGNALS]
    with listening() as request:
        accelerator = Accelerator(cpu=True)
        assert request.name is None and not request.on_any_rank(accelerator)
        os.kill(os.getpid(), number)
        assert request.name == number.name and request.on_any_rank(accelerator)
        assert [signal.getsignal(one) for one in SIGNALS] == before  # the second one is as before
    assert [signal.getsignal(one) for one in SIGNALS] == before
    assert capsys.readouterr().err == f"{number.name}: stopping after this step\n"


SLEEP = """
import sys, time
from grace.preemption import ignore_in_worker, listening
if sys.argv[1] == "worker":
    ignore_in_worker(0)
    print("ready", flush=True)
    time.sleep(60)
with listening():
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize(("kind", "ends"), [("worker", False), ("main", True)])
def test_a_second_signal_ends_the_process_and_workers_stay(kind: str, ends: bool) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SLEEP, kind], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
    assert (process.poll() is not None) == ends
    process.kill()
    process.wait()
