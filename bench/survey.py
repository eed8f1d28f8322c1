"""`python -m bench.survey`: on which kinds of problem do the CPU's kernels lose?

Times the `cpu` backend against the `reference` backend on random layers, both in the layout that the input
has, as the automatic choice must: the forward, or with --gradient all gradients at once. The predicates `prefers` in
tucker_ops/backends/cpu.py rest on its tables.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.box import MARKDOWN
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from bench.folders import as_json
from bench.operands import Operands, make_operands, relative_rms
from bench.peers.base import LAYOUTS, laid_out
from bench.problems import DTYPES, BenchProblem
from bench.provenance import provenance
from tucker_ops.backends.cpu_derivative import onednn_errs
from tucker_ops.backends.select import choose, choose_derivative
from tucker_ops.cost import one_pass_cost
from tucker_ops.nnunet.output import write_file
from tucker_ops.types import ConvSpec

# Of a layer, until both limits are reached: seconds, and rounds.
SECONDS, FEWEST_ROUNDS, MOST_ROUNDS = 0.15, 7, 40
# Two results of one problem may differ by the errors of both.
GATES = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
BACKENDS = ("cpu", "reference")
MOST_MACS = 4e8


def random_layers(seed: int) -> Iterator[BenchProblem]:
    """Endless layers of 2D and 3D networks: kernel 1, 3, 5 or flat, stride 1 to 3, some dilated up to 12."""
    rng = random.Random(seed)
    while True:
        ndim = rng.choice([2, 3, 3])
        kernel = rng.choice([(3,) * ndim, (3,) * ndim, (1,) + (3,) * (ndim - 1), (5,) * ndim, (1,) * ndim])
        dilation = rng.choice([2, 3, 6, 12]) if rng.random() < 0.2 else 1
        channels = rng.choice([8, 16, 32, 64, 128, 256, 320])
        out = rng.choice([channels, channels, 2 * channels, max(8, channels // 2)])
        share = rng.choice([0.25, 0.5, 1.0])
        spec = ConvSpec(
            in_channels=channels,
            out_channels=out,
            kernel_size=kernel,
            stride=(rng.choice([1, 1, 2, 3]),) * ndim,
            padding=tuple(dilation * (k - 1) // 2 for k in kernel),
            dilation=(dilation,) * ndim,
        )
        ranks = tuple(max(4, round(c * share)) for c in (channels, out))
        size = (rng.choice({2: [4, 8, 16, 32, 64, 128], 3: [3, 4, 5, 8, 10, 16, 24, 40]}[ndim]),) * ndim
        if min(spec.output_size(size)) >= 1 and one_pass_cost(spec, ranks, size).macs <= MOST_MACS:
            yield BenchProblem("random", "survey", spec, ranks, size)


def kind_of(problem: BenchProblem, layout: str, *, gradient: bool) -> tuple[str, str, str]:
    """Whether the automatic choice takes the kernel, taps of the core, and layout."""
    chosen = (choose_derivative if gradient else choose)(problem.of_op("cpu", layout))
    taps = math.prod(problem.spec.kernel_size)
    return (
        "taken" if chosen.name == "cpu" else "declined",
        "1 tap" if taps == 1 else "2 to 9 taps" if taps <= 9 else "more",
        layout,
    )


def calls_of(operands: Operands, layout: str, *, gradient: bool) -> dict[str, Callable[[], Sequence[Tensor]]]:
    """What is timed, by backend."""
    (x,) = laid_out(layout, operands.input)
    problem = operands.problem
    (grad,) = laid_out(
        layout,
        torch.randn(problem.output_shape, generator=torch.Generator().manual_seed(1)).to(problem.dtype),
    )
    weights, bias = operands.factors[:3], operands.factors[3]
    ops = torch.ops.tucker_ops

    def call(backend: str) -> Sequence[Tensor]:
        if gradient:
            return ops.tucker_conv_backward(
                grad, x, *weights, *operands.geometry, [True] * 5, backend=backend
            )
        return (ops.tucker_conv(x, *weights, bias, *operands.geometry, backend=backend),)

    return {name: lambda name=name: call(name) for name in BACKENDS}


def ratio_of(calls: dict[str, Callable[[], Sequence[Tensor]]], dtype: torch.dtype) -> float:
    """Median over rounds of the time of `cpu` ÷ that of `reference`, once their results agree."""
    results = [calls[name]() for name in BACKENDS]
    for ours, theirs in zip(*results, strict=True):
        error = relative_rms(ours, theirs.double())
        if not error <= GATES[dtype]:
            raise SystemExit(f"results differ by {error:.1e}, more than {GATES[dtype]}; nothing was timed")
    ratios, end = [], time.perf_counter() + SECONDS
    while len(ratios) < FEWEST_ROUNDS or (time.perf_counter() < end and len(ratios) < MOST_ROUNDS):
        seconds = {}
        for name in random.Random(len(ratios)).sample(BACKENDS, len(BACKENDS)):
            begin = time.perf_counter()
            calls[name]()
            seconds[name] = time.perf_counter() - begin
        ratios.append(seconds["cpu"] / seconds["reference"])
    return statistics.median(ratios)


def survey(
    seconds: float, seed: int, *, dtype: str = "float32", gradient: bool = False
) -> list[tuple[float, BenchProblem, str]]:
    """(time of `cpu` / time of `reference`, layer, layout) of as many layers as `seconds` allow."""
    rows: list[tuple[float, BenchProblem, str]] = []
    layers, end = random_layers(seed), time.monotonic() + seconds
    with torch.inference_mode():
        for _ in track(iter(lambda: time.monotonic() < end, False), description="layers", total=None):
            problem, layout = replace(next(layers), dtype_name=dtype), LAYOUTS[len(rows) % 2]
            spec = problem.spec
            if gradient and onednn_errs(spec.kernel_size, spec.stride, spec.dilation, problem.size):
                continue
            calls = calls_of(make_operands(problem), layout, gradient=gradient)
            rows.append((ratio_of(calls, problem.dtype), problem, layout))
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.survey", description=__doc__)
    parser.add_argument("--seconds", type=float, default=240)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=[name for name in DTYPES if name != "float16"], default="float32")
    parser.add_argument("--gradient", action="store_true", help="time the gradient instead of the forward")
    parser.add_argument("-o", "--output", type=Path, help="a JSON file for the layers one by one")
    options = parser.parse_args(arguments)
    rows = survey(options.seconds, options.seed, dtype=options.dtype, gradient=options.gradient)
    console, groups = Console(), defaultdict(list)
    for ratio, problem, layout in rows:
        groups[kind_of(problem, layout, gradient=options.gradient)].append(ratio)
    columns = ("choice", "core", "layout", "layers", "median", "80th percentile", "slower")
    what = "gradient" if options.gradient else "forward"
    title = f"{what}, {options.dtype}: time of cpu / time of reference"
    table = Table(*columns, title=title, box=MARKDOWN)
    for kind, ratios in sorted(groups.items()):
        ordered = sorted(ratios)
        table.add_row(
            *kind,
            str(len(ordered)),
            f"{statistics.median(ordered):.2f}",
            f"{ordered[int(0.8 * (len(ordered) - 1))]:.2f}",
            f"{sum(r > 1 for r in ordered) / len(ordered):.0%}",
        )
    console.print(table)
    for ratio, problem, layout in sorted(rows, key=lambda row: -row[0])[:15]:
        console.print(f"{ratio:6.2f}  {problem} {layout}")
    origin = provenance()
    console.print(
        ", ".join(f"{k} {origin[k]}" for k in ("cpu", "tucker_ops_isa", "torch", "onednn", "threads"))
    )
    if options.output:
        layers = [
            {"ratio": ratio, "layer": str(problem), "layout": layout} for ratio, problem, layout in rows
        ]
        write_file(options.output, as_json([row | origin for row in layers]).encode(), force=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
