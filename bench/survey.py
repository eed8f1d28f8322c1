"""`python -m bench.survey`: on which kinds of problem does the one-pass CPU kernel lose?

Times the `cpu` backend against the `reference` backend on random layers, both in the layout that the input
has, as the automatic choice must. The predicate `prefers` in tucker_ops/backends/cpu.py rests on its table.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterator

from rich.box import MARKDOWN
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench.measure import MEASURED, Effort, measure
from bench.peers import LAYOUTS, OURS, peers_of
from bench.problems import BenchProblem
from bench.provenance import provenance
from tucker_ops.cost import one_pass_cost
from tucker_ops.types import ConvSpec

EFFORT = Effort(seconds=0.15, fewest_rounds=7, most_rounds=40, memory=False)
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


def kind_of(problem: BenchProblem, layout: str) -> tuple[str, str, str]:
    """Whether the automatic choice takes the kernel, taps of the core, and layout."""
    taken = next(p.automatic for p in peers_of(problem) if p.name == f"{OURS}cpu" and p.layout == layout)
    taps = math.prod(problem.spec.kernel_size)
    return (
        "taken" if taken else "declined",
        "1 tap" if taps == 1 else "2 to 9 taps" if taps <= 9 else "more",
        layout,
    )


def survey(seconds: float, seed: int) -> list[tuple[float, BenchProblem, str]]:
    """(time of `cpu` / time of `reference`, layer, layout) of as many layers as `seconds` allow."""
    rows = []
    layers, end = random_layers(seed), time.monotonic() + seconds
    for _ in track(iter(lambda: time.monotonic() < end, False), description="layers", total=None):
        problem, layout = next(layers), LAYOUTS[len(rows) % 2]
        peers = [p for p in peers_of(problem) if p.name.startswith(OURS) and p.layout == layout]
        ours, reference = sorted(measure(problem, peers, EFFORT), key=lambda m: m.peer.name)
        if ours.status == reference.status == MEASURED:
            rows.append(
                (statistics.median(ours.seconds) / statistics.median(reference.seconds), problem, layout)
            )
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.survey", description=__doc__)
    parser.add_argument("--seconds", type=float, default=240)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    rows = survey(options.seconds, options.seed)
    console, groups = Console(), defaultdict(list)
    for ratio, problem, layout in rows:
        groups[kind_of(problem, layout)].append(ratio)
    columns = ("choice", "core", "layout", "layers", "median", "80th percentile", "slower")
    table = Table(*columns, title="time of cpu / time of reference", box=MARKDOWN)
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
    return 0


if __name__ == "__main__":
    sys.exit(main())
