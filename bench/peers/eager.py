"""Torch without compilation: one dense convolution, three convolutions, and tucker_ops' backends."""

from __future__ import annotations

from dataclasses import dataclass

import tucker_ops
from bench.operands import Operands
from bench.peers.base import (
    DENSE,
    LAYOUTS,
    ONE_PASS,
    OURS,
    THREE_CONVS,
    Call,
    Peer,
    conv_of,
    laid_out,
    pointwise,
)
from bench.problems import BenchProblem
from tucker_ops.backends.select import ORDER, choose


def torch_peers() -> list[Peer]:
    dense = [Peer(DENSE, layout, _Dense(layout), form=DENSE) for layout in LAYOUTS]
    return dense + [Peer(THREE_CONVS, layout, _ThreeConvs(layout), form=THREE_CONVS) for layout in LAYOUTS]


def our_peers(problem: BenchProblem) -> list[Peer]:
    """tucker_ops with each backend; one that cannot run here is listed with its reason."""
    peers = []
    for backend in ORDER:
        for layout in LAYOUTS:
            op_problem = problem.of_op("cpu", layout)
            verdict = backend.available() and backend.supports(op_problem)
            peers.append(
                Peer(
                    f"{OURS}{backend.name}",
                    layout,
                    _TuckerOps(layout, backend.name),
                    unavailable=None if verdict else verdict.reason,
                    automatic=choose(op_problem) is backend,
                    form=THREE_CONVS if backend.name == "reference" else ONE_PASS,
                )
            )
    return peers


@dataclass(frozen=True)
class _Dense:
    layout: str

    def __call__(self, operands: Operands) -> Call:
        input, weight = laid_out(self.layout, operands.input, operands.dense)
        bias, geometry, conv = operands.bias, operands.geometry, conv_of(operands.problem)
        return lambda: conv(input, weight, bias, *geometry)


@dataclass(frozen=True)
class _ThreeConvs:
    layout: str

    def __call__(self, operands: Operands) -> Call:
        ndim = operands.problem.spec.ndim
        reduce, expand = pointwise(operands.u_in, ndim), pointwise(operands.u_out, ndim)
        input, reduce, core, expand = laid_out(self.layout, operands.input, reduce, operands.core, expand)
        bias, geometry, conv = operands.bias, operands.geometry, conv_of(operands.problem)
        return lambda: conv(conv(conv(input, reduce), core, None, *geometry), expand, bias)


@dataclass(frozen=True)
class _TuckerOps:
    layout: str
    backend: str

    def __call__(self, operands: Operands) -> Call:
        input, core = laid_out(self.layout, operands.input, operands.core)
        u_in, _, u_out, bias = operands.factors
        geometry, backend = operands.geometry, self.backend
        return lambda: tucker_ops.tucker_conv(input, u_in, core, u_out, bias, *geometry, backend=backend)
