"""Check first, then time the peers of a case in turns: `bench.measure` for a GPU, where calls return before they end.

No peer's failure stops the others: it becomes an outcome with a reason.
"""

from __future__ import annotations

import math
import random
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from bench.gpu.clock import Call, Clock
from bench.measure import LEFT_OUT, MEASURED, REFUSED

FAILED = "failed"
DENSE, THREE_CONVS, OURS = "dense", "three convs", "tucker_ops"
COMPILED = ", compiled"
FEWEST_ROUNDS, MOST_ROUNDS = 5, 200


class OutOfTime(BaseException):
    """Not an Exception: torch.compile turns those into errors of its own."""


@dataclass
class Settings:
    """How a part is run.

    seconds: of rounds, for each case. deadline: by `time.monotonic`, after which nothing new is begun. compile_seconds:
    the most that one compilation may take. keep: is given rows of a case that are not yet all, in case
    the process is ended before they are. For tests, backend: that of ours; shrink: divides all extents; dtype: of block
    and network.
    """

    device: torch.device
    seconds: float = 1.0
    deadline: float = math.inf
    compile_seconds: float = 45.0
    compile: bool = True
    backend: str | None = "cuda"
    shrink: int = 1
    dtype: torch.dtype = torch.float16
    report: Callable[[str], None] = field(default=lambda line: None)
    keep: Callable[[list[dict]], None] | None = None

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()


@dataclass(frozen=True)
class Peer:
    """One way to compute a case. `prepare` lays out, compiles or captures, and returns the call that is timed.

    error_of: relative RMS error of a result against float64. group: which baseline this is a layout of (`DENSE`,
    `THREE_CONVS`, either with `COMPILED`), OURS, or "" for a further one. shown: has a line of its own in the summary.
    slow: preparing and checking are limited to Settings.compile_seconds. targets: see `bench.gpu.output.verdicts`.
    """

    name: str
    layout: str
    group: str
    prepare: Callable[[], Call]
    error_of: Callable[[object], float]
    shown: bool = False
    slow: bool = False
    targets: Mapping[str, float] = field(default_factory=dict)

    @property
    def ours(self) -> bool:
        return self.group == OURS


@dataclass(frozen=True)
class Outcome:
    """What became of a peer; times in microseconds, one a round."""

    peer: Peer
    status: str
    reason: str | None = None
    relative_rms: float | None = None
    samples: tuple[float, ...] = ()
    in_a_row: float | None = None
    peak_bytes: int | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def quartiles(self) -> tuple[float, float, float] | None:
        if len(self.samples) < 2:
            return None
        return tuple(statistics.quantiles(self.samples, n=4, method="inclusive"))


def measure(
    peers: Sequence[Peer], gate: float, clock: Clock, settings: Settings, about: dict[str, object]
) -> list[dict[str, object]]:
    """A row for each peer, in order. `gate`: the largest error that is accepted; `about`: what all rows have in common.

    Peers that are slow to prepare come last, after a few rounds of the others.
    """
    outcomes: dict[int, Outcome] = {}
    calls: dict[int, Call] = {}
    order = sorted(range(len(peers)), key=lambda index: peers[index].slow)
    with torch.inference_mode():
        first_slow = next((index for index in order if peers[index].slow), None)
        for index in order:
            if index == first_slow and settings.keep is not None:
                settings.keep(rows_of(_timed(outcomes, calls, clock, 0.0), about))
            outcomes[index], call = _checked(peers[index], gate, clock, settings)
            if call is not None:
                calls[index] = call
            else:
                outcome = outcomes[index]
                settings.report(
                    f"  {outcome.peer.name}, {outcome.peer.layout}: {outcome.status}: {outcome.reason}"
                )
        return rows_of(_timed(outcomes, calls, clock, settings.seconds), about)


def _timed(
    outcomes: dict[int, Outcome], calls: dict[int, Call], clock: Clock, seconds: float
) -> list[Outcome]:
    samples = _take_turns(calls, clock, seconds)
    return [
        replace(outcomes[index], samples=samples[index], in_a_row=clock.in_a_row(calls[index]))
        if index in samples
        else outcomes[index]
        for index in sorted(outcomes)
    ]


def _checked(peer: Peer, gate: float, clock: Clock, settings: Settings) -> tuple[Outcome, Call | None]:
    if settings.left <= 0:
        return Outcome(peer, LEFT_OUT, "the time for this part was used up"), None
    if peer.slow and not settings.compile:
        return Outcome(peer, LEFT_OUT, "compilation is turned off"), None
    allowed = min(settings.compile_seconds, settings.left) if peer.slow else math.inf
    try:
        with limited_to(allowed):
            call = peer.prepare()
            # cuDNN tries its algorithms out, torch.compile compiles: not what is timed, nor what memory it takes.
            poison(call())
            clock.wait()
        result, peak = clock.peak_bytes(call)
        error = peer.error_of(result)
        del result
    except OutOfTime:
        forget_compiled(settings)
        return Outcome(peer, LEFT_OUT, f"not ready after {allowed:.0f} s"), None
    except Exception as error:
        # Whatever a peer's code raises: the others go on, and the reason is printed.
        return Outcome(peer, FAILED, _first_line(error)), None
    # Written so that NaN is refused.
    if not error <= gate:
        reason = f"relative RMS error {error:.1e} against float64, the gate is {gate:.1e}"
        return Outcome(peer, REFUSED, reason, error), None
    # None needed: its memory was taken beforehand, and cannot be told from other tensors.
    return Outcome(peer, MEASURED, None, error, peak_bytes=peak or None), call


def forget_compiled(settings: Settings) -> None:
    """After each case: compiled peers of earlier ones would count against torch's limit on recompiling."""
    if settings.compile:
        torch.compiler.reset()


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:300]


def _take_turns(calls: dict[int, Call], clock: Clock, seconds: float) -> dict[int, tuple[float, ...]]:
    order, samples = list(calls), {index: [] for index in calls}
    issue = {index: min(clock.seconds_to_issue(call) for _ in range(2)) for index, call in calls.items()}
    begin = time.perf_counter()
    for turn in range(MOST_ROUNDS if calls else 0):
        if turn >= FEWEST_ROUNDS and time.perf_counter() - begin > seconds:
            break
        # Not merely rotated: each peer would always follow the same one, and inherit the state it leaves.
        for index in random.Random(turn).sample(order, len(order)):
            samples[index].append(clock.sample(calls[index], issue[index]))
    return {index: tuple(times) for index, times in samples.items()}


@contextmanager
def limited_to(seconds: float) -> Iterator[None]:
    """Raises OutOfTime in here after so many seconds. In the main thread, and between Python's own steps only."""
    if not math.isfinite(seconds) or threading.current_thread() is not threading.main_thread():
        yield
        return

    def out(signum, frame):
        raise OutOfTime

    handler = signal.signal(signal.SIGALRM, out)
    timer = signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        # Somebody else's, such as that of a test runner.
        signal.setitimer(signal.ITIMER_REAL, *timer)


@contextmanager
def without_trials() -> Iterator[None]:
    """cuDNN takes the algorithm that it thinks fastest: for references, which run once."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def fastest(outcomes: Sequence[Outcome], *groups: str) -> Outcome | None:
    """The peer of these groups with the least median time."""
    timed = [outcome for outcome in outcomes if outcome.peer.group in groups and outcome.samples]
    return min(timed, key=lambda outcome: outcome.median, default=None)


def times_faster(outcome: Outcome, than: Outcome | None) -> float | None:
    """How many times the other's time is this one's: the median over the rounds."""
    if than is None or not outcome.samples:
        return None
    return statistics.median(b / a for a, b in zip(outcome.samples, than.samples, strict=True))


def rows_of(outcomes: Sequence[Outcome], about: dict[str, object]) -> list[dict[str, object]]:
    """Flat, JSON-ready rows; `about` says what all of them have in common. Ratios are other ÷ this one."""
    bases = {
        "dense": fastest(outcomes, DENSE),
        "three": fastest(outcomes, THREE_CONVS),
        "dense_compiled": fastest(outcomes, DENSE + COMPILED),
        "three_compiled": fastest(outcomes, THREE_CONVS + COMPILED),
        "strongest": fastest(outcomes, *{o.peer.group for o in outcomes if not o.peer.ours}),
    }
    rows = []
    for outcome in outcomes:
        peer = outcome.peer
        low, middle, high = outcome.quartiles or (None, None, None)
        row = {
            **about,
            "peer": peer.name,
            "layout": peer.layout,
            "group": peer.group,
            "shown": peer.shown,
            "targets": dict(peer.targets),
            "status": outcome.status,
            "reason": outcome.reason,
            "relative_rms": finite(outcome.relative_rms),
            "rounds": len(outcome.samples),
            "q1_us": low,
            "median_us": middle,
            "q3_us": high,
            "in_a_row_us": outcome.in_a_row,
            "peak_bytes": outcome.peak_bytes,
        }
        for name, base in bases.items():
            row[f"{name}_ratio"] = times_faster(outcome, base)
            row[f"{name}_peer"] = None if base is None else f"{base.peer.name}, {base.peer.layout}"
        peaks = [outcome.peak_bytes, bases["dense"] and bases["dense"].peak_bytes]
        row["dense_peak_bytes"] = peaks[1]
        row["peak_share"] = peaks[0] / peaks[1] if all(peaks) else None
        rows.append(row)
    return rows


def finite(value: float | None) -> float | None:
    """NaN and infinity have no place in JSON."""
    return value if value is not None and math.isfinite(value) else None


def poison(result: object) -> None:
    """Leaves NaN where the next result will probably lie, so that what nobody writes shows."""
    for tensor in result if isinstance(result, list | tuple) else (result,):
        if isinstance(tensor, Tensor) and tensor.is_floating_point():
            tensor.fill_(math.nan)
