"""Parameters, multiply-accumulates and bytes moved by a convolution, dense and factorised: arithmetic only.

Counts follow fvcore: one MAC per kernel tap and pair of channels at every output voxel (at every *input*
voxel for a transposed convolution); additions of a bias are free.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tucker_ops.types import ConvSpec, Ranks


@dataclass(frozen=True)
class Cost:
    """Parameters (biases included), MACs and bytes read and written of a layer or, summed, of a network."""

    params: int = 0
    macs: int = 0
    bytes: int = 0

    def __add__(self, other: Cost) -> Cost:
        if not isinstance(other, Cost):
            return NotImplemented
        return Cost(self.params + other.params, self.macs + other.macs, self.bytes + other.bytes)

    def __radd__(self, other: int) -> Cost:
        return self if other == 0 else NotImplemented


@dataclass(frozen=True)
class Voxels:
    """Spatial positions that a layer reads and writes, per item of the batch."""

    input: int
    output: int

    @classmethod
    def of(cls, spec: ConvSpec, input_size: Sequence[int]) -> Voxels:
        """For an input of spatial extents `input_size`; raises ShapeError for another number of axes."""
        size = tuple(input_size)
        return cls(math.prod(size), math.prod(spec.output_size(size)))

    @classmethod
    def per_unit(cls, spec: ConvSpec) -> Voxels:
        """The ratio of both where no extent is known: one output voxel (one input voxel if transposed)."""
        step = math.prod(spec.stride)
        return cls(1, step) if spec.transposed else cls(step, 1)


def dense_cost(
    spec: ConvSpec, input_size: Sequence[int] | Voxels, *, batch: int = 1, itemsize: int = 4
) -> Cost:
    """Cost of the convolution as torch runs it, for an input [batch, C_in, *input_size].

    Bytes: the input and the weights read once, the output written once, at `itemsize` bytes an element.
    """
    voxels = _voxels(spec, input_size)
    taps = math.prod(spec.kernel_size)
    weights = spec.in_channels * spec.out_channels // spec.groups * taps
    params = weights + (spec.out_channels if spec.bias else 0)
    positions = voxels.input if spec.transposed else voxels.output
    activations = voxels.input * spec.in_channels + voxels.output * spec.out_channels
    return Cost(params, batch * positions * weights, itemsize * (batch * activations + params))


def core_params(spec: ConvSpec, rank_in, rank_out, rank_taps=None):
    """Parameters of a core [R_out, R_in, *kernel], or, with a rank of the taps, of [R_out, R_in, R_taps] and u_taps.

    Numbers, or numpy arrays of them.
    """
    taps = math.prod(spec.kernel_size)
    if rank_taps is None:
        return rank_in * rank_out * taps
    return rank_in * rank_out * rank_taps + rank_taps * taps


def one_pass_cost(
    spec: ConvSpec,
    ranks: Ranks,
    input_size: Sequence[int] | Voxels,
    *,
    batch: int = 1,
    itemsize: int = 4,
) -> Cost:
    """Cost of the factorised convolution with both intermediates kept out of memory.

    ranks is (R_in, R_out). The halo that tiles compute twice depends on the kernel and is left out. A third rank, of
    the taps, saves parameters alone: the core that convolves is multiplied out before, which is left out too.
    """
    voxels = _voxels(spec, input_size)
    rank_in, rank_out = ranks[:2]
    reduce = spec.in_channels * rank_in
    core = core_params(spec, rank_in, rank_out)
    expand = rank_out * spec.out_channels
    read = reduce + core + expand + (spec.out_channels if spec.bias else 0)
    positions = voxels.input if spec.transposed else voxels.output
    macs = batch * (voxels.input * reduce + positions * core + voxels.output * expand)
    activations = voxels.input * spec.in_channels + voxels.output * spec.out_channels
    params = read - core + core_params(spec, *ranks)
    return Cost(params, macs, itemsize * (batch * activations + read))


def three_conv_cost(
    spec: ConvSpec,
    ranks: Ranks,
    input_size: Sequence[int] | Voxels,
    *,
    batch: int = 1,
    itemsize: int = 4,
) -> Cost:
    """As `one_pass_cost`, in three convolutions: both intermediates are written to memory and read back."""
    voxels = _voxels(spec, input_size)
    rank_in, rank_out = ranks[:2]
    fused = one_pass_cost(spec, ranks, voxels, batch=batch, itemsize=itemsize)
    intermediates = 2 * batch * (voxels.input * rank_in + voxels.output * rank_out)
    return fused + Cost(bytes=itemsize * intermediates)


def fvcore_flops(macs: int, norm_elements: int) -> int:
    """fvcore's FlopCountAnalysis: convolution MACs + 5 for each element that an affine norm writes."""
    return macs + 5 * norm_elements


def _voxels(spec: ConvSpec, size: Sequence[int] | Voxels) -> Voxels:
    return size if isinstance(size, Voxels) else Voxels.of(spec, size)
