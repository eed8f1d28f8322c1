"""Times the ways the CUDA kernels can compute a problem on the card that is here, for the tables of `tuned`.

Every candidate's result is checked against the stages one by one before it is timed, which in turn are checked against
the reference in float64 by the tests. Nothing here runs unless it is called: never while tracing or capturing.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from tucker_ops.backends import cuda, tuned
from tucker_ops.errors import BackendError
from tucker_ops.types import Problem

# Two results of the same rounded operands differ by the rounding of intermediates: relative RMS.
MOST_DIFFERENCE = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float32: 5e-3}
SAMPLES = 20
MOST_PIECES = 16
AHEAD_CYCLES = 1_000_000
# A candidate takes the place of the cost model's only where it is faster by more than samples scatter.
LEAST_GAIN = 0.02


@dataclass(frozen=True)
class Tuning:
    """One problem's candidates, (one_pass, form, chunk) with the median microseconds of each, and the best.

    modelled: what the cost model would have chosen; it stays where nothing is faster by more than LEAST_GAIN.
    """

    problem: Problem
    times: dict[tuple[int, int, int], float]
    modelled: tuple[int, int, int]

    @property
    def best(self) -> tuple[int, int, int]:
        fastest = min(self.times, key=self.times.__getitem__)
        if self.times[fastest] > (1 - LEAST_GAIN) * self.times[self.modelled]:
            return self.modelled
        return fastest


Timer = Callable[[Callable[[], Tensor]], float]


def time_on_gpu(call: Callable[[], Tensor]) -> float:
    """Median microseconds of a call by CUDA events, the L2 overwritten before each sample."""
    flush = torch.empty(256 * 2**20, dtype=torch.uint8, device="cuda")
    for _ in range(3):
        call()
    samples = []
    for _ in range(SAMPLES):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # The host is ahead by then, so that what is timed are kernels.
        torch.cuda._sleep(AHEAD_CYCLES)
        start.record()
        call()
        end.record()
        end.synchronize()
        samples.append(1000 * start.elapsed_time(end))
    return statistics.median(samples)


def candidates(problem: Problem, device: cuda.Device, tf32: bool) -> list[tuple[int, int, int]]:
    """(one_pass, form, chunk): the stages, and each form of the one-pass kernel with the depth in 1, 2, … pieces."""
    depth = problem.output_size[0] if problem.ndim == 3 else 1
    chunks = sorted({math.ceil(depth / pieces) for pieces in range(1, min(depth, MOST_PIECES) + 1)})
    forms = cuda.forms_of(problem, device, tf32)
    return [(0, 0, 0), *((1, form, chunk) for form in forms for chunk in chunks)]


def tune(
    problem: Problem,
    device: cuda.Device,
    *,
    tf32: bool = False,
    timer: Timer = time_on_gpu,
    target: str = "cuda",
) -> Tuning:
    """Times every candidate for one problem, on random operands on torch device `target`.

    Raises BackendError where two candidates disagree by more than rounding: a kernel is wrong on this card.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        values = torch.randn(size, generator=generator) / max(1, size[-1]) ** 0.5
        return values.to(problem.dtype).to(target)

    layout = torch.channels_last if problem.ndim == 2 else torch.channels_last_3d
    input = normal(problem.batch, problem.in_channels, *problem.input_size).contiguous(memory_format=layout)
    weights = [
        normal(problem.rank_in, problem.in_channels),
        normal(problem.rank_out, problem.rank_in, *problem.kernel_size),
        normal(problem.out_channels, problem.rank_out),
        normal(problem.out_channels) if problem.bias else None,
    ]
    geometry = [list(problem.stride), list(problem.padding), list(problem.dilation)]
    times, expected = {}, None
    for candidate in candidates(problem, device, tf32):
        one_pass, form, chunk = candidate
        choice = [int(tf32), 1, form, chunk] if one_pass else [int(tf32), 0]

        def call(choice=choice) -> Tensor:
            return cuda.run_on(device, choice, input, *weights, *geometry)

        result = call().double()
        expected = result if expected is None else expected
        difference = ((result - expected).square().mean() / expected.square().mean()).sqrt().item()
        if not difference <= MOST_DIFFERENCE[problem.dtype]:
            raise BackendError(
                f"form {form} with chunks of {chunk} planes is off by {difference:.1e} of the result on this card; "
                "please report it with the output of tucker_ops.backends()"
            )
        times[candidate] = timer(call)
    model = cuda.choice_of(problem, device, tf32)
    modelled = (1, model.form, model.chunk) if model.one_pass else (0, 0, 0)
    if modelled not in times:
        modelled = min(times, key=lambda c: (c[:2] != modelled[:2], abs(c[2] - modelled[2])))
    return Tuning(problem, times, modelled)


def save(tunings: Iterable[Tuning], tf32: bool, notes: dict[str, str]) -> str:
    """Adds what was found to the table of torch's current card; returns the table's path."""
    path = tuned.table_path(torch.cuda.get_device_name())
    problems = tuned.read(path)
    for tuning in tunings:
        problem = tuning.problem
        channels = (
            problem.batch,
            problem.in_channels,
            problem.rank_in,
            problem.rank_out,
            problem.out_channels,
        )
        key = tuned.key_of(
            tuned.kind_of(problem.dtype, tf32), channels, problem.input_size, problem.kernel_size, problem.stride,
            problem.padding, problem.dilation,
        )  # fmt: skip
        problems[key] = list(tuning.best)
    tuned.write(path, problems, notes)
    return str(path)
