"""What the machine can do at most, and how near each row comes to it.

Two loops in tucker_ops' host module say it: multiply-adds in registers (GFLOP/s, by dtype), and a copy of buffers
far larger than the caches (GB/s, read and written). Both are measured at the start and at the end of a run, because
other work on the machine slows them down, too; the better of the two counts.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from types import ModuleType

import torch

from tucker_ops.backends import native

Row = dict[str, object]

PEAK_REPETITIONS, PEAK_SECONDS = 5, 0.06
COPY_REPETITIONS, COPY_SECONDS = 3, 0.2
# Per buffer: far more than the caches hold, and for many threads more than the caches of each.
LEAST_COPY_BYTES = 256 << 20
COPY_BYTES_A_THREAD = 64 << 20
COPY_CACHES = 4
MOST_SHARE_OF_MEMORY = 8

FLOAT32, BFLOAT16 = "float32", "bfloat16"
WIDENED = "that of float32: without bfloat16 instructions, arithmetic is float32 after widening"


@dataclass(frozen=True)
class Ceilings:
    """GFLOP/s by dtype with the loop that gave them, and GB/s of a copy, at `threads` threads.

    Empty and None where they could not be measured; `reason` says why.
    """

    threads: int
    date: str
    gflop_per_s: Mapping[str, float] = field(default_factory=dict)
    loops: Mapping[str, str] = field(default_factory=dict)
    copy_gb_per_s: float | None = None
    reason: str | None = None


def measure_ceilings(isa: str | None = None) -> Ceilings:
    """At torch's number of threads, with no wider an instruction set than `isa`, by default the machine's best."""
    threads, date = torch.get_num_threads(), datetime.now(timezone.utc).isoformat(timespec="seconds")
    host = _host()
    if host is None:
        build = native.build_status()["reason"]
        reason = f"tucker_ops' host module is absent or out of date ({build}); `pip install -e .` builds it"
        return Ceilings(threads, date, reason=reason)
    available = [loop for loop in host.peaks() if isa is None or loop[0] == isa]
    gflop_per_s, loops = {}, {}
    for dtype in (FLOAT32, BFLOAT16):
        loop = next((name for name, kind in available if kind == dtype), None)
        if loop is not None:
            gflop_per_s[dtype] = max(
                host.peak(loop, dtype, threads, PEAK_SECONDS) for _ in range(PEAK_REPETITIONS)
            )
            loops[dtype] = f"{loop} {dtype}"
    if FLOAT32 not in gflop_per_s:
        known = ", ".join(" ".join(loop) for loop in host.peaks())
        return Ceilings(threads, date, reason=f"this processor has no loop for {isa}; it has {known}")
    if BFLOAT16 not in gflop_per_s:
        gflop_per_s[BFLOAT16], loops[BFLOAT16] = gflop_per_s[FLOAT32], WIDENED
    copies = [host.copy(threads, _copy_bytes(threads), COPY_SECONDS) for _ in range(COPY_REPETITIONS)]
    return Ceilings(threads, date, gflop_per_s, loops, max(copies))


def peak_now(isa: str | None = None) -> float | None:
    """GFLOP/s of the float32 loop at this moment, in a twentieth of a second; None where it cannot be measured."""
    host = _host()
    loops = (
        []
        if host is None
        else [loop for loop in host.peaks() if loop[1] == FLOAT32 and isa in (None, loop[0])]
    )
    return host.peak(*loops[0], torch.get_num_threads(), PEAK_SECONDS) if loops else None


def instruction_sets() -> tuple[str, ...]:
    """Those of this processor that the host module has loops for, best first; empty without the module."""
    host = _host()
    return () if host is None else tuple(dict.fromkeys(isa for isa, _ in host.peaks()))


def with_ceilings(rows: Iterable[Row], measured: Sequence[Ceilings]) -> list[Row]:
    """The rows with the ceilings of their run, the floor of their problem, and their shares of both.

    floor_ms: the larger of the floor's arithmetic at peak and its least traffic at copy speed. share_of_floor: floor
    divided by the time taken, 1 at best. share_of_peak: arithmetic rate of the peer's own form, counted as direct
    convolutions, divided by the peak of the dtype. free_share: the float32 peak around the problem (peak_around, where
    the row has it) divided by the best of the run; well below 1, other work was running.
    """
    return [{**row, **_shares(row, measured)} for row in rows]


def _shares(row: Row, measured: Sequence[Ceilings]) -> Row:
    dtype = row["dtype"]
    peaks = [ceilings.gflop_per_s[dtype] for ceilings in measured if dtype in ceilings.gflop_per_s]
    copies = [ceilings.copy_gb_per_s for ceilings in measured if ceilings.copy_gb_per_s]
    peak, copy = max(peaks, default=None), max(copies, default=None)
    floor = bound = None
    if peak and copy:
        arithmetic, traffic = row["floor_gflop"] / peak * 1e3, row["floor_bytes"] / copy / 1e6
        floor, bound = max(arithmetic, traffic), "arithmetic" if arithmetic >= traffic else "memory"
    taken, rate = row["median_ms"], row["gflop_per_s"]
    best, around = max((m.gflop_per_s.get(FLOAT32, 0) for m in measured), default=0), row.get("peak_around")
    return {
        "floor_ms": floor,
        "floor_bound": bound,
        "share_of_floor": floor / taken if floor and taken else None,
        "share_of_peak": rate / peak if peak and rate else None,
        "free_share": min(around / best, 1) if best and around else None,
        "peak_gflop_per_s": peak,
        "peak_loop": next((ceilings.loops[dtype] for ceilings in measured if dtype in ceilings.loops), None),
        "copy_gb_per_s": copy,
        "ceilings": [asdict(ceilings) for ceilings in measured],
    }


def _copy_bytes(threads: int) -> int:
    wanted = max(
        LEAST_COPY_BYTES, COPY_BYTES_A_THREAD * threads, COPY_CACHES * _system("SC_LEVEL3_CACHE_SIZE")
    )
    memory = _system("SC_PHYS_PAGES") * _system("SC_PAGE_SIZE")
    return min(wanted, memory // MOST_SHARE_OF_MEMORY) if memory else wanted


def _system(name: str) -> int:
    """A figure of the system, 0 where it does not tell."""
    try:
        return max(os.sysconf(name), 0)
    except (AttributeError, ValueError, OSError):
        return 0


def _host() -> ModuleType | None:
    try:
        from tucker_ops import _host as host
    except ImportError:
        return None
    # Absent from a module that was built before the benchmarks asked for it.
    return host if hasattr(host, "peaks") else None
