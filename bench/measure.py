"""The harness: check first, then time the peers of a problem in turns.

A result that misses the float64 answer by more than the dtype's gate is refused and never timed. All
peers take one turn per round, in a shuffled order, so that a busy moment of the machine meets all of
them; ratios are therefore taken within each round, and their median over the rounds is reported.
"""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from bench.memory import Peak, measure_peak
from bench.operands import Operands, float64_reference, make_operands, relative_rms
from bench.peers import DENSE, THREE_CONVS, Call, Peer, PeerError, peers_of
from bench.problems import BenchProblem
from bench.provenance import provenance

# Relative RMS against float64 on the same rounded operands; rounding does not average out in small outputs.
GATES = {torch.float32: 2e-5, torch.bfloat16: 5e-3}
SMALL_OUTPUT = 256
SMALL_OUTPUT_ALLOWANCE = 4

MACHINE = "machine"
MEASURED, REFUSED, LEFT_OUT = "measured", "refused", "left out"
NO_PEAK = Peak(None, "not measured")
SMALLEST_CROP = 4
MOST_PROBES = 4
# A probe this far above the limit is not the fault of other work on the machine.
BEYOND_DOUBT = 4
# Seconds; a first call may take some of it to set itself up.
NOTICEABLE = 0.25


@dataclass(frozen=True)
class Effort:
    """How long to measure a problem: rounds until `seconds` have passed, within the two limits.

    A peer whose call would take more than `longest_call` seconds is left out; so is one whose checked call took more
    than `most_times_fastest` times the fastest peer's, and longer than NOTICEABLE seconds. A call shorter than ten
    times `settle` seconds is run, untimed, for that long before each sample: several runtimes keep their threads
    spinning for some milliseconds, in the way of the peer that has the next turn.
    """

    seconds: float = 2.0
    fewest_rounds: int = 5
    most_rounds: int = 50
    longest_call: float = 1.5
    most_times_fastest: float = math.inf
    settle: float = 0.0
    memory: bool = True


EFFORTS = {
    "small": Effort(),
    "full": Effort(seconds=10, longest_call=10),
    "cpu": Effort(
        seconds=3, fewest_rounds=3, longest_call=4, most_times_fastest=30, settle=0.01, memory=False
    ),
    "cpu-full": Effort(seconds=5, longest_call=10, most_times_fastest=30, settle=0.01, memory=False),
}


@dataclass(frozen=True)
class Measurement:
    """What one peer did on one problem; `reason` says why it was refused or left out.

    seconds: one sample a round. ratio_*: this peer's time divided by that of the dense convolution, or of
    three convolutions, in whichever layout was faster in this run: below 1 is faster than it. strongest_peer: the
    fastest of all that is not tucker_ops, as NAME-LAYOUT.
    peak: memory beyond arguments and output. best_layout: the faster of this peer's two layouts.
    """

    problem: BenchProblem
    peer: Peer
    status: str
    reason: str | None = None
    relative_rms: float | None = None
    seconds: tuple[float, ...] = ()
    peak: Peak = NO_PEAK
    ratio_to_dense: float | None = None
    ratio_to_three_convs: float | None = None
    ratio_to_strongest: float | None = None
    dense_layout: str | None = None
    three_convs_layout: str | None = None
    strongest_peer: str | None = None
    best_layout: bool = False

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def row(self, origin: Mapping[str, object]) -> dict[str, object]:
        """One flat, JSON-ready row; `origin` is `provenance()`. Times in milliseconds.

        gflop and bytes are those of the peer's own form; floor_* those of the form with the least of both.
        """
        problem, spec = self.problem, self.problem.spec
        cost, floor = self.peer.cost(problem), self.peer.floor_cost(problem)
        gflop = 2 * cost.macs / 1e9
        low, middle, high = _percentiles(self.seconds)
        return {
            "problem": problem.name,
            "where": problem.where,
            "layer": str(problem),
            "peer": self.peer.name,
            "form": self.peer.form,
            "layout": self.peer.layout,
            "dtype": problem.dtype_name,
            "batch": problem.batch,
            **{key: asdict(spec)[key] for key in ("in_channels", "out_channels", "kernel_size", "stride")},
            "ranks": problem.ranks,
            "input_size": problem.size,
            "status": self.status,
            "reason": self.reason,
            "relative_rms": self.relative_rms,
            "gate": gate(problem),
            "rounds": len(self.seconds),
            "p20_ms": low,
            "median_ms": middle,
            "p80_ms": high,
            "gflop": gflop,
            "gflop_per_s": None if middle is None else gflop / (middle / 1e3),
            "bytes": cost.bytes,
            "gb_per_s": None if middle is None else cost.bytes / 1e6 / middle,
            "floor_gflop": 2 * floor.macs / 1e9,
            "floor_bytes": floor.bytes,
            "extra_peak_bytes": self.peak.extra_bytes,
            "extra_peak_reason": self.peak.reason,
            "ratio_to_dense": self.ratio_to_dense,
            "ratio_to_three_convs": self.ratio_to_three_convs,
            "ratio_to_strongest": self.ratio_to_strongest,
            "dense_layout": self.dense_layout,
            "three_convs_layout": self.three_convs_layout,
            "strongest_peer": self.strongest_peer,
            "best_layout": self.best_layout,
            "automatic": self.peer.automatic,
            **origin,
        }


def measure(
    problem: BenchProblem, peers: Sequence[Peer] | None = None, effort: Effort | None = None
) -> list[Measurement]:
    """Check, time and weigh `peers` (all of `peers_of(problem)` by default), one measurement each, in order."""
    effort = effort or Effort()
    peers = peers_of(problem) if peers is None else peers
    with torch.inference_mode():
        operands = make_operands(problem)
        checked, calls = _check(problem, peers, operands, effort)
        samples = _take_turns(calls, effort)
    timed = [replace(entry, seconds=samples.get(index, ())) for index, entry in enumerate(checked)]
    del operands, calls
    if effort.memory:
        timed = [_with_memory(entry) for entry in timed]
    return _with_ratios(timed)


def gate(problem: BenchProblem) -> float:
    """The largest relative RMS error that is accepted."""
    small = math.prod(problem.output_shape) < SMALL_OUTPUT
    return GATES[problem.dtype] * (SMALL_OUTPUT_ALLOWANCE if small else 1)


def rows_of(measurements: Sequence[Measurement], configuration: str = MACHINE) -> list[dict[str, object]]:
    """The measurements as flat rows, each with its provenance and the name of the configuration it ran in."""
    origin = {"configuration": configuration, **provenance()}
    return [entry.row(origin) for entry in measurements]


def _check(
    problem: BenchProblem, peers: Sequence[Peer], operands: Operands, effort: Effort
) -> tuple[list[Measurement], dict[int, Call]]:
    """One entry a peer, and by their index the calls of those that may be timed."""
    reference, verdicts = float64_reference(operands), {}
    checked, calls, taken = [], {}, {}
    for index, peer in enumerate(peers):
        judge, reason = peer.judged_by or peer, peer.unavailable
        try:
            if reason is None:
                if judge not in verdicts:
                    verdicts[judge] = _too_slow(problem, judge, effort)
                reason = verdicts[judge]
            call = None if reason else peer.prepare(operands)
        except PeerError as error:
            reason = str(error)
        if reason is not None:
            checked.append(Measurement(problem, peer, LEFT_OUT, reason))
            continue
        begin = time.perf_counter()
        result = call()
        seconds = time.perf_counter() - begin
        entry = _verdict(problem, peer, result, reference)
        checked.append(entry)
        if entry.status == MEASURED:
            calls[index], taken[index] = call, seconds
    fastest = min(taken.values(), default=0)
    for index, seconds in taken.items():
        if seconds > max(NOTICEABLE, effort.most_times_fastest * fastest):
            del calls[index]
            reason = (
                f"a call took {seconds:.1f} s, {seconds / fastest:.0f} times as long as the fastest peer's"
            )
            checked[index] = replace(checked[index], status=LEFT_OUT, reason=reason)
    return checked, calls


def _verdict(problem: BenchProblem, peer: Peer, result: Tensor, reference: Tensor) -> Measurement:
    if result.shape != reference.shape:
        reason = f"shape {tuple(result.shape)} instead of {tuple(reference.shape)}"
        return Measurement(problem, peer, REFUSED, reason)
    error, limit = relative_rms(result, reference), gate(problem)
    # Written so that NaN is refused.
    if not error <= limit:
        reason = f"relative RMS error {error:.1e} against float64, the gate is {limit:.1e}"
        return Measurement(problem, peer, REFUSED, reason, relative_rms=error)
    return Measurement(problem, peer, MEASURED, relative_rms=error)


def _too_slow(problem: BenchProblem, peer: Peer, effort: Effort) -> str | None:
    """Why a call would take longer than the limit, judged by ever larger crops of the same layer; else None.

    Torch convolves bf16 a hundred times slower than fp32 on a processor without bf16 instructions: one
    real call may take minutes. A crop counts against the peer only once it takes a good part of the limit
    itself, because in small ones starting and joining threads takes longer than computing.
    """
    extent = SMALLEST_CROP
    while (crop := problem.cropped(extent)) != problem:
        call = peer.prepare(make_operands(crop))
        scale = peer.cost(problem).macs / peer.cost(crop).macs
        probe = math.inf
        for _ in range(MOST_PROBES):
            probe = min(probe, _undisturbed_seconds(call))
            estimate = probe * scale
            if estimate <= effort.longest_call:
                return None
            if probe > effort.longest_call / 8 and estimate > BEYOND_DOUBT * effort.longest_call:
                break
        if probe > effort.longest_call / 8:
            return (
                f"a call would take about {estimate:.1f} s, judged by a crop of "
                f"{'×'.join(map(str, crop.size))}; the limit is {effort.longest_call:g} s"
            )
        extent *= 2
    return None


def _take_turns(calls: dict[int, Call], effort: Effort) -> dict[int, tuple[float, ...]]:
    order = list(calls)
    samples: dict[int, list[float]] = {index: [] for index in order}
    gc.collect()
    gc.disable()
    try:
        begin = time.perf_counter()
        for turn in range(effort.most_rounds):
            if turn >= effort.fewest_rounds and time.perf_counter() - begin > effort.seconds:
                break
            # Not merely rotated: each peer would always follow the same one, and inherit the state it leaves.
            for index in random.Random(turn).sample(order, len(order)):
                if min(samples[index], default=math.inf) < 10 * effort.settle:
                    _settle(calls[index], effort.settle)
                samples[index].append(_seconds(calls[index]))
    finally:
        gc.enable()
    return {index: tuple(times) for index, times in samples.items()}


def _settle(call: Call, seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        call()


def _seconds(call: Call) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def _undisturbed_seconds(call: Call) -> float:
    """As `_seconds`, or the processor time that all threads took where that is less: others were running."""
    begin = time.process_time()
    elapsed = _seconds(call)
    return min(elapsed, time.process_time() - begin)


def _with_memory(entry: Measurement) -> Measurement:
    if entry.status != MEASURED:
        return entry
    return replace(entry, peak=measure_peak(entry.problem, entry.peer))


def _with_ratios(entries: Sequence[Measurement]) -> list[Measurement]:
    def fastest(*names: str) -> Measurement | None:
        timed = [entry for entry in entries if entry.peer.name in names and entry.seconds]
        return min(timed, key=lambda entry: entry.median, default=None)

    dense, three = fastest(DENSE), fastest(THREE_CONVS)
    strongest = fastest(*(entry.peer.name for entry in entries if not entry.peer.ours))
    return [
        replace(
            entry,
            ratio_to_dense=_ratio(entry, dense),
            ratio_to_three_convs=_ratio(entry, three),
            ratio_to_strongest=_ratio(entry, strongest),
            dense_layout=dense and dense.peer.layout,
            three_convs_layout=three and three.peer.layout,
            strongest_peer=strongest and strongest.peer.key,
            best_layout=entry is fastest(entry.peer.name),
        )
        for entry in entries
    ]


def _ratio(entry: Measurement, peer: Measurement | None) -> float | None:
    if peer is None or not entry.seconds:
        return None
    return statistics.median(a / b for a, b in zip(entry.seconds, peer.seconds, strict=True))


def _percentiles(seconds: Sequence[float]) -> tuple[float | None, float | None, float | None]:
    """The 20th, 50th and 80th percentile, in milliseconds."""
    if not seconds:
        return None, None, None
    points = torch.tensor(seconds, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8]).double())
    low, middle, high = (1e3 * point for point in points.tolist())
    return low, middle, high
