"""`triton`: kernels compiled on the user's machine at first use, for NVIDIA GPUs of compute capability 8.0 and newer.

Two launches: input ranks, with what the producer's norm and activation left to do; then core, output ranks, bias and
statistics. The gradient is made of the same kernels and a third. Triton itself is imported when something runs.
"""

from __future__ import annotations

import math
import os
from functools import cache
from importlib.machinery import PathFinder

import torch

from tucker_ops.backends.base import Backend, Derivative, Verdict
from tucker_ops.backends.gpu import MOST_ITEMS, MOST_VOXELS, countable
from tucker_ops.types import BlockProblem, Problem

LEAST_CAPABILITY = 80
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# With u_out one program holds all output ranks of its voxels in registers; from there on ranks_in of the gradient too.
MOST_RANKS = 512
# Their products in fp32 are held beside the output ranks; of more, many registers would lie in memory.
MOST_COVARIANCE = 64
PROVEN: frozenset[int] = frozenset()
UNPROVEN_VARIABLE = "TUCKER_TRITON_UNPROVEN"


def interpreted() -> bool:
    """Does Triton's interpreter run the kernels, in Python on the CPU?"""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _installed() -> Verdict:
    if PathFinder.find_spec("triton") is None:
        return Verdict(False, "Triton is not installed: pip install triton")
    return Verdict(True, "Triton is installed")


def _available() -> Verdict:
    if not _installed():
        return _installed()
    if interpreted():
        return Verdict(True, "in Triton's interpreter (TRITON_INTERPRET=1)")
    if not torch.cuda.is_available():
        return Verdict(False, "Triton is installed, but torch finds no NVIDIA GPU and driver here")
    capability = _capability()
    if capability < LEAST_CAPABILITY:
        return Verdict(
            False,
            f"needs compute capability 8.0 or later, this GPU has {capability / 10}: Triton multiplies without tensor "
            "cores there",
        )
    return Verdict(True, f"Triton, for compute capability {capability / 10} here")


def _capability() -> int:
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def _supports(problem: Problem | BlockProblem) -> Verdict:
    if problem.dtype not in DTYPES:
        return Verdict(
            False, f"computes float16, bfloat16 and float32, not {str(problem.dtype).removeprefix('torch.')}"
        )
    if max(problem.rank_in, problem.rank_out) > MOST_RANKS:
        return Verdict(
            False,
            f"holds at most {MOST_RANKS} ranks in registers, not {max(problem.rank_in, problem.rank_out)}",
        )
    channels = problem.channels if isinstance(problem, BlockProblem) else (problem.in_channels,)
    line = max(problem.input_size[-1], problem.output_size[-1])
    line *= max(*channels, problem.rank_in, problem.rank_out, problem.out_channels)
    if line > MOST_VOXELS:
        return Verdict(
            False,
            f"counts at most {MOST_VOXELS:,} numbers in a line of voxels, not {line:,}: make another axis the last",
        )
    # Sums go by blocks of a line, of no fewer voxels than these, counted over all items.
    sizes = (problem.input_size, problem.output_size)
    blocks = problem.batch * max(math.prod(size[:-1]) * math.ceil(size[-1] / 16) for size in sizes)
    if blocks > MOST_VOXELS:
        return Verdict(False, f"counts at most {MOST_VOXELS:,} blocks of voxels in all items, not {blocks:,}")
    # Rows read from the padding on, so that is counted as well.
    padded = tuple(n + 2 * p for n, p in zip(problem.input_size, problem.padding, strict=True))
    return countable(problem, (padded, problem.output_size))


def _prefers(problem: Problem | BlockProblem) -> Verdict:
    if interpreted():
        return Verdict(False, "the interpreter is for tests: ask for backend 'triton' by name")
    capability = _capability()
    if capability in PROVEN:
        return Verdict(True, f"has passed its tests on compute capability {capability / 10}")
    if os.environ.get(UNPROVEN_VARIABLE) == "1":
        return Verdict(True, f"{UNPROVEN_VARIABLE}=1")
    return Verdict(
        False,
        f"has passed its tests in Triton's interpreter, but on no card of compute capability {capability / 10} yet: "
        f"set {UNPROVEN_VARIABLE}=1, or ask for backend 'triton' by name",
    )


def _supports_block(problem: BlockProblem) -> Verdict:
    if problem.expanded and max(problem.channels) > MOST_RANKS:
        return Verdict(
            False, f"expands sources to at most {MOST_RANKS} channels, not {max(problem.channels)}"
        )
    cells = max(math.prod(factor) for factor in problem.factors) * math.ceil(max(problem.rows) / 128)
    if cells > MOST_ITEMS:
        return Verdict(
            False, f"starts at most {MOST_ITEMS:,} blocks of ranks for a coarse source, not {cells:,}"
        )
    if problem.stats == "covariance":
        if problem.u_out:
            return Verdict(False, "takes the covariance of the core's output only: leave u_out to the reader")
        if problem.rank_out > MOST_COVARIANCE:
            return Verdict(
                False,
                f"takes the covariance of at most {MOST_COVARIANCE} ranks, not {problem.rank_out}",
            )
    return _supports(problem)


def _run(input, u_in, core, u_out, bias, *geometry):
    from tucker_ops.backends.triton import launch, tuning

    configs = tuning.configs_of([input], core, u_out.shape[0], *geometry)
    return launch.forward(input, u_in, core, u_out, bias, *geometry, configs=configs)


def _run_stages(input, u_in, core, u_out, bias, *geometry):
    from tucker_ops.backends.triton import launch, tuning

    configs = tuning.configs_of([input], core, u_out.shape[0], *geometry)
    return launch.stages(input, u_in, core, u_out, bias, *geometry, configs=configs)


def _run_backward(grad, input, u_in, core, u_out, stride, padding, dilation, *rest):
    from tucker_ops.backends.triton import launch, tuning

    configs = tuning.configs_of([input], core, u_out.shape[0], stride, padding, dilation)
    return launch.backward(grad, input, u_in, core, u_out, stride, padding, dilation, *rest, configs=configs)


def _run_block(sources, *rest):
    from tucker_ops.backends.triton import launch, tuning

    core, stride, padding, dilation, u_out = rest[6:11]
    out_channels = core.shape[0] if u_out is None else u_out.shape[0]
    configs = tuning.configs_of(sources, core, out_channels, stride, padding, dilation)
    return launch.block(sources, *rest, configs=configs)


TRITON = Backend(
    name="triton",
    # The interpreter, which has to be asked for before Triton is imported, takes tensors on the CPU.
    device=None if interpreted() else "cuda",
    available=_available,
    supports=_supports,
    prefers=_prefers,
    run=_run,
    describe=lambda problem: "two launches: input ranks, then core and output ranks",
    supports_block=_supports_block,
    run_block=_run_block,
    derivative=Derivative(
        supports=_supports,
        prefers=_prefers,
        run=_run_backward,
        stages=_run_stages,
    ),
)
