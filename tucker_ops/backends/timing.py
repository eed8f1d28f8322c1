"""What both tuners need: a problem's operands, a clock for a GPU, and when a candidate counts as right or as faster."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from tucker_ops.types import Problem

# Two results of the same rounded operands differ by the rounding of intermediates: relative RMS.
MOST_DIFFERENCE = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float32: 5e-3}
SAMPLES = 20
AHEAD_CYCLES = 1_000_000
# A candidate takes the place of what would run without it only where it is faster by more than samples scatter.
LEAST_GAIN = 0.02

Timer = Callable[[Callable[[], object]], float]


def time_on_gpu(call: Callable[[], object]) -> float:
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


def operands_of(problem: Problem, target: str) -> tuple:
    """Random arguments of `tucker_conv` for a problem, channels-last, on a torch device."""
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
    return (input, *weights, list(problem.stride), list(problem.padding), list(problem.dilation))


def difference(result: Tensor, expected: Tensor) -> float:
    """Relative RMS, in float64; not a number where something is not."""
    result, expected = result.double(), expected.double()
    return ((result - expected).square().mean() / expected.square().mean()).sqrt().item()
