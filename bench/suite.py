"""The suites: many problems, all peers a user would pick, in one or several configurations, resumable.

Each configuration (threads, instruction set) is measured by a process of its own, because oneDNN, torch and
tucker_ops read their limits once, at the start. `python -m bench.suite`, which that process runs, is not
for people: use `python -m bench --suite`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from bench.ceilings import Row, instruction_sets, measure_ceilings, peak_now, with_ceilings
from bench.journal import Journal
from bench.measure import EFFORTS, MACHINE, measure, rows_of
from bench.peers import suite_peers_of
from bench.peers.runtimes import LIMIT_VARIABLE
from bench.problems import BenchProblem, select
from bench.provenance import provenance
from tucker_ops.errors import TuckerOpsError

# What makes a restart another run: rows of both would not compare.
IDENTITY = ("cpu", "cores", "tucker_ops_isa", "torch", "onnxruntime", "openvino", "commit")


class UnfinishedError(TuckerOpsError, ValueError):
    """A suite stopped before its end."""


@dataclass(frozen=True)
class Configuration:
    """How the machine is used: threads (None: as many as torch takes), and the widest instruction set allowed."""

    name: str
    threads: int | None = None
    isa: str | None = None
    environment: dict[str, str] = field(default_factory=dict)

    def redundant(self) -> str | None:
        """Why it would only repeat the machine's own configuration; else None."""
        if self.threads == torch.get_num_threads():
            return f"{self.name}: torch takes no more threads anyway"
        if self.isa is not None and self.isa == next(iter(instruction_sets()), None):
            return f"{self.name}: this processor has nothing beyond it anyway"
        return None


# OpenVINO's own kernels have a switch beside that of the oneDNN inside; torch's own kernels have theirs.
AVX2_ENVIRONMENT = {
    "TUCKER_CPU_ISA": "avx2",
    LIMIT_VARIABLE: "AVX2",
    "OV_CPU_MAX_ISA": "AVX2",
    "ATEN_CPU_CAPABILITY": "avx2",
    # Inductor keeps what it compiled without asking for which instructions, weights packed for them included: what it
    # made before with AVX-512 computes wrong numbers here.
    "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
}
CONFIGURATIONS = {
    "cpu": (Configuration(MACHINE),),
    "cpu-full": (
        Configuration(MACHINE),
        Configuration("one_thread", threads=1),
        Configuration("avx2", isa="avx2", environment=AVX2_ENVIRONMENT),
    ),
}


@dataclass(frozen=True)
class Plan:
    """What to run: a suite, some of its problems by name or all, seconds of rounds a problem, threads if limited."""

    suite: str
    names: tuple[str, ...] = ()
    seconds: float | None = None
    threads: int | None = None

    @property
    def problems(self) -> tuple[BenchProblem, ...]:
        return select(self.suite, self.names)

    @property
    def configurations(self) -> tuple[Configuration, ...]:
        """With a number of threads given, each of them once at that number."""
        limited = [
            replace(configuration, threads=self.threads or configuration.threads)
            for configuration in CONFIGURATIONS[self.suite]
            if not (self.threads and configuration.threads)
        ]
        first, *others = limited
        return (first, *(other for other in others if other.redundant() is None))

    def identity(self) -> dict[str, object]:
        origin = provenance()
        return {
            "suite": self.suite,
            "problems": self.names,
            "seconds": self.seconds,
            "threads": self.threads,
            **{name: origin[name] for name in IDENTITY},
        }


def run(plan: Plan, destination: Path, *, restart: bool = False) -> tuple[list[Row], Journal]:
    """Measure what the journal beside `destination` does not hold yet; all rows, with ceilings and floors."""
    path = Journal.beside(destination)
    if restart:
        path.unlink(missing_ok=True)
    Journal(path, plan.identity())
    for configuration in CONFIGURATIONS[plan.suite][1:]:
        if reason := configuration.redundant():
            print(f"left out: {reason}", flush=True)
    for configuration in plan.configurations:
        command = [sys.executable, "-m", "bench.suite", str(path), configuration.name, json.dumps(vars(plan))]
        environment = {**os.environ, **configuration.environment}
        environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).resolve().parents[1]), *sys.path])
        code = subprocess.run(command, env=environment).returncode
        if code:
            raise UnfinishedError(
                f"the measuring process ended with code {code}; {path} keeps what is finished, and the same "
                "command goes on from there"
            )
    journal = Journal(path)
    rows = [
        row
        for configuration in plan.configurations
        for row in with_ceilings(journal.rows(configuration.name), journal.ceilings(configuration.name))
    ]
    return rows, journal


def work(path: Path, name: str, plan: Plan) -> None:
    """Measure one configuration's problems that the journal lacks, each noted as soon as it is measured."""
    configuration = next(known for known in plan.configurations if known.name == name)
    if configuration.threads:
        torch.set_num_threads(configuration.threads)
    effort = EFFORTS[plan.suite]
    if plan.seconds is not None:
        effort = replace(effort, seconds=plan.seconds)
    journal = Journal(path)
    missing = [problem for problem in plan.problems if problem.name not in journal.finished(name)]
    if not missing:
        return
    journal.add_ceilings(name, measure_ceilings(configuration.isa))
    for index, problem in enumerate(missing, 1):
        begin, before = time.monotonic(), peak_now(configuration.isa)
        rows = rows_of(measure(problem, suite_peers_of(problem), effort), name)
        after = peak_now(configuration.isa)
        around = min(before, after) if before and after else None
        journal.add_rows(name, problem.name, [{**row, "peak_around": around} for row in rows])
        # Compiled layers of earlier problems would count against torch's limit on recompiling.
        torch.compiler.reset()
        seconds = time.monotonic() - begin
        print(f"{name} {index}/{len(missing)} {problem.name}: {seconds:.0f} s", flush=True)
    journal.add_ceilings(name, measure_ceilings(configuration.isa))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.suite", description=__doc__)
    parser.add_argument("journal", type=Path)
    parser.add_argument("configuration")
    parser.add_argument("plan", help="fields of Plan as JSON")
    options = parser.parse_args(arguments)
    fields = json.loads(options.plan)
    work(options.journal, options.configuration, Plan(**{**fields, "names": tuple(fields["names"])}))


if __name__ == "__main__":
    main()
