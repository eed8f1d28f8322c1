"""`cpu`: the one-pass kernel in csrc/cpu."""

from __future__ import annotations

import math
import os
from dataclasses import replace

import torch

from tucker_ops.backends import cpu_derivative, native
from tucker_ops.backends.base import Backend, Derivative, Verdict
from tucker_ops.ops.block import block_memory_format
from tucker_ops.types import BlockProblem, Problem

MOST_RING_BYTES = 64 * 2**20
MOST_SOURCES = 4
# The most lanes of any vector: sources that lie side by side start at multiples of it.
SIDE_BY_SIDE = 16

# Limits of the kinds of problem on which the kernel measured slower than three torch convolutions, with AVX2: output
# voxels and weights of the core, and channels.
FEW_VOXELS, LARGE_CORE = 256, 300_000
MANY_CHANNELS = 256
# And its gradient: multiplications; of bfloat16 voxels and ranks, and multiplications where the voxels are fewer.
FEW_MACS = 1_000_000
MANY_VOXELS, FULL_VECTOR, MOST_BFLOAT16_MACS = 4096, 16, 10_000_000


def _supports(problem: Problem) -> Verdict:
    if problem.dtype not in (torch.float32, torch.bfloat16):
        return Verdict(
            False, f"computes float32 and bfloat16, not {str(problem.dtype).removeprefix('torch.')}"
        )
    return _ring_fits(problem) and _environment_is_known()


def _supports_gradient(problem: Problem) -> Verdict:
    # The core's gradient reads z as its forward reads t.
    return _supports(replace(problem, rank_in=max(problem.rank_in, problem.rank_out)))


def _ring_fits(problem: Problem | BlockProblem) -> Verdict:
    # The least a thread holds: the ring for a single output voxel.
    reach = [d * (k - 1) + 1 for d, k in zip(problem.dilation, problem.kernel_size, strict=True)]
    ring = 4 * problem.rank_in * math.prod(reach)
    if ring > MOST_RING_BYTES:
        return Verdict(
            False,
            f"dilation {problem.dilation} spreads the kernel over {ring:,} bytes of intermediate for one voxel, "
            f"more than {MOST_RING_BYTES:,}",
        )
    return Verdict(True, "the ring fits into a core's cache")


def _environment_is_known() -> Verdict:
    if native.isa() not in native.isas():
        return Verdict(
            False,
            f"{native.ISA_VARIABLE}={native.isa()} cannot run on this processor, which has {native.isas()}",
        )
    core = os.environ.get(native.CORE_VARIABLE)
    if core and core not in native.CORES:
        return Verdict(False, f"{native.CORE_VARIABLE}={core} is not one of {native.CORES}")
    return Verdict(True, "float32 or bfloat16 on the CPU")


def _prefers(problem: Problem | BlockProblem) -> Verdict:
    if isinstance(problem, BlockProblem):
        return Verdict(True, "what a block folds in pays")
    # What `python -m bench.survey` measured against three torch convolutions: with AVX2 and, on a Zen 5, AVX-512.
    if not _timed(problem):
        return _untimed(problem)
    if problem.dtype == torch.bfloat16 and native.isa() == "avx2":
        return _torch_lacks_bfloat16()
    if native.isa() != "avx2":
        return _measures_faster()
    voxels = problem.batch * math.prod(problem.output_size)
    weights = problem.rank_in * problem.rank_out * math.prod(problem.kernel_size)
    wide = max(problem.kernel_size) > 3 or problem.ndim == 2
    if wide and voxels <= FEW_VOXELS and weights >= LARGE_CORE:
        return Verdict(
            False,
            f"a core of {weights:,} weights for {voxels} output voxels (limits {LARGE_CORE:,} and {FEW_VOXELS}): "
            "too few to share out among threads, or most taps lie outside",
        )
    if (
        problem.layout != "channels_last"
        and math.prod(problem.kernel_size) == math.prod(problem.stride) == 1
        and min(problem.in_channels, problem.out_channels) >= MANY_CHANNELS
    ):
        return Verdict(
            False, f"one tap and {MANY_CHANNELS} channels or more: large matrix products, torch's strength"
        )
    return _measures_faster()


def _measures_faster() -> Verdict:
    return Verdict(
        True, f"measures faster than three torch convolutions on this kind of problem ({_measured_with()})"
    )


def _prefers_gradient(problem: Problem) -> Verdict:
    # As above, by `python -m bench.survey --gradient`.
    if not _timed(problem):
        return _untimed(problem)
    spec = (problem.kernel_size, problem.stride, problem.dilation, problem.input_size)
    if native.isa() != "avx2" and cpu_derivative.onednn_errs(*spec):
        return Verdict(True, "torch's gradient of such a kernel's weights is wrong with AVX-512")
    if problem.dtype == torch.bfloat16 and native.isa() == "avx2":
        return _torch_lacks_bfloat16()
    voxels = problem.batch * math.prod(problem.output_size)
    macs = problem.batch * (
        math.prod(problem.input_size) * problem.rank_in * problem.in_channels
    ) + voxels * problem.rank_out * (problem.rank_in * math.prod(problem.kernel_size) + problem.out_channels)
    if problem.dtype == torch.bfloat16:
        many = voxels >= MANY_VOXELS
        if min(problem.rank_in, problem.rank_out) >= FULL_VECTOR if many else macs <= MOST_BFLOAT16_MACS:
            return Verdict(
                True, f"measures no slower than torch's bfloat16 on this kind of problem ({_measured_with()})"
            )
        return Verdict(
            False,
            f"bfloat16 of {voxels:,} voxels, ranks {problem.rank_in} and {problem.rank_out}: torch's own measures "
            "faster",
        )
    if voxels < FEW_VOXELS or macs < FEW_MACS:
        return Verdict(
            False,
            f"{macs:,} multiplications for {voxels} output voxels (limits {FEW_MACS:,} and {FEW_VOXELS}): as many "
            "calls as torch's, and little to save",
        )
    return Verdict(
        True, f"measures faster than the gradients of three torch convolutions ({_measured_with()})"
    )


def _measured_with() -> str:
    """Sets of instructions that compute with the same kernels share their measurements."""
    return "AVX2" if native.isa() == "avx2" else "AVX-512"


def _timed(problem: Problem) -> bool:
    isa = native.isa()
    if problem.dtype == torch.bfloat16:
        return isa in ("avx2", "avx512_bf16")
    # The others of AVX-512 compute float32 with the same kernels.
    return isa == "avx2" or isa.startswith(("avx512", "amx"))


def _untimed(problem: Problem) -> Verdict:
    dtype = str(problem.dtype).removeprefix("torch.")
    return Verdict(False, f"{dtype} has not been timed against torch with the {native.isa()} kernels")


def _torch_lacks_bfloat16() -> Verdict:
    return Verdict(True, "torch convolves bfloat16 a hundred times slower without bf16 instructions (AVX2)")


def _describe(problem: Problem) -> str:
    winograd, rows, cols = native.tiles(problem)
    core = f"Winograd F({winograd}×{winograd}, 3×3)" if winograd else "direct"
    return f"{native.isa()} kernels, {core} core, tiles of {rows}×{cols} voxels"


def _supports_block(problem: BlockProblem) -> Verdict:
    if problem.dtype not in (torch.float32, torch.bfloat16):
        return Verdict(
            False, f"computes float32 and bfloat16, not {str(problem.dtype).removeprefix('torch.')}"
        )
    if problem.stats == "covariance" and problem.u_out:
        return Verdict(False, "takes the covariance of the core's output only: leave u_out to the reader")
    if len(problem.channels) > MOST_SOURCES:
        return Verdict(False, f"reads at most {MOST_SOURCES} sources, not {len(problem.channels)}")
    if problem.side_by_side and any(rows % SIDE_BY_SIDE for rows in problem.rows[:-1]):
        return Verdict(
            False,
            f"puts sources side by side at multiples of {SIDE_BY_SIDE} channels only, not {problem.rows}",
        )
    return _ring_fits(problem) and _environment_is_known()


def _run_block(
    sources, expand, scale, shift, slope, reduce, *rest
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    layout = block_memory_format(sources[0].dim() - 2, False)
    sources = [source.contiguous(memory_format=layout) for source in sources]
    scale, shift, reduce = (
        [None if t is None else t.contiguous() for t in given] for given in (scale, shift, reduce)
    )
    return torch.ops.tucker_ops._tucker_block_cpu(sources, expand, scale, shift, slope, reduce, *rest)


def _run(*args) -> torch.Tensor:
    return torch.ops.tucker_ops._tucker_conv_cpu(*args)


# At import, not at first use: an exported program may call the private op before anyone calls ours.
native.load()

CPU = Backend(
    name="cpu",
    device="cpu",
    available=native.load,
    supports=_supports,
    prefers=_prefers,
    run=_run,
    describe=_describe,
    supports_block=_supports_block,
    run_block=_run_block,
    derivative=Derivative(
        supports=_supports_gradient,
        prefers=_prefers_gradient,
        run=cpu_derivative.run,
        stages=cpu_derivative.stages,
    ),
)
