"""Peak memory of a stretch of code."""

from __future__ import annotations

from pathlib import Path

import torch

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")


class PeakMemory:
    """Context manager: ``rss_bytes``, the largest resident memory of this process inside the block.

    Linux can start the count afresh; elsewhere, or where it forbids that, it is the peak since the process
    began. ``cuda_bytes`` is what torch allocated at most on the CUDA device, 0 for any other device.
    """

    def __init__(self, device: torch.device | None = None):
        self._cuda = device if device is not None and device.type == "cuda" else None
        self.rss_bytes = 0
        self.cuda_bytes = 0

    def __enter__(self) -> PeakMemory:
        try:
            CLEAR_REFS.write_text("5")
        except OSError:
            pass
        if self._cuda is not None:
            torch.cuda.reset_peak_memory_stats(self._cuda)
        return self

    def __exit__(self, *_: object) -> None:
        self.rss_bytes = _peak_rss()
        if self._cuda is not None:
            self.cuda_bytes = torch.cuda.max_memory_allocated(self._cuda)


def _peak_rss() -> int:
    if STATUS.exists():
        for line in STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
