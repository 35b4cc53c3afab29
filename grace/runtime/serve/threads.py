"""How many threads a server computes with on the CPU."""

import os
import time

import torch

from grace.data.template import Sample
from grace.runtime.decoder import Decoder

SHORT_STEP = 2e-3  # seconds: what a server does beside a step, for every token, is then as long as the step
_STEPS = 5


def settle_threads(decoder: Decoder) -> int:
    """Leaves torch its threads, or one where a decoding step is short even so.

    Threads that meet a hundred times within a millisecond lose more by waiting for one another than they gain, once
    what else the server does takes one of their cores. `OMP_NUM_THREADS` has the last word. Empties the first row.

    Returns:
        torch's threads from now on.
    """
    threads = torch.get_num_threads()
    on_cpu, enough = decoder.device.type == "cpu", decoder.context > _STEPS
    if threads == 1 or not on_cpu or not enough or "OMP_NUM_THREADS" in os.environ:
        return threads
    decoder.prefill(0, _one_token())
    torch.set_num_threads(1)
    if _step_seconds(decoder) > SHORT_STEP:
        torch.set_num_threads(threads)
    decoder.release(0)
    return torch.get_num_threads()


def _one_token() -> Sample:
    zero_1 = torch.zeros(1, dtype=torch.int64)
    return Sample(zero_1, zero_1, zero_1, None, None, "")


def _step_seconds(decoder: Decoder) -> float:
    """The shortest of a few steps of one row; of long ones two are enough to know."""
    times: list[float] = []
    while len(times) < _STEPS and (len(times) < 2 or times[-1] < 10 * SHORT_STEP):
        start = time.perf_counter()
        decoder.decode([0], [0])
        times.append(time.perf_counter() - start)
    return min(times)
