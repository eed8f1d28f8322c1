"""The benchmarks, as pytest-benchmark sees them: `pytest bench/bench_op.py --benchmark-only`.

The harness times the peers of a problem in turns; pytest-benchmark would time one after the other. So its
clock is replaced by one that shows the recorded samples, and its statistics, storage and comparison work on
those. The row, with ratios, memory and provenance, is in extra_info.
"""

from __future__ import annotations

import pytest

from bench.measure import LEFT_OUT, REFUSED


class RecordedClock:
    """Shows a time that moves on by the next recorded sample whenever `advance` is called."""

    def __init__(self) -> None:
        self._now = 0.0
        self._samples = iter(())

    def load(self, seconds: tuple[float, ...]) -> None:
        self._samples = iter(seconds)

    def advance(self) -> None:
        self._now += next(self._samples)

    def recorded_seconds(self) -> float:
        return self._now


CLOCK = RecordedClock()


@pytest.mark.benchmark(timer=CLOCK.recorded_seconds)
def test_op(problem, key, measured, benchmark):
    entry, row = measured(problem)[key]
    if entry.status == LEFT_OUT:
        pytest.skip(f"{entry.peer.key} left out: {entry.reason}")
    if entry.status == REFUSED:
        pytest.fail(f"{entry.peer.key} refused, not timed: {entry.reason}", pytrace=False)
    benchmark.group = str(problem)
    benchmark.extra_info.update(row)
    CLOCK.load(entry.seconds)
    benchmark.pedantic(CLOCK.advance, rounds=len(entry.seconds))
