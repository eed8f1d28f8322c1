"""`python -m bench.errors`: how far each CPU kernel is from float64.

Relative RMS error over the whole output, on the same rounded input and weights in float64, worst and median of
random layers at every rank. Inputs are normal, or normal through LeakyReLU as nnU-Net's layers see them.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Iterator
from dataclasses import replace

import torch
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

import tucker_ops
from bench.measure import GATES
from bench.operands import float64_reference, make_operands, relative_rms
from bench.problems import DTYPES, BenchProblem
from bench.provenance import provenance
from tucker_ops.backends import native
from tucker_ops.types import ConvSpec

CORES = ("direct", "winograd2", "winograd4")
RANKS = (8, 16, 32, 64, 128)
EXTENTS = ((12, 20, 16), (5, 7, 5), (9, 11, 26))


def layers(dtype: str) -> Iterator[BenchProblem]:
    for rank in RANKS:
        for extents in EXTENTS:
            spec = ConvSpec(2 * rank, 2 * rank, (3, 3, 3), (1, 1, 1), (1, 1, 1), (1, 1, 1))
            yield BenchProblem(f"rank {rank}", "errors", spec, (rank, rank), extents, dtype_name=dtype)


def errors(core: str, dtype: str) -> list[float]:
    """Relative RMS errors of the `cpu` backend with `core` as its second stage ("" for its own choice)."""
    result = []
    os.environ[native.CORE_VARIABLE] = core
    try:
        for problem in layers(dtype):
            normal = make_operands(problem)
            rectified = torch.nn.functional.leaky_relu(normal.input.float(), 0.01).to(problem.dtype)
            for operands in (normal, replace(normal, input=rectified)):
                u_in, kernel, u_out, bias = operands.factors
                actual = tucker_ops.tucker_conv(
                    operands.input, u_in, kernel, u_out, bias, *operands.geometry, backend="cpu"
                )
                result.append(relative_rms(actual, float64_reference(operands)))
    finally:
        del os.environ[native.CORE_VARIABLE]
    return result


def main(arguments: list[str] | None = None) -> int:
    argparse.ArgumentParser(prog="python -m bench.errors", description=__doc__).parse_args(arguments)
    console = Console()
    columns = ("kernels", "core", "dtype", "median", "worst", "gate")
    table = Table(*columns, title="relative RMS error against float64", box=MARKDOWN)
    worst_share = 0.0
    for isa in native.isas():
        os.environ[native.ISA_VARIABLE] = isa
        for dtype in DTYPES:
            gate = GATES[DTYPES[dtype]]
            for core in CORES:
                found = errors(core, dtype)
                worst_share = max(worst_share, max(found) / gate)
                table.add_row(
                    isa, core, dtype, f"{statistics.median(found):.1e}", f"{max(found):.1e}", f"{gate:.0e}"
                )
        del os.environ[native.ISA_VARIABLE]
    console.print(table)
    origin = provenance()
    console.print(", ".join(f"{k} {origin[k]}" for k in ("cpu", "tucker_ops_isa", "torch", "threads")))
    return 0 if worst_share <= 1 else 1


if __name__ == "__main__":
    sys.exit(main())
