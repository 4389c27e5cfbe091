"""Timing of functions on a device."""

import itertools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch


def milliseconds(
    work: Sequence[Callable[[], Any]], device: str | torch.device, seconds: float = 0.4, warm: float = 0.5
) -> float:
    """Median milliseconds of one call.

    On a GPU the calls in `work` (for instance one per set of inputs) are recorded as a CUDA graph, and its replays are
    timed by device events for `seconds`, after `warm` seconds. On a CPU the first of them is called once.
    """
    if torch.device(device).type == "cpu":
        start = time.perf_counter()
        work[0]()
        return (time.perf_counter() - start) * 1e3
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for f in work:
            f()
            f()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for f in work:
            f()
    graph.replay()
    torch.cuda.synchronize()
    start = time.perf_counter()
    graph.replay()
    torch.cuda.synchronize()
    each = max(time.perf_counter() - start, 1e-5)
    # enough replays between two events that the launch is negligible
    group = max(1, round(2e-3 / each))
    for _ in range(max(3, math.ceil(warm / each))):
        graph.replay()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(max(8, math.ceil(seconds / each / group)))]
    for mark in marks:
        mark.record()
        for _ in range(group):
            graph.replay()
    last = torch.cuda.Event(enable_timing=True)
    last.record()
    torch.cuda.synchronize()
    times = sorted(a.elapsed_time(b) for a, b in itertools.pairwise([*marks, last]))
    return times[len(times) // 2] / group / len(work)
