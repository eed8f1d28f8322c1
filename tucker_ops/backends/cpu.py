"""`cpu`: the one-pass kernel in csrc/cpu."""

from __future__ import annotations

import math

import torch

from tucker_ops.backends import native
from tucker_ops.backends.base import Backend, Verdict
from tucker_ops.types import Problem

MOST_RING_BYTES = 64 * 2**20

# Limits of the kinds of problem on which the kernel measured slower than three torch convolutions.
FEW_VOXELS = 128
LARGE_CORE = 400_000
MANY_CHANNELS = 256
FEW_TAPS, MANY_VOXELS = 9, 8192
WIDE_HALO = 0.5


def _supports(problem: Problem) -> Verdict:
    if problem.device != "cpu":
        return Verdict(False, f"tensors are on {problem.device}; this backend computes on the CPU")
    if problem.dtype not in (torch.float32, torch.bfloat16):
        return Verdict(
            False, f"computes float32 and bfloat16, not {str(problem.dtype).removeprefix('torch.')}"
        )
    # The least a thread holds: the ring for a single output voxel.
    reach = [d * (k - 1) + 1 for d, k in zip(problem.dilation, problem.kernel_size, strict=True)]
    ring = 4 * problem.rank_in * math.prod(reach)
    if ring > MOST_RING_BYTES:
        return Verdict(
            False,
            f"dilation {problem.dilation} spreads the kernel over {ring:,} bytes of intermediate for one voxel, "
            f"more than {MOST_RING_BYTES:,}",
        )
    if native.isa() not in native.isas():
        return Verdict(
            False,
            f"{native.ISA_VARIABLE}={native.isa()} cannot run on this processor, which has {native.isas()}",
        )
    return Verdict(True, "float32 or bfloat16 on the CPU")


def _prefers(problem: Problem) -> Verdict:
    # What `python -m bench.survey` measured against three torch convolutions on a processor with AVX2.
    if native.isa() != "avx2":
        return Verdict(
            False, f"timed against three torch convolutions with avx2 only, not with {native.isa()}"
        )
    if problem.dtype == torch.bfloat16:
        return Verdict(
            True, "torch convolves bfloat16 a hundred times slower without bf16 instructions (AVX2)"
        )
    voxels = problem.batch * math.prod(problem.output_size)
    weights = problem.rank_in * problem.rank_out * math.prod(problem.kernel_size)
    taps = math.prod(problem.kernel_size)
    channels_last = problem.layout == "channels_last"
    if not channels_last and voxels <= FEW_VOXELS and weights >= LARGE_CORE:
        return Verdict(
            False,
            f"a core of {weights:,} weights for {voxels} output voxels (limits {LARGE_CORE:,} and {FEW_VOXELS}): "
            "packing it takes longer than what it saves",
        )
    if not channels_last and taps == 1 and min(problem.in_channels, problem.out_channels) >= MANY_CHANNELS:
        return Verdict(
            False, f"one tap and {MANY_CHANNELS} channels or more: large matrix products, torch's strength"
        )
    halo = [
        d * (k - 1) / n
        for d, k, n in zip(problem.dilation, problem.kernel_size, problem.input_size, strict=True)
        if d > 1
    ]
    if problem.ndim == 2 and max(halo, default=0) >= WIDE_HALO:
        return Verdict(
            False,
            f"dilation {problem.dilation} on input {problem.input_size}: the halo is as large as the tile, "
            "so the plane is not shared out among threads",
        )
    if channels_last and taps <= FEW_TAPS and voxels >= MANY_VOXELS:
        return Verdict(
            False,
            f"{taps} taps, {voxels:,} voxels, channels-last: torch's convolutions measure as fast or faster",
        )
    return Verdict(True, "measures faster than three torch convolutions on this kind of problem (AVX2)")


def _run(*args) -> torch.Tensor:
    return torch.ops.tucker_ops._tucker_conv_cpu(*args)


# At import, not at first use: an exported program may call the private op before anyone calls ours.
native.load()

CPU = Backend(name="cpu", available=native.load, supports=_supports, prefers=_prefers, run=_run)
