"""The tensors of a problem and the float64 answer to it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.problems import BenchProblem
from tucker_ops.ops.reference import three_convs

SEED = 20240409
REFERENCE_COLUMN_BYTES = 1 << 28


@dataclass(frozen=True)
class Operands:
    """Input and weights, contiguous, rounded to the problem's dtype.

    input [N, C_in, *size], u_in [R_in, C_in], core [R_out, R_in, *kernel], u_out [C_out, R_out],
    bias [C_out], and dense [C_out, C_in, *kernel]: the kernel that the factors multiply out to.
    """

    problem: BenchProblem
    input: Tensor
    u_in: Tensor
    core: Tensor
    u_out: Tensor
    bias: Tensor
    dense: Tensor

    @property
    def factors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.u_in, self.core, self.u_out, self.bias

    @property
    def geometry(self) -> tuple[list[int], list[int], list[int]]:
        spec = self.problem.spec
        return list(spec.stride), list(spec.padding), list(spec.dilation)


def make_operands(problem: BenchProblem) -> Operands:
    """Seeded normal numbers, the weights scaled so that every stage keeps unit variance."""
    spec, (rank_in, rank_out) = problem.spec, problem.ranks
    taps = math.prod(spec.kernel_size)
    generator = torch.Generator().manual_seed(SEED)

    def normal(shape: tuple[int, ...], fan_in: int) -> Tensor:
        return (torch.randn(shape, generator=generator) / math.sqrt(fan_in)).to(problem.dtype)

    u_in = normal((rank_in, spec.in_channels), spec.in_channels)
    core = normal((rank_out, rank_in, *spec.kernel_size), rank_in * taps)
    u_out = normal((spec.out_channels, rank_out), rank_out)
    dense = torch.einsum("or,rs...,si->oi...", u_out.double(), core.double(), u_in.double())
    return Operands(
        problem=problem,
        input=normal((problem.batch, spec.in_channels, *problem.size), 1),
        u_in=u_in,
        core=core,
        u_out=u_out,
        bias=normal((spec.out_channels,), 1),
        dense=dense.to(problem.dtype),
    )


def float64_reference(operands: Operands) -> Tensor:
    """The op in float64 on the rounded operands: [N, C_out, *output], contiguous.

    Computed in slabs along the first spatial axis, because torch unfolds a float64 convolution into
    columns of R_in × taps numbers a voxel: 7 GB at 32 channels and 128³.
    """
    spec = operands.problem.spec
    stride, padding, dilation = operands.geometry
    input, *factors = (tensor.double() for tensor in (operands.input, *operands.factors))
    result = input.new_empty(operands.problem.output_shape)
    column_bytes = 8 * operands.core[0].numel() * math.prod(result.shape[3:])
    step = max(1, REFERENCE_COLUMN_BYTES // column_bytes)
    extent = input.shape[2]
    for first in range(0, result.shape[2], step):
        last = min(first + step, result.shape[2])
        begin = first * stride[0] - padding[0]
        end = (last - 1) * stride[0] + dilation[0] * (spec.kernel_size[0] - 1) + 1 - padding[0]
        slab = input[:, :, max(begin, 0) : min(end, extent)]
        # Zeros may be added before the first stage, because it has no bias.
        outside = (max(-begin, 0), max(end - extent, 0))
        slab = F.pad(slab, (0, 0) * (input.dim() - 3) + outside)
        result[:, :, first:last] = three_convs(slab, *factors, stride, [0, *padding[1:]], dilation)
    return result


def relative_rms(result: Tensor, reference: Tensor) -> float:
    """‖result − reference‖ / ‖reference‖, in float64; NaN or infinity where the result has one."""
    return (
        torch.linalg.vector_norm(result.double() - reference) / torch.linalg.vector_norm(reference)
    ).item()
