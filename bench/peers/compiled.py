"""torch.compile (inductor, default mode) of the dense convolution and of three convolutions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bench.operands import Operands
from bench.peers.base import Call, Peer, PeerError, conv_of, laid_out, pointwise

COMPILED = "compile:"


def compiled_peers(eager: Sequence[Peer]) -> list[Peer]:
    """One for each of the eager peers of torch, which say in its place how long a call takes."""
    return [
        replace(peer, name=f"{COMPILED}{peer.name}", prepare=prepare(peer.layout), judged_by=peer)
        for peer in eager
        for prepare in [_PREPARATIONS[peer.name]]
    ]


@dataclass(frozen=True)
class _Dense:
    layout: str

    def __call__(self, operands: Operands) -> Call:
        conv, geometry, bias = conv_of(operands.problem), operands.geometry, operands.bias

        def layer(input: Tensor, weight: Tensor) -> Tensor:
            return conv(input, weight, bias, *geometry)

        return _compiled(layer, *laid_out(self.layout, operands.input, operands.dense))


@dataclass(frozen=True)
class _ThreeConvs:
    layout: str

    def __call__(self, operands: Operands) -> Call:
        conv, geometry, bias = conv_of(operands.problem), operands.geometry, operands.bias
        ndim = operands.problem.spec.ndim
        reduce, expand = pointwise(operands.u_in, ndim), pointwise(operands.u_out, ndim)

        def layer(input: Tensor, reduce: Tensor, core: Tensor, expand: Tensor) -> Tensor:
            return conv(conv(conv(input, reduce), core, None, *geometry), expand, bias)

        return _compiled(layer, *laid_out(self.layout, operands.input, reduce, operands.core, expand))


_PREPARATIONS = {"dense": _Dense, "three_convs": _ThreeConvs}


def _compiled(layer: Callable[..., Tensor], *arguments: Tensor) -> Call:
    # Each layer is a function of its own, so that no limit on recompiling one function is met.
    compiled = torch.compile(layer, dynamic=False, fullgraph=True)
    try:
        compiled(*arguments)
    except Exception as error:
        # Whatever the compiler or the C++ compiler behind it raises, the other peers shall still be measured.
        raise PeerError(f"torch.compile fails: {type(error).__name__}: {str(error).strip()[:200]}") from error
    return lambda: compiled(*arguments)
