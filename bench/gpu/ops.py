"""The op: one dense convolution, three convolutions, both compiled, and `tucker_conv`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, replace

import torch
from torch import Tensor

import tucker_ops
from bench.gpu.ceilings import float32_by
from bench.gpu.clock import Call, Clock
from bench.gpu.problems import GATES, TF32, TRITON_TARGETS, OpCase, op_cases
from bench.gpu.turns import (
    COMPILED,
    DENSE,
    OURS,
    THREE_CONVS,
    Peer,
    Settings,
    forget_compiled,
    measure,
    without_trials,
)
from bench.operands import Operands, float64_reference, make_operands, relative_rms
from bench.peers.base import LAYOUTS, conv_of, laid_out, pointwise
from tucker_ops.backends import cuda, native
from tucker_ops.cost import dense_cost, one_pass_cost
from tucker_ops.types import Problem

SHORT = {"contiguous": "NCDHW", "channels_last": "channels-last"}


def measure_ops(settings: Settings) -> Iterator[dict]:
    """A row for each case and peer."""
    clock = Clock(settings.device, apart=True)
    for case in op_cases(settings.shrink):
        settings.report(f"op {case.name}, {case.kind}: {case.problem}")
        with float32_by(case.kind == TF32), torch.inference_mode():
            yield from _measure(case, clock, settings)
        forget_compiled(settings)


def _measure(case: OpCase, clock: Clock, settings: Settings) -> list[dict]:
    problem = case.problem
    operands = on(make_operands(problem), settings.device)
    with without_trials():
        reference = float64_reference(operands)
    spec, size = problem.spec, {"batch": problem.batch, "itemsize": problem.dtype.itemsize}
    floor = one_pass_cost(spec, problem.ranks, problem.size, **size)
    about = {
        "part": "op",
        "case": case.name,
        "layer": str(problem),
        "kind": case.kind,
        "gate": GATES[case.kind],
        "floor_bytes": floor.bytes,
        "floor_macs": floor.macs,
        "copied_bytes": case.copied_bytes,
        "dense_macs": dense_cost(spec, problem.size, **size).macs,
        **described(case.problem.of_op(settings.device.type, "channels_last"), case.kind == TF32),
    }
    peers = peers_of(operands, reference, settings.backend, case.targets)
    return measure(peers, GATES[case.kind], clock, settings, about)


def on(operands: Operands, device: torch.device) -> Operands:
    tensors = {f.name: getattr(operands, f.name) for f in fields(operands) if f.name != "problem"}
    return replace(operands, **{name: tensor.to(device) for name, tensor in tensors.items()})


def peers_of(
    operands: Operands, reference: Tensor, backend: str | None, targets: Mapping[str, float]
) -> list[Peer]:
    """Eager peers and ours in both layouts, compiled ones channels-last alone: each takes seconds to compile."""

    def error_of(result: Tensor) -> float:
        return relative_rms(result, reference)

    peers = []
    for layout in reversed(LAYOUTS):
        short = SHORT[layout]
        peers += [
            Peer("one convolution", short, DENSE, lambda at=layout: _dense(operands, at), error_of),
            Peer("three convolutions", short, THREE_CONVS, lambda at=layout: _three(operands, at), error_of),
            Peer(
                "tucker_conv", short, OURS, lambda at=layout: _ours(operands, at, backend), error_of,
                shown=layout == "channels_last", targets=targets if layout == "channels_last" else {},
            ),
        ]  # fmt: skip
    last = SHORT["channels_last"]
    if operands.input.is_cuda and tucker_ops.backends()["triton"]:
        call = functools.partial(_ours, operands, "channels_last", "triton")
        kind = str(operands.problem.dtype).removeprefix("torch.")
        asked = TRITON_TARGETS.get((operands.problem.name, kind), {})
        peers.append(Peer("tucker_conv, Triton", last, "", call, error_of, shown=True, targets=asked))
    for name, group, make in (
        ("one convolution", DENSE, _dense),
        ("three convolutions", THREE_CONVS, _three),
    ):
        peers.append(
            Peer(
                f"{name}, torch.compile", last, group + COMPILED,
                lambda make=make: make(operands, "channels_last", torch.compile), error_of, slow=True,
            )
        )  # fmt: skip
    return peers


def _as_it_is(function: Callable) -> Callable:
    return function


def _dense(operands: Operands, layout: str, wrap: Callable = _as_it_is) -> Call:
    x, weight = laid_out(layout, operands.input, operands.dense)
    bias, geometry, conv = operands.bias, operands.geometry, conv_of(operands.problem)

    def dense(x, weight, bias):
        return conv(x, weight, bias, *geometry)

    call = wrap(dense)
    return lambda: call(x, weight, bias)


def _three(operands: Operands, layout: str, wrap: Callable = _as_it_is) -> Call:
    ndim = operands.problem.spec.ndim
    reduce, expand = pointwise(operands.u_in, ndim), pointwise(operands.u_out, ndim)
    x, *weights = laid_out(layout, operands.input, reduce, operands.core, expand)
    bias, geometry, conv = operands.bias, operands.geometry, conv_of(operands.problem)

    def three(x, reduce, core, expand, bias):
        return conv(conv(conv(x, reduce), core, None, *geometry), expand, bias)

    call = wrap(three)
    return lambda: call(x, *weights, bias)


def _ours(operands: Operands, layout: str, backend: str | None) -> Call:
    (x,) = laid_out(layout, operands.input)
    factors, geometry = operands.factors, operands.geometry
    return lambda: tucker_ops.tucker_conv(x, *factors, *geometry, backend=backend)


def described(problem: Problem, tf32: bool) -> dict[str, object]:
    """How the cost model would have the kernels run a problem, and how long it thinks that takes."""
    if problem.device != "cuda" or not native.load_cuda():
        return {"how": None, "predicted_us": None}
    choice = cuda.choice_of(problem, cuda.device_of(torch.cuda.current_device()), tf32)
    return {"how": choice.text, "predicted_us": choice.microseconds}
