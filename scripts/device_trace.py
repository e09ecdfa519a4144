"""What a piece of work made the driver and the GPU do, by the profiler's trace: calls, kernels, and which part launched each."""

from __future__ import annotations

import bisect
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Event = dict[str, Any]
STEP = "step"
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")
GRAPH_LAUNCH = "cudaGraphLaunch"
SYNCHRONIZING = ("cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy", "cuStreamSynchronize")
RUNTIME, RANGE, KERNELS = ("cuda_runtime", "cuda_driver"), "user_annotation", ("kernel", "gpu_memcpy", "gpu_memset")


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel (or copy) as it ran: microseconds, and the innermost range in which it was launched, "" for none."""

    name: str
    begin_us: float
    us: float
    range: str


def record(work: Callable[[], object]) -> list[Event]:
    """Events of ``work`` as Chrome's trace format has them; the device has done everything before it ends."""
    from torch.profiler import ProfilerActivity, profile, record_function

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with profile(activities=activities) as profiler:
        with record_function(STEP):
            work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return list(json.loads(path.read_text(encoding="utf-8"))["traceEvents"])


def driver_calls(events: list[Event]) -> Counter[str]:
    """How often each function of CUDA was called within the step, by the thread that took it."""
    step = next(event for event in events if event.get("cat") == RANGE and event["name"] == STEP)
    within = (
        event["name"]
        for event in events
        if event.get("cat") in RUNTIME and event["tid"] == step["tid"] and 0 <= event["ts"] - step["ts"] <= step["dur"]
    )
    return Counter(within)


def kernels_of(events: list[Event]) -> list[Kernel]:
    """What ran on the device, in the order in which it began."""
    ranges = _ranges(events)
    launched = {
        event["args"]["correlation"]: _innermost(ranges.get(event["tid"], []), event["ts"])
        for event in events
        if event.get("cat") in RUNTIME and "correlation" in event.get("args", {})
    }
    found = [
        Kernel(event["name"], event["ts"], event["dur"], launched.get(event["args"].get("correlation"), ""))
        for event in events
        if event.get("cat") in KERNELS
    ]
    return sorted(found, key=lambda kernel: kernel.begin_us)


def span_us(kernels: list[Kernel]) -> float:
    """From the beginning of the first to the end of the last."""
    return max(kernel.begin_us + kernel.us for kernel in kernels) - min(kernel.begin_us for kernel in kernels) if kernels else 0.0


def _ranges(events: list[Event]) -> dict[Any, list[Event]]:
    """Ranges of each thread by their beginnings; the step itself says nothing."""
    found: dict[Any, list[Event]] = {}
    for event in sorted((event for event in events if event.get("cat") == RANGE), key=lambda event: event["ts"]):
        if event["name"] != STEP:
            found.setdefault(event["tid"], []).append(event)
    return found


def _innermost(ranges: list[Event], when: float) -> str:
    for event in reversed(ranges[: bisect.bisect_right(ranges, when, key=lambda event: event["ts"])]):
        if when <= event["ts"] + event["dur"]:
            return str(event["name"])
    return ""


@contextmanager
def named(name: str) -> Iterator[None]:
    """What is launched within is of part ``name``."""
    from torch.profiler import record_function

    with record_function(name):
        yield


class Named:
    """Another object whose methods' launches are of parts with the methods' names."""

    def __init__(self, inner: object) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._inner, name)
        if not callable(method):
            return method

        def within(*arguments: Any, **options: Any) -> Any:
            with named(name):
                return method(*arguments, **options)

        return within
