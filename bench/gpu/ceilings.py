"""What the card does at most, measured in the same run: bytes copied, and large matrix products of each kind."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from bench.gpu.clock import Clock
from bench.gpu.turns import Settings

REPETITIONS, WARM_UPS = 10, 3
COPY_BYTES, SHARE_OF_MEMORY = 2 << 30, 16
EXTENT = 8192
# float32 in its own precision is a tenth as fast.
EXTENT_FLOAT32 = 4096
KINDS = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "tf32": torch.float32,
    "float32": torch.float32,
}


def measure_ceilings(settings: Settings) -> Iterator[dict]:
    """One row: copy_gb_per_s, read and written bytes together, and tflop_per_s of each kind; None with a reason."""
    clock = Clock(settings.device, apart=False)
    row: dict = {"part": "ceilings", "reasons": {}}

    def attempt(name: str, figure: Callable[[], float]) -> float | None:
        try:
            return figure()
        except RuntimeError as error:
            row["reasons"][name] = str(error).splitlines()[0]
            return None

    with torch.inference_mode():
        row["copy_gb_per_s"] = attempt("copy", lambda: _copy(clock, settings))
        row["tflop_per_s"] = {
            kind: attempt(kind, lambda kind=kind: _matrix(kind, clock, settings)) for kind in KINDS
        }
    yield row


@contextmanager
def float32_by(tf32: bool) -> Iterator[None]:
    """Convolutions in float32 by TF32, or not. By the older switch, which keeps the newer ones in step with it."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = tf32
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def _copy(clock: Clock, settings: Settings) -> float:
    size = COPY_BYTES
    if clock.on_gpu:
        size = min(size, torch.cuda.mem_get_info(settings.device)[0] // SHARE_OF_MEMORY)
    size //= settings.shrink**3
    source = torch.zeros(size // 4, dtype=torch.float32, device=settings.device)
    target = torch.empty_like(source)
    return 2 * size / 1e3 / _median(clock, lambda: target.copy_(source))


def _matrix(kind: str, clock: Clock, settings: Settings) -> float:
    """Of random numbers: zeros cost less power, and so run at higher clocks."""
    extent = (EXTENT_FLOAT32 if kind == "float32" else EXTENT) // settings.shrink
    a, b = (torch.randn(extent, extent, device=settings.device).to(KINDS[kind]) for _ in range(2))
    out = torch.empty_like(a)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if kind == "tf32" else "highest")
    try:
        return 2 * extent**3 / 1e6 / _median(clock, lambda: torch.mm(a, b, out=out))
    finally:
        torch.set_float32_matmul_precision(before)


def _median(clock: Clock, call: Callable[[], object]) -> float:
    for _ in range(WARM_UPS):
        call()
    return statistics.median(clock.sample(call) for _ in range(REPETITIONS))
