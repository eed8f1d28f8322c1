"""Peak memory of one call, each measured in a process of its own.

A server process imports torch, computes nothing, and is forked for each measurement, so that no earlier
call has left memory behind to be used again. The child runs the peer once on a tiny layer (code pages,
threads), makes the operands, sets Linux's high-water mark back to what is resident (clear_refs), runs the
one call, and reports how far the mark (VmHWM) rose, less the output's own bytes. malloc is told to hand
freed blocks back at once. Resolution: about 2 MB, a huge page.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from bench.operands import make_operands
from bench.peers import Peer, peers_of
from bench.problems import BenchProblem
from tucker_ops.errors import TuckerOpsError

CLEAR_REFS = Path("/proc/self/clear_refs")
STATUS = Path("/proc/self/status")
# glibc otherwise raises both thresholds as it goes and keeps freed blocks for later.
MALLOC_RETURNS_FREED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
WARM_CHANNELS = 8
WARM_EXTENT = 8


@dataclass(frozen=True)
class Peak:
    """Bytes that one call needs at most beyond its arguments and its output; None with the reason."""

    extra_bytes: int | None
    reason: str | None = None


def measure_peak(problem: BenchProblem, peer: Peer) -> Peak:
    """Run `peer` once in a process of its own; the reason where that gives no figure."""
    if not CLEAR_REFS.exists():
        return Peak(None, "only Linux has a high-water mark of memory that can be set back")
    receiver, sender = multiprocessing.Pipe(duplex=False)
    arguments = (sender, problem, peer.key, torch.get_num_threads())
    with _environment({**MALLOC_RETURNS_FREED, "PYTHONPATH": os.pathsep.join(sys.path)}):
        child = _context().Process(target=_measure_in_child, args=arguments)
        child.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        child.join()
        return Peak(None, f"the measuring process ended with exit code {child.exitcode}")
    finally:
        child.join()
        receiver.close()


@cache
def _context() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bench.peers"])
    return context


def _measure_in_child(sender: Connection, problem: BenchProblem, key: str, threads: int) -> None:
    torch.set_num_threads(threads)
    try:
        sender.send(Peak(_extra_bytes(problem, key)))
    except (TuckerOpsError, RuntimeError, MemoryError, OSError) as error:
        sender.send(Peak(None, f"{type(error).__name__}: {error}"))


def _extra_bytes(problem: BenchProblem, key: str) -> int:
    peer = next(peer for peer in peers_of(problem) if peer.key == key)
    with torch.inference_mode():
        peer.prepare(make_operands(_tiny(problem)))()
        call = peer.prepare(make_operands(problem))
        gc.collect()
        CLEAR_REFS.write_text("5")
        before = _status_bytes("VmRSS")
        output = call()
        peak = _status_bytes("VmHWM")
    return max(0, peak - before - output.numel() * output.element_size())


def _tiny(problem: BenchProblem) -> BenchProblem:
    spec = replace(problem.spec, in_channels=WARM_CHANNELS, out_channels=WARM_CHANNELS)
    return replace(problem.cropped(WARM_EXTENT), spec=spec, ranks=(WARM_CHANNELS, WARM_CHANNELS), batch=1)


def _status_bytes(field: str) -> int:
    for line in STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(f"{STATUS} has no line {field}")


@contextmanager
def _environment(variables: dict[str, str]):
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
