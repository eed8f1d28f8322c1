"""Times the ways the CUDA kernels can compute a problem on the card that is here, for the tables of `tuned`.

Every candidate's result is checked against the stages one by one before it is timed, which in turn are checked against
the reference in float64 by the tests. Nothing here runs unless it is called: never while tracing or capturing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from tucker_ops.backends import cuda, tuned
from tucker_ops.backends.timing import (
    LEAST_GAIN,
    MOST_DIFFERENCE,
    Timer,
    difference,
    operands_of,
    time_on_gpu,
)
from tucker_ops.errors import BackendError
from tucker_ops.types import Problem

MOST_PIECES = 16


@dataclass(frozen=True)
class Tuning:
    """One problem's candidates, (one_pass, form, chunk) with the median microseconds of each, and the best.

    modelled: what the cost model would have chosen; it stays where nothing is faster by more than LEAST_GAIN.
    """

    problem: Problem
    times: dict[tuple[int, int, int], float]
    modelled: tuple[int, int, int]

    @property
    def best(self) -> tuple[int, int, int]:
        fastest = min(self.times, key=self.times.__getitem__)
        if self.times[fastest] > (1 - LEAST_GAIN) * self.times[self.modelled]:
            return self.modelled
        return fastest


def candidates(problem: Problem, device: cuda.Device, tf32: bool) -> list[tuple[int, int, int]]:
    """(one_pass, form, chunk): the stages, and each form of the one-pass kernel with the depth in 1, 2, … pieces."""
    depth = problem.output_size[0] if problem.ndim == 3 else 1
    chunks = sorted({math.ceil(depth / pieces) for pieces in range(1, min(depth, MOST_PIECES) + 1)})
    forms = cuda.forms_of(problem, device, tf32)
    return [(0, 0, 0), *((1, form, chunk) for form in forms for chunk in chunks)]


def tune(
    problem: Problem,
    device: cuda.Device,
    *,
    tf32: bool = False,
    timer: Timer = time_on_gpu,
    target: str = "cuda",
) -> Tuning:
    """Times every candidate for one problem, on random operands on torch device `target`.

    Raises BackendError where two candidates disagree by more than rounding: a kernel is wrong on this card.
    """
    operands = operands_of(problem, target)
    times, expected = {}, None
    for candidate in candidates(problem, device, tf32):
        one_pass, form, chunk = candidate
        choice = [int(tf32), 1, form, chunk] if one_pass else [int(tf32), 0]

        def call(choice=choice) -> Tensor:
            return cuda.run_on(device, choice, *operands)

        result = call()
        expected = result if expected is None else expected
        error = difference(result, expected)
        if not error <= MOST_DIFFERENCE[problem.dtype]:
            raise BackendError(
                f"form {form} with chunks of {chunk} planes is off by {error:.1e} of the result on this card; "
                "please report it with the output of tucker_ops.backends()"
            )
        times[candidate] = timer(call)
    model = cuda.choice_of(problem, device, tf32)
    modelled = (1, model.form, model.chunk) if model.one_pass else (0, 0, 0)
    if modelled not in times:
        modelled = min(times, key=lambda c: (c[:2] != modelled[:2], abs(c[2] - modelled[2])))
    return Tuning(problem, times, modelled)


def save(tunings: Iterable[Tuning], tf32: bool, notes: dict[str, str]) -> str:
    """Adds what was found to the table of torch's current card; returns the table's path."""
    path = tuned.table_path(torch.cuda.get_device_name())
    problems = tuned.read(path)
    for tuning in tunings:
        problems[tuned.key_of_problem(tuning.problem, tf32)] = list(tuning.best)
    tuned.write(path, problems, notes)
    return str(path)
