"""Who computes a problem: torch's dense convolution, three torch convolutions, and tucker_ops' backends.

Each peer exists in both memory layouts. Input and weights are laid out before the clock starts, so a
peer pays only for the conversions that it makes itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

import tucker_ops
from bench.operands import Operands
from bench.problems import BenchProblem
from tucker_ops.backends.select import ORDER, choose
from tucker_ops.cost import dense_cost, one_pass_cost
from tucker_ops.types import Problem

LAYOUTS = ("contiguous", "channels_last")
DENSE = "dense"
THREE_CONVS = "three_convs"
OURS = "tucker_ops:"

Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Peer:
    """One way to compute a problem in one layout.

    prepare makes, from operands, the call that is timed; unavailable says why there is none here. automatic:
    tucker_ops takes this backend for this problem and layout where none is named.
    """

    name: str
    layout: str
    prepare: Callable[[Operands], Call]
    unavailable: str | None = None
    automatic: bool = False

    @property
    def key(self) -> str:
        return f"{self.name}-{self.layout}"

    def macs(self, problem: BenchProblem) -> int:
        """Multiply-accumulates by tucker_ops.cost, halos that a kernel computes twice left out."""
        if self.name == DENSE:
            return dense_cost(problem.spec, problem.size, batch=problem.batch).macs
        return one_pass_cost(problem.spec, problem.ranks, problem.size, batch=problem.batch).macs


def peers_of(problem: BenchProblem) -> tuple[Peer, ...]:
    """All peers of a problem; a backend that cannot run here is listed with its reason."""
    peers = [Peer(DENSE, layout, _Dense(layout)) for layout in LAYOUTS]
    peers += [Peer(THREE_CONVS, layout, _ThreeConvs(layout)) for layout in LAYOUTS]
    for backend in ORDER:
        for layout in LAYOUTS:
            op_problem = _op_problem(problem, layout)
            verdict = backend.available() and backend.supports(op_problem)
            peers.append(
                Peer(
                    f"{OURS}{backend.name}",
                    layout,
                    _TuckerOps(layout, backend.name),
                    unavailable=None if verdict else verdict.reason,
                    automatic=choose(op_problem) is backend,
                )
            )
    return tuple(peers)


@dataclass(frozen=True)
class _Dense:
    layout: str

    def __call__(self, operands: Operands) -> Call:
        input, weight = _laid_out(self.layout, operands.input, operands.dense)
        bias, geometry, conv = operands.bias, operands.geometry, _conv(operands)
        return lambda: conv(input, weight, bias, *geometry)


@dataclass(frozen=True)
class _ThreeConvs:
    layout: str

    def __call__(self, operands: Operands) -> Call:
        ones = (1,) * operands.problem.spec.ndim
        input, reduce, core, expand = _laid_out(
            self.layout,
            operands.input,
            operands.u_in.reshape(*operands.u_in.shape, *ones),
            operands.core,
            operands.u_out.reshape(*operands.u_out.shape, *ones),
        )
        bias, geometry, conv = operands.bias, operands.geometry, _conv(operands)
        return lambda: conv(conv(conv(input, reduce), core, None, *geometry), expand, bias)


@dataclass(frozen=True)
class _TuckerOps:
    layout: str
    backend: str

    def __call__(self, operands: Operands) -> Call:
        input, core = _laid_out(self.layout, operands.input, operands.core)
        u_in, _, u_out, bias = operands.factors
        geometry, backend = operands.geometry, self.backend
        return lambda: tucker_ops.tucker_conv(input, u_in, core, u_out, bias, *geometry, backend=backend)


def _conv(operands: Operands) -> Callable[..., Tensor]:
    return F.conv2d if operands.problem.spec.ndim == 2 else F.conv3d


def _laid_out(layout: str, *tensors: Tensor) -> tuple[Tensor, ...]:
    channels_last = torch.channels_last if tensors[0].dim() == 4 else torch.channels_last_3d
    memory_format = channels_last if layout == "channels_last" else torch.contiguous_format
    return tuple(tensor.contiguous(memory_format=memory_format) for tensor in tensors)


def _op_problem(problem: BenchProblem, layout: str) -> Problem:
    spec = problem.spec
    return Problem(
        batch=problem.batch,
        in_channels=spec.in_channels,
        rank_in=problem.ranks[0],
        rank_out=problem.ranks[1],
        out_channels=spec.out_channels,
        input_size=problem.size,
        kernel_size=spec.kernel_size,
        stride=spec.stride,
        padding=spec.padding,
        dilation=spec.dilation,
        dtype=problem.dtype,
        device="cpu",
        layout=layout,
        bias=True,
    )
