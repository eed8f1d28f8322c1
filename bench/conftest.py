"""Options of the benchmarks, one measured problem at a time, and what is printed and written at the end."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.ceilings import measure_ceilings, with_ceilings
from bench.measure import EFFORTS, Measurement, measure, rows_of
from bench.output import print_rows, write
from bench.peers import peers_of
from bench.problems import SETS, BenchProblem, select

ROWS = pytest.StashKey[list]()
CEILINGS = pytest.StashKey[list]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("tucker_ops bench")
    group.addoption("--bench-set", choices=tuple(SETS), default="small", help="problems to run")
    group.addoption(
        "--bench-problem", action="append", default=[], help="only this one of the set; repeat it"
    )
    group.addoption("--bench-seconds", type=float, help="seconds of rounds a problem")
    group.addoption("--bench-threads", type=int, help="threads of torch; default: torch's own choice")
    group.addoption("--bench-output", type=Path, help="folder for results.json, results.md and results.png")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS], config.stash[CEILINGS] = [], []
    threads = config.getoption("--bench-threads")
    if threads:
        torch.set_num_threads(threads)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    config = metafunc.config
    problems = select(config.getoption("--bench-set"), config.getoption("--bench-problem"))
    cases = [(problem, peer.key) for problem in problems for peer in peers_of(problem)]
    names = [f"{problem.name}-{key}" for problem, key in cases]
    metafunc.parametrize(("problem", "key"), cases, ids=names, scope="session")


@pytest.fixture(scope="session")
def measured(request: pytest.FixtureRequest):
    """A function of a problem: its measurements by peer key, all peers timed in turns at the first call."""
    options = request.config.option
    effort = EFFORTS[options.bench_set]
    if options.bench_seconds is not None:
        effort = replace(effort, seconds=options.bench_seconds)
    known: dict[str, dict[str, tuple[Measurement, dict]]] = {}

    def of(problem: BenchProblem) -> dict[str, tuple[Measurement, dict]]:
        if not known:
            request.config.stash[CEILINGS].append(measure_ceilings())
        if problem.name not in known:
            entries = measure(problem, effort=effort)
            rows = rows_of(entries)
            request.config.stash[ROWS].extend(rows)
            known[problem.name] = {
                entry.peer.key: (entry, row) for entry, row in zip(entries, rows, strict=True)
            }
        return known[problem.name]

    return of


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    if config.stash[ROWS]:
        rows = with_ceilings(config.stash[ROWS], [*config.stash[CEILINGS], measure_ceilings()])
        print_rows(rows)
        destination = config.getoption("--bench-output")
        if destination is not None:
            write(rows, destination)
            terminalreporter.write_line(f"Written to {destination}")
