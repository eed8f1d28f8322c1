"""Configurations of the Triton kernels: timed on the card that is here when asked, and looked up at each call.

A table holds, for a problem, what was fastest on a card of one name with one version of Triton. Without an entry the
shipped default runs. Nothing is timed unless `tune` is called: never while tracing, compiling or capturing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from tucker_ops.backends import tuned
from tucker_ops.backends.timing import (
    LEAST_GAIN,
    MOST_DIFFERENCE,
    Timer,
    difference,
    operands_of,
    time_on_gpu,
)
from tucker_ops.backends.triton import launch
from tucker_ops.backends.triton.config import (
    CANDIDATES,
    DEFAULT,
    Config,
    Configs,
    as_integers,
    from_integers,
)
from tucker_ops.errors import BackendError
from tucker_ops.types import Problem

COMPILER = f"triton-{triton.__version__}"
ENTRIES = len(as_integers(DEFAULT))
Call = Callable[[Configs], Sequence[Tensor]]


@dataclass(frozen=True)
class TritonTuning:
    """One problem: median microseconds by kernel and configuration, and the best of each.

    Times of "reduce" and "convolve" are those of the forward, times of "outer" those of the gradient; what the card
    has no room for is not among them. A default stays where nothing is faster by more than LEAST_GAIN.
    """

    problem: Problem
    times: dict[str, dict[Config, float]]
    best: Configs


def tune(problem: Problem, *, timer: Timer = time_on_gpu, target: str = "cuda") -> TritonTuning:
    """Times the candidates of each kernel in turn, the others at their best so far, on torch device `target`.

    Raises BackendError where a candidate's result differs from the first one's by more than rounding, and where the
    card has no room for any.
    """
    operands = operands_of(problem, target)
    grad = launch.forward(*operands)

    def forward(configs: Configs) -> Sequence[Tensor]:
        return (launch.forward(*operands, configs=configs),)

    def backward(configs: Configs) -> Sequence[Tensor]:
        return launch.backward(grad, *operands[:4], *operands[5:], [True] * 5, configs=configs)

    calls: dict[str, Call] = {"reduce": forward, "convolve": forward, "outer": backward}
    best, times = DEFAULT, {}
    for kernel in (field.name for field in fields(Configs)):
        # What runs in the forward alone must have room in the gradient as well.
        results = (lambda configs: (*forward(configs), *backward(configs))) if kernel != "outer" else backward
        times[kernel] = _times(problem, kernel, best, results, calls[kernel], timer)
        default = getattr(DEFAULT, kernel)
        fastest = min(times[kernel], key=times[kernel].__getitem__)
        if (
            default not in times[kernel]
            or times[kernel][fastest] <= (1 - LEAST_GAIN) * times[kernel][default]
        ):
            best = replace(best, **{kernel: fastest})
    return TritonTuning(problem, times, best)


def _times(
    problem: Problem, kernel: str, best: Configs, results_of: Call, call: Call, timer: Timer
) -> dict[Config, float]:
    expected, times = None, {}
    for config in (getattr(DEFAULT, kernel), *CANDIDATES[kernel]):
        configs = replace(best, **{kernel: config})
        try:
            results = results_of(configs)
        except OutOfResources:
            continue
        expected = results if expected is None else expected
        error = max(difference(found, wanted) for found, wanted in zip(results, expected, strict=True))
        if not error <= MOST_DIFFERENCE[problem.dtype]:
            raise BackendError(
                f"{kernel} as {config} is off by {error:.1e} of the default's result on this card; please report it "
                "with the output of tucker_ops.backends()"
            )
        times[config] = timer(lambda configs=configs: call(configs))
    if not times:
        raise BackendError(f"this card has no room for {kernel} in any configuration; please report it")
    return times


def save(tunings: Iterable[TritonTuning], tf32: bool, notes: dict[str, str]) -> str:
    """Adds what was found to the table of torch's current card; returns the table's path."""
    path = tuned.table_path(torch.cuda.get_device_name(), COMPILER)
    problems = tuned.read(path, ENTRIES, from_integers)
    for tuning in tunings:
        problems[tuned.key_of_problem(tuning.problem, tf32)] = as_integers(tuning.best)
    tuned.write(path, problems, notes)
    _table.cache_clear()
    return str(path)


@cache
def _table(index: int) -> dict[str, list[int]]:
    return tuned.read(tuned.table_path(torch.cuda.get_device_name(index), COMPILER), ENTRIES, from_integers)


def configs_of(
    sources: Sequence[Tensor], core: Tensor, out_channels: int, stride, padding, dilation
) -> Configs:
    """What the table of the sources' card says of this call, else the shipped default."""
    first = sources[0]
    if not first.is_cuda:
        return DEFAULT
    table = _table(first.device.index)
    if not table:
        return DEFAULT
    channels = (
        first.shape[0],
        sum(source.shape[1] for source in sources),
        core.shape[1],
        core.shape[0],
        out_channels,
    )
    tf32 = launch.arithmetic(first.dtype)["PRECISION"] == "tf32"
    kind = tuned.kind_of(first.dtype, tf32)
    key = tuned.key_of(kind, channels, first.shape[2:], core.shape[2:], stride, padding, dilation)
    return from_integers(table[key]) if key in table else DEFAULT
