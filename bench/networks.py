"""`python -m bench.networks`: one block, and whole networks, fused against what a user would run.

Dense and compressed to rank 1/2: as nnU-Net runs them (eager, contiguous), channels-last, OpenVINO, and fused; with
`--full` also ONNX Runtime and torch.compile, more networks and ranks, one thread, and AVX2 alone. Each peer is
compared with float64 first, on a patch of 64×32×32, and at full size with torch; then all take one turn per round, in
shuffled order. Peak memory beyond weights and input is measured in a process each.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from bench.memory import CLEAR_REFS, MALLOC_RETURNS_FREED, _status_bytes
from bench.network_cases import (
    CASES,
    FULL,
    SEED,
    Case,
    as_convolutions,
    block,
    forget_networks,
    remember,
)
from bench.operands import relative_rms
from bench.peers.of_networks import AS_NNUNET, OURS, PEERS, Call, why_not
from bench.provenance import provenance
from bench.suite import CONFIGURATIONS, MACHINE
from tucker_ops import CompressionConfig, compress
from tucker_ops.backends import native
from tucker_ops.nn import TuckerConv3d

HERE = Path(__file__).resolve().parent
OUTPUT = HERE / "results" / "latest_networks"
# The least that leaves two voxels for the norms of the deepest stage.
CHECKED = (64, 32, 32)
GATES = {"float32": 1e-4, "bfloat16": 2.5e-2}
# OpenVINO's norms differ from torch's by up to 3e-4 of a network's output at 128³.
PEER_GATES = {"float32": 1e-3, "bfloat16": 5e-2}


def exact(case: Case) -> Tensor:
    """The float64 answer."""
    with torch.inference_mode():
        return as_convolutions(case.network()).double()(case.input().double())


def checkable(case: Case) -> Case:
    """The same network on a patch small enough for float64, of which torch unfolds every window."""
    return replace(case, size=tuple(map(min, case.size, CHECKED)))


def measure(case: Case, dtypes: Sequence[str], rounds: int, full: bool, memory: bool) -> list[dict]:
    """Rows of one case: every peer in every dtype, times in milliseconds."""
    small, rows, calls = checkable(case), [], {}
    with torch.inference_mode():
        reference, whole = exact(small), PEERS[AS_NNUNET](case, torch.float32)().clone()
        for dtype in dtypes:
            for peer, prepare in PEERS.items():
                row = {
                    "case": case.name,
                    "form": case.form,
                    "peer": peer,
                    "dtype": dtype,
                    "status": "measured",
                }
                rows.append(row)
                reason = why_not(peer, getattr(torch, dtype), full)
                if reason is not None:
                    row |= {"status": "left out", "reason": reason}
                    continue
                row["relative_rms"] = relative_rms(prepare(small, getattr(torch, dtype))().float(), reference)
                call = prepare(case, getattr(torch, dtype))
                row["relative_rms_to_eager"] = relative_rms(call().float(), whole)
                row["gate"] = (GATES if peer == OURS else PEER_GATES)[dtype]
                # Written so that NaN is refused.
                if not max(row["relative_rms"], row["relative_rms_to_eager"]) <= row["gate"]:
                    row |= {"status": "refused", "reason": f"error above the gate of {row['gate']}"}
                    continue
                calls[len(rows) - 1] = call
        del reference, whole
        samples = {index: [] for index in calls}
        for turn in range(rounds):
            gc.collect()
            for index in random.Random(turn).sample(list(calls), len(calls)):
                begin = time.perf_counter()
                calls[index]()
                samples[index].append(1e3 * (time.perf_counter() - begin))
    del calls
    nnunet = next(i for i, r in enumerate(rows) if (r["peer"], r["dtype"]) == (AS_NNUNET, "float32"))
    others = [i for i in samples if rows[i]["peer"] != OURS]
    for index, times in samples.items():
        same = [i for i in others if rows[i]["dtype"] == rows[index]["dtype"]]
        strongest = min(same, key=lambda i: statistics.median(samples[i]), default=None)
        rows[index] |= {
            "median_ms": statistics.median(times),
            "fastest_ms": min(times),
            "slowest_ms": max(times),
            "rounds": rounds,
            "ratio_to_nnunet": _ratio(times, samples[nnunet]),
            "strongest_peer": None if strongest is None else rows[strongest]["peer"],
            "ratio_to_strongest": None if strongest is None else _ratio(times, samples[strongest]),
        }
        if memory and rows[index]["peer"] != "channels-last":
            rows[index]["peak_bytes"] = peak_bytes(case, rows[index]["peer"], rows[index]["dtype"])
    return rows


def _ratio(times: Sequence[float], others: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(times, others, strict=True))


def peak_bytes(case: Case, peer: str, dtype: str) -> int | None:
    """Memory of one call beyond weights and input, in a process of its own; None where Linux does not tell."""
    if not CLEAR_REFS.exists():
        return None
    names = [case.name, case.form, peer, dtype, str(torch.get_num_threads())]
    with tempfile.NamedTemporaryFile(suffix=".pt") as file:
        torch.save(case.network(), file.name)
        done = subprocess.run(
            [sys.executable, "-m", "bench.networks", "--peak", *names, file.name],
            capture_output=True,
            text=True,
            # Without idle buffers from the call before: they would hide what this one needs.
            env=os.environ
            | MALLOC_RETURNS_FREED
            | {native.POOL_VARIABLE: "0", "PYTHONPATH": os.pathsep.join(sys.path)},
        )
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {names} failed: {done.stderr[-500:]}")
    return int(done.stdout.splitlines()[-1])


def _print_peak(name: str, form: str, peer: str, dtype: str, threads: str, network: str) -> None:
    torch.set_num_threads(int(threads))
    case = next(c for c in FULL if (c.name, c.form) == (name, form))
    # Our own file of a moment ago, and a whole module.
    remember(case, torch.load(network, weights_only=False))
    with torch.inference_mode():
        call = PEERS[peer](case, getattr(torch, dtype))
        # The form in which a peer keeps weights is part of the weights. OpenVINO has made it by now, and would keep the
        # buffers of a call for the next.
        # Ours keeps packed weights from its first call on; they belong to the weights.
        if peer == OURS:
            call()
        gc.collect()
        CLEAR_REFS.write_text("5")
        before = _status_bytes("VmRSS")
        call()
        print(max(0, _status_bytes("VmHWM") - before))


def measure_block(dtypes: Sequence[str], rounds: int, extent: int = 128) -> list[dict]:
    """Norm, activation, convolution and statistics of 32 channels, rank 16: one op against the modules."""
    torch.manual_seed(SEED)
    dense = block().eval().requires_grad_(False)
    tucker = compress(copy.deepcopy(dense), CompressionConfig(factor=0.5))
    x = torch.randn(1, 32, *(extent,) * 3)
    last = torch.channels_last_3d
    norm, conv = dense[0], tucker[2]
    calls: dict[tuple[str, str, str], Call] = {}
    with torch.inference_mode():
        three = as_convolutions(tucker)
        # What stands behind a convolution in the network: the norm before belongs to the block before.
        behind = {"dense": dense[2:], "rank 0.5": three[2:]}
        given = nn.functional.leaky_relu(
            nn.functional.instance_norm(x, None, None, norm.weight, norm.bias), 0.01
        )
        for form, modules in behind.items():
            modules_last = copy.deepcopy(modules).to(memory_format=last)
            given_last = given.contiguous(memory_format=last)
            calls[form, AS_NNUNET, "float32"] = lambda m=modules: m(given)
            calls[form, "channels-last", "float32"] = lambda m=modules_last, g=given_last: m(g)
        flat = x.flatten(2)
        scale = norm.weight * torch.rsqrt(flat.var(2, correction=0) + norm.eps)
        shift = norm.bias - flat.mean(2) * scale
        for form, module in (("dense", dense[2]), ("rank 0.5", conv)):
            for dtype in dtypes:
                calls[form, OURS, dtype] = _block_call(x, scale, shift, module, getattr(torch, dtype))
        # In float32: torch's float64 would unfold every window at this size.
        expected = {form: modules[0](given).double() for form, modules in behind.items()}
        rows = []
        for form, peer, dtype in calls:
            row = {"case": "block_128", "form": form, "peer": peer, "dtype": dtype, "status": "measured"}
            if peer == OURS:
                row["relative_rms_to_eager"] = relative_rms(
                    calls[form, peer, dtype]()[0].float(), expected[form]
                )
                if not row["relative_rms_to_eager"] <= GATES[dtype]:
                    row |= {"status": "refused", "reason": f"error above the gate of {GATES[dtype]}"}
            rows.append(row)
        del expected
        samples: list[list[float]] = [[] for _ in rows]
        for turn in range(rounds + 1):
            for index in random.Random(turn).sample(range(len(rows)), len(rows)):
                begin = time.perf_counter()
                list(calls.values())[index]()
                if turn:
                    samples[index].append(1e3 * (time.perf_counter() - begin))
    nnunet = samples[list(calls).index(("dense", AS_NNUNET, "float32"))]
    three_last = min(
        (samples[list(calls).index(("rank 0.5", peer, "float32"))] for peer in (AS_NNUNET, "channels-last")),
        key=statistics.median,
    )
    for row, times in zip(rows, samples, strict=True):
        row |= {
            "median_ms": statistics.median(times),
            "fastest_ms": min(times),
            "slowest_ms": max(times),
            "rounds": rounds,
            "ratio_to_nnunet": _ratio(times, nnunet),
            "strongest_peer": "three convolutions, best layout",
            "ratio_to_strongest": _ratio(times, three_last),
        }
    return rows


def _block_call(x: Tensor, scale: Tensor, shift: Tensor, conv: nn.Module, dtype: torch.dtype) -> Callable:
    x = x.to(dtype).contiguous(memory_format=torch.channels_last_3d)
    tucker = isinstance(conv, TuckerConv3d)
    reduce, core, u_out = (conv.u_in, conv.core, conv.u_out) if tucker else (None, conv.weight, None)
    weights = [None if w is None else w.to(dtype) for w in (reduce, core, u_out)]
    ones = [1, 1, 1]
    call = torch.ops.tucker_ops.tucker_block
    return lambda: call(
        [x], [None], [scale], [shift], [0.01], [weights[0]], None, weights[1], ones, ones, ones, weights[2], None,
        "channel", False, backend="cpu",
    )  # fmt: skip


def table(rows: Sequence[dict]) -> Table:
    several = len({row["configuration"] for row in rows}) > 1
    columns = (
        "case",
        "form",
        "peer",
        "dtype",
        "ms",
        "÷ dense as nnU-Net runs it",
        "÷ strongest",
        "error",
        "to eager",
    )
    result = Table(*(["configuration"] if several else []), *columns, "peak MB", box=MARKDOWN)
    dense = {(row["configuration"], row["case"]): row["median_ms"] for row in rows if _is_baseline(row)}
    for row in rows:
        if "median_ms" not in row:
            continue
        base = dense.get((row["configuration"], row["case"]))
        strongest = row["ratio_to_strongest"]
        result.add_row(
            *([row["configuration"]] if several else []),
            row["case"], row["form"], row["peer"], row["dtype"],
            f"{row['median_ms']:.0f} ({row['fastest_ms']:.0f} to {row['slowest_ms']:.0f})",
            "–" if base is None else f"{row['median_ms'] / base:.2f}",
            "–" if strongest is None else f"{strongest:.2f}",
            "–" if row.get("relative_rms") is None else f"{row['relative_rms']:.0e}",
            "–" if row.get("relative_rms_to_eager") is None else f"{row['relative_rms_to_eager']:.0e}",
            "–" if row.get("peak_bytes") is None else f"{row['peak_bytes'] / 1e6:.0f}",
        )  # fmt: skip
    return result


def _is_baseline(row: dict) -> bool:
    return (row["form"], row["peer"], row["dtype"]) == ("dense", AS_NNUNET, "float32") and "median_ms" in row


def main(arguments: list[str] | None = None) -> int:
    """Exit code 1 where a result missed its gate."""
    parser = argparse.ArgumentParser(prog="python -m bench.networks", description=__doc__)
    parser.add_argument(
        "--full", action="store_true", help="more networks, ranks, peers and configurations; hours"
    )
    parser.add_argument(
        "--rounds", type=int, default=3, help="turns of each peer; of a block thrice as many [3]"
    )
    parser.add_argument("--no-memory", action="store_true", help="leave peak memory out")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--peak", nargs=6, help=argparse.SUPPRESS)
    parser.add_argument("--rows-of", nargs=2, metavar=("CONFIGURATION", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.peak:
        _print_peak(*options.peak)
        return 0
    if options.rows_of:
        name, file = options.rows_of
        configuration = next(c for c in CONFIGURATIONS["cpu-full"] if c.name == name)
        torch.set_num_threads(configuration.threads or torch.get_num_threads())
        Path(file).write_text(
            json.dumps(measure_all(name, CASES, options.rounds, False, not options.no_memory))
        )
        return 0
    cases = FULL if options.full else CASES
    rows, left = measure_all(MACHINE, cases, options.rounds, options.full, not options.no_memory), []
    for configuration in CONFIGURATIONS["cpu-full"][1:] if options.full else ():
        if reason := configuration.redundant():
            left.append(reason)
        else:
            rows += _in_its_own_process(configuration, options)
    write(rows, provenance(), options.output, left)
    return int(any(row["status"] == "refused" for row in rows))


def measure_all(name: str, cases: Sequence[Case], rounds: int, full: bool, memory: bool) -> list[dict]:
    """Block and networks in this process, which runs in the configuration of that name."""
    dtypes = ("float32", "bfloat16")
    rows = measure_block(dtypes, 3 * rounds)
    for case in cases:
        print(f"{name}: {case.name}, {case.form}", file=sys.stderr, flush=True)
        rows += measure(case, dtypes, rounds, full, memory)
        forget_networks()
        # Compiled networks of earlier cases would count against torch's limit on recompiling.
        torch.compiler.reset()
    return [{"configuration": name, **row} for row in rows]


def _in_its_own_process(configuration, options: argparse.Namespace) -> list[dict]:
    """Because oneDNN, torch and OpenVINO read their instruction set once."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.json"
        command = [sys.executable, "-m", "bench.networks", "--rows-of", configuration.name, str(file)]
        command += [f"--rounds={options.rounds}"] + ["--no-memory"] * options.no_memory
        subprocess.run(command, env=os.environ | configuration.environment, check=True)
        return json.loads(file.read_text())


def write(rows: Sequence[dict], origin: dict, output: Path, left: Sequence[str] = ()) -> None:
    """results.json with provenance in every row, results.md with what is printed; `left`: what was not run, and why."""
    output.mkdir(parents=True, exist_ok=True)
    note = ", ".join(
        f"{key} {origin[key]}"
        for key in ("cpu", "threads", "tucker_ops_isa", "torch", "openvino", "commit", "date")
    )
    missing = {f"- {r['peer']} {r['dtype']}: {r['reason']}" for r in rows if r["status"] != "measured"}
    left = [f"- {reason}" for reason in left] + sorted(missing)
    with (output / "results.md").open("w") as file:
        for console in (Console(width=160), Console(file=file, width=160)):
            console.print(table(rows))
            console.print(
                f"{note}.\nStrongest: the fastest that is not ours, same form and dtype. "
                "Error: relative RMS against float64 at 64×32×32, and against eager at full size.",
                soft_wrap=True,
            )
            for line in left:
                console.print(line, soft_wrap=True)
    (output / "results.json").write_text(json.dumps([{**row, **origin} for row in rows], indent=1))


if __name__ == "__main__":
    sys.exit(main())
