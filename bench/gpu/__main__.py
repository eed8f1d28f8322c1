"""`python -m bench.gpu`: time op, gradient, block and network on an NVIDIA GPU, and print one table.

Every part runs in a process of its own with a time limit: one that crashes or hangs costs its own rows only.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path

import torch

from bench.gpu import output
from bench.gpu.blocks import measure_blocks
from bench.gpu.ceilings import measure_ceilings
from bench.gpu.gradients import measure_gradients
from bench.gpu.networks import measure_networks
from bench.gpu.ops import measure_ops
from bench.gpu.provenance import provenance, smi
from bench.gpu.turns import FAILED, OURS, Settings
from bench.measure import LEFT_OUT, REFUSED
from tucker_ops.backends.cuda import UNPROVEN_VARIABLE
from tucker_ops.errors import TuckerOpsError

LATEST = Path(__file__).resolve().parents[1] / "results" / "latest_gpu"
PARTS: dict[str, Callable[[Settings], Iterator[dict]]] = {
    "ceilings": measure_ceilings,
    "op": measure_ops,
    "gradient": measure_gradients,
    "block": measure_blocks,
    "network": measure_networks,
}
# Seconds; a part begins nothing new after its limit, and is ended so much later.
LIMITS = {"ceilings": 30, "op": 110, "gradient": 40, "block": 45, "network": 120}
GRACE = 20
STANDARD_ERROR = 2
# Marks rows of a case that had not been measured to its end; they count where nothing came after them.
INTERIM = "interim"


def main(arguments: list[str] | None = None) -> int:
    """Exit code 1 where one of ours was refused or failed, 2 where nothing could be measured."""
    options = _parser().parse_args(arguments)
    # `fuse` takes no kernel unasked on a card where it has not passed its tests; this is where it is asked for.
    os.environ[UNPROVEN_VARIABLE] = "1"
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("bench.gpu needs an NVIDIA GPU, and torch finds none here", file=sys.stderr)
        return 2
    if options.rows:
        return _run_part(options, device)
    parts = list(PARTS) if options.part == "all" else list(dict.fromkeys(("ceilings", options.part)))
    # Before any work: the clocks as found.
    origin = provenance(device, options.commit)
    rows: list[dict] = []
    for part in parts:
        rows += _in_its_own_process(part, options)
    origin |= {f"{name}_after": value for name, value in smi(device).items() if name.endswith("_mhz")}
    return conclude(rows, origin, options.output)


def conclude(rows: list[dict], origin: dict, destination: Path) -> int:
    """Writes the results and prints them; the exit code."""
    ceilings = next((row for row in rows if row["part"] == "ceilings" and "copy_gb_per_s" in row), None)
    rows = output.with_floors(rows, ceilings, origin)
    try:
        output.write(rows, destination)
        print(f"Written to {destination}")
    except TuckerOpsError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    print(output.as_text(rows))
    bad = [row for row in rows if row.get("status") in (REFUSED, FAILED)]
    return int(any(row.get("group") in (OURS, None) for row in bad))


def run_part(part: str, settings: Settings) -> Iterator[dict]:
    """A part's rows; what stops it becomes the last one."""
    torch.backends.cudnn.benchmark = True
    try:
        yield from PARTS[part](settings)
    except Exception as error:
        yield stopped(part, FAILED, f"{type(error).__name__}: {error}")


def stopped(part: str, status: str, reason: str) -> dict:
    return {"part": part, "status": status, "reason": " ".join(reason.split())[:500]}


def _run_part(options: argparse.Namespace, device: torch.device) -> int:
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    file = options.rows.open("a")

    def keep(rows: list[dict]) -> None:
        for row in rows:
            print(json.dumps({**row, INTERIM: True}), file=file, flush=True)

    settings = Settings(
        device,
        keep=keep,
        backend="cuda" if on_gpu else None,
        dtype=torch.float16 if on_gpu else torch.float32,
        shrink=options.shrink,
        seconds=options.seconds,
        deadline=time.monotonic() + (options.limit or LIMITS[options.part]),
        compile=not options.no_compile,
        report=lambda line: print(line, file=sys.stderr, flush=True),
    )
    # Standard output is the table's.
    with redirect_stdout(sys.stderr), file:
        for row in run_part(options.part, settings):
            print(json.dumps(row), file=file, flush=True)
    return 0


def _in_its_own_process(part: str, options: argparse.Namespace) -> list[dict]:
    limit = options.limit or LIMITS[part]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        command = [sys.executable, "-m", "bench.gpu", "--part", part, "--seconds", str(options.seconds)]
        command += ["--limit", str(limit), "--rows", str(file)] + ["--no-compile"] * options.no_compile
        command += ["--device", options.device, "--shrink", str(options.shrink)]
        # A group of its own, because torch.compile has workers.
        process = subprocess.Popen(command, stdout=STANDARD_ERROR, start_new_session=True)
        ended = None
        try:
            if process.wait(limit + GRACE):
                ended = stopped(part, FAILED, f"the process ended with code {process.returncode}")
        except subprocess.TimeoutExpired:
            ended = stopped(part, LEFT_OUT, f"ended after {limit + GRACE:g} s; what it had measured is kept")
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    whole = {_case(row) for row in rows if INTERIM not in row}
    rows = [row for row in rows if INTERIM not in row or _case(row) not in whole]
    return rows + ([] if ended is None else [ended])


def _case(row: dict) -> tuple:
    return row["part"], row.get("case"), row.get("kind")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--part", choices=("all", *PARTS), default="all", help="what to measure [all]")
    parser.add_argument("--seconds", type=float, default=0.5, help="of rounds, for each case [0.5]")
    parser.add_argument("--limit", type=float, help=f"seconds for a part {LIMITS}")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--commit", help="of a checkout that comes without its history")
    parser.add_argument(
        "-o", "--output", type=Path, default=LATEST, help="folder for the results [bench/results/latest_gpu]"
    )
    parser.add_argument("--device", default="cuda:0", help="[cuda:0]; of tests: cpu, with --shrink")
    parser.add_argument("--shrink", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
