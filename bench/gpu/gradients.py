"""The op with its gradient: one convolution, three, and `tucker_conv`, intermediates computed again or kept."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

import tucker_ops
from bench.gpu.clock import Call, Clock
from bench.gpu.ops import SHORT, on
from bench.gpu.problems import GRADIENT_GATES, OpCase, gradient_cases
from bench.gpu.turns import DENSE, OURS, THREE_CONVS, Peer, Settings, measure, without_trials
from bench.operands import Operands, make_operands, relative_rms
from bench.peers.base import LAYOUTS, conv_of, laid_out, pointwise
from tucker_ops.cost import dense_cost, one_pass_cost
from tucker_ops.ops.gradient import KEEP_VARIABLE
from tucker_ops.ops.reference import three_convs_backward

# Gradients of the input and of as many of the weights as a peer has.
Gradients = tuple[Tensor, ...]


def measure_gradients(settings: Settings) -> Iterator[dict]:
    """A row for each case and peer: forward and all gradients."""
    clock = Clock(settings.device, apart=True)
    for case in gradient_cases(settings.shrink):
        settings.report(f"gradient {case.name}, {case.kind}: {case.problem}")
        yield from _measure(case, clock, settings)


def _measure(case: OpCase, clock: Clock, settings: Settings) -> list[dict]:
    problem = case.problem
    operands = on(make_operands(problem), settings.device)
    grad = torch.randn(problem.output_shape, generator=torch.Generator().manual_seed(1))
    grad = grad.to(problem.dtype).to(settings.device)
    with without_trials():
        exact = _exact(operands, grad)
    spec, size = problem.spec, {"batch": problem.batch, "itemsize": problem.dtype.itemsize}
    # Each product of the forward has two in the gradient, which reads the input and the output's gradient and writes
    # the input's.
    floor = one_pass_cost(spec, problem.ranks, problem.size, **size)
    about = {
        "part": "gradient",
        "case": case.name,
        "layer": str(problem),
        "kind": case.kind,
        "gate": GRADIENT_GATES[case.kind],
        "floor_bytes": floor.bytes + case.copied_bytes + operands.input.nbytes,
        "floor_macs": 3 * floor.macs,
        "how": None,
        "predicted_us": None,
        "dense_macs": 3 * dense_cost(spec, problem.size, **size).macs,
    }
    peers = peers_of(operands, grad, exact, settings.backend, case.targets)
    return measure(peers, GRADIENT_GATES[case.kind], clock, settings, about)


def _exact(operands: Operands, grad: Tensor) -> Gradients:
    tensors = (t.double() for t in (grad, operands.input, *operands.factors[:3]))
    return three_convs_backward(*tensors, *operands.geometry, [True] * 5)


def peers_of(
    operands: Operands, grad: Tensor, exact: Gradients, backend: str | None, targets: Mapping[str, float]
) -> list[Peer]:
    def error_of(found: Gradients) -> float:
        # The dense convolution's weights have no counterpart among the factors'; its input's gradient has.
        pairs = zip(found, exact, strict=True) if len(found) == len(exact) else [(found[0], exact[0])]
        return max(relative_rms(ours.reshape(theirs.shape), theirs) for ours, theirs in pairs)

    peers = []
    for layout in reversed(LAYOUTS):
        short = SHORT[layout]
        for name, group, make in (
            ("one convolution", DENSE, _dense),
            ("three convolutions", THREE_CONVS, _three),
            ("tucker_conv", OURS, lambda operands, at: _ours(operands, at, backend)),
        ):
            peers.append(
                Peer(
                    name,
                    short,
                    group,
                    lambda make=make, at=layout: _with_gradient(*make(operands, at), *laid_out(at, grad)),
                    error_of,
                    shown=group == OURS and layout == "channels_last",
                )
            )
    if operands.input.is_cuda and tucker_ops.backends()["triton"]:
        for kept in (False, True):

            def prepare(kept=kept) -> Call:
                last = "channels_last"
                call = _with_gradient(*_ours(operands, last, "triton"), *laid_out(last, grad))

                def with_setting() -> Gradients:
                    with _keeping(kept):
                        return call()

                return with_setting

            peers.append(
                Peer(
                    f"tucker_conv, Triton, t and z {'kept' if kept else 'again'}",
                    SHORT["channels_last"],
                    "",
                    prepare,
                    error_of,
                    shown=True,
                    targets={} if kept else targets,
                )
            )
    return peers


@contextmanager
def _keeping(kept: bool) -> Iterator[None]:
    before = os.environ.get(KEEP_VARIABLE)
    os.environ[KEEP_VARIABLE] = str(int(kept))
    try:
        yield
    finally:
        if before is None:
            del os.environ[KEEP_VARIABLE]
        else:
            os.environ[KEEP_VARIABLE] = before


def _with_gradient(function: Callable, tensors: tuple[Tensor, ...], grad: Tensor) -> Call:
    """Forward and gradients; what calls it may be in inference mode."""
    with torch.inference_mode(False):
        leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
        grad = grad.clone()

    def call() -> Gradients:
        with torch.inference_mode(False), torch.enable_grad():
            return torch.autograd.grad(function(*leaves), leaves, grad)

    return call


def _dense(operands: Operands, layout: str) -> tuple[Callable, tuple[Tensor, ...]]:
    conv, geometry = conv_of(operands.problem), operands.geometry

    def dense(x, weight, bias):
        return conv(x, weight, bias, *geometry)

    return dense, (*laid_out(layout, operands.input, operands.dense), operands.bias)


def _three(operands: Operands, layout: str) -> tuple[Callable, tuple[Tensor, ...]]:
    ndim = operands.problem.spec.ndim
    conv, geometry = conv_of(operands.problem), operands.geometry
    reduce, expand = pointwise(operands.u_in, ndim), pointwise(operands.u_out, ndim)

    def three(x, reduce, core, expand, bias):
        return conv(conv(conv(x, reduce), core, None, *geometry), expand, bias)

    return three, (*laid_out(layout, operands.input, reduce, operands.core, expand), operands.bias)


def _ours(operands: Operands, layout: str, backend: str | None) -> tuple[Callable, tuple[Tensor, ...]]:
    geometry = operands.geometry

    def ours(x, u_in, core, u_out, bias):
        return tucker_ops.tucker_conv(x, u_in, core, u_out, bias, *geometry, backend=backend)

    return ours, (*laid_out(layout, operands.input), *operands.factors)
