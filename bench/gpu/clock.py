"""Times calls on one device: by CUDA events on a GPU, by the processor's clock elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

Call = Callable[[], object]

# What is written between samples: so much that nothing else stays in the L2 cache.
CACHES, LEAST_FLUSH_BYTES = 4, 256 << 20
# Of `torch.cuda._sleep`, which counts cycles: no card runs faster, and a longer pause does no harm.
MOST_CYCLES_A_SECOND = 2e9
LONGEST_PAUSE = 0.02
IN_A_ROW = 20


class Clock:
    """Microseconds of calls on `device`.

    With `apart`, the L2 cache is overwritten before a sample, and the GPU kept busy until the call has been issued, so
    that a sample holds the kernels and not the launches from Python. Without, it holds both, from an idle GPU on: what
    a user waits for.
    """

    def __init__(self, device: torch.device, *, apart: bool):
        self.device, self.apart = device, apart
        self._flush: torch.Tensor | None = None
        if self.on_gpu:
            self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def seconds_to_issue(self, call: Call) -> float:
        """How long the processor takes before it is free again."""
        self.wait()
        begin = time.perf_counter()
        call()
        seconds = time.perf_counter() - begin
        self.wait()
        return seconds

    def sample(self, call: Call, issue: float = 0.0) -> float:
        """One call; `issue` is what `seconds_to_issue` said of it."""
        if not self.on_gpu:
            begin = time.perf_counter()
            call()
            return 1e6 * (time.perf_counter() - begin)
        begin, end = self._events
        if self.apart:
            self._overwrite_cache()
            torch.cuda._sleep(int(MOST_CYCLES_A_SECOND * min(LONGEST_PAUSE, 1e-4 + 1.5 * issue)))
        else:
            torch.cuda.synchronize(self.device)
        begin.record()
        call()
        end.record()
        end.synchronize()
        return 1e3 * begin.elapsed_time(end)

    def in_a_row(self, call: Call) -> float:
        """A call's share of many issued one after the other: launches from Python and a warm cache included."""
        self.wait()
        begin = time.perf_counter()
        for _ in range(IN_A_ROW):
            call()
        self.wait()
        return 1e6 * (time.perf_counter() - begin) / IN_A_ROW

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def peak_bytes(self, call: Call) -> tuple[object, int | None]:
        """A call's result, and the memory that it needed at most beyond what was allocated; None off the GPU."""
        if not self.on_gpu:
            return call(), None
        self.wait()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        result = call()
        self.wait()
        return result, torch.cuda.max_memory_allocated(self.device) - before

    def _overwrite_cache(self) -> None:
        if self._flush is None:
            cache = getattr(torch.cuda.get_device_properties(self.device), "L2_cache_size", 0)
            size = max(CACHES * cache, LEAST_FLUSH_BYTES)
            self._flush = torch.empty(size, dtype=torch.int8, device=self.device)
        self._flush.zero_()
