"""`python -m bench`: run the benchmarks and write table, JSON and plots to bench/results/latest.

Sets compare the op with torch's own convolutions; suites with every peer a user would pick, and can be resumed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest

from bench.measure import REFUSED
from bench.output import check_replaceable, print_rows, write
from bench.problems import SETS, SUITES, select
from bench.suite import Plan, run
from tucker_ops.errors import TuckerOpsError

HERE = Path(__file__).resolve().parent
LATEST = HERE / "results" / "latest"


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0; 1 where a peer was refused; 2 for a mistake in the arguments."""
    options = _parser().parse_args(arguments)
    try:
        problems = select(options.suite or options.set, options.problem)
        output = LATEST if options.output is None else options.output
        check_replaceable(output, force=options.force or options.output is None)
        if options.list:
            for problem in problems:
                print(f"{problem.name:<31} {problem.dtype_name:<9} {problem}  ({problem.where})")
            return 0
        if options.suite:
            return _run_suite(options, output)
    except TuckerOpsError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    command = [
        str(HERE / "bench_op.py"), "--benchmark-only", "--benchmark-quiet", "-q", "--no-header", "--no-summary",
        f"--bench-set={options.set}", f"--bench-output={output}",
        *(f"--bench-problem={name}" for name in options.problem),
    ]  # fmt: skip
    if options.seconds:
        command.append(f"--bench-seconds={options.seconds}")
    if options.threads:
        command.append(f"--bench-threads={options.threads}")
    return int(pytest.main(command))


def _run_suite(options: argparse.Namespace, output: Path) -> int:
    plan = Plan(options.suite, tuple(options.problem), options.seconds, options.threads)
    rows, journal = run(plan, output, restart=options.restart)
    write(rows, output, ratios=False)
    journal.close()
    print_rows(rows)
    print(f"Written to {output}")
    return int(any(row["status"] == REFUSED for row in rows))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--set", choices=tuple(SETS), default="small", help="problems to run [small]")
    which.add_argument("--suite", choices=tuple(SUITES), help="problems and all peers to run, resumable")
    parser.add_argument("--problem", action="append", default=[], help="only this one of them; repeat it")
    parser.add_argument("--seconds", type=float, help="of rounds a problem [2; full 10, cpu 3, cpu-full 5]")
    parser.add_argument("--threads", type=int, help="threads of torch [torch's own choice]")
    parser.add_argument("--output", type=Path, help="folder for the results [bench/results/latest, replaced]")
    parser.add_argument("--force", action="store_true", help="replace earlier results in --output")
    parser.add_argument("--restart", action="store_true", help="throw an unfinished run of a suite away")
    parser.add_argument("--list", action="store_true", help="print the problems and stop")
    return parser


if __name__ == "__main__":
    sys.exit(main())
