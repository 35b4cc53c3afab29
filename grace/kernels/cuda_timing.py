"""Timing of short CUDA work as it runs in a captured graph: no launch from Python in the figure."""

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch

COLD_BYTES = 256 * 2**20  # several times the second-level cache of any card


def copies_for(nbytes: int) -> int:
    """How many copies of an operand have to take turns for each to come from memory."""
    return max(2, min(256, -(-COLD_BYTES // max(1, nbytes))))


def graph_seconds(calls: Sequence[Callable[[], Any]], repeats: int = 5) -> float:
    """Median seconds of one call, of a graph that makes all of them in turn.

    Args:
        calls: the same work on operands of their own, enough of them that none is found in a cache.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls[0]()  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return median(times) / len(calls)
