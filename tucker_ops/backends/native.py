"""Loads the compiled extension, and remembers why it is absent where it is."""

from __future__ import annotations

import ctypes
import json
import os
from functools import cache
from pathlib import Path

import torch

from tucker_ops.backends.base import Verdict
from tucker_ops.errors import BackendError
from tucker_ops.types import Problem

_PACKAGE = Path(__file__).resolve().parents[1]
LIBRARY = _PACKAGE / "libtucker_ops_native.so"
CUDA_LIBRARY = _PACKAGE / "libtucker_ops_cuda.so"
STATUS = _PACKAGE / "_build_status.json"
ISA_VARIABLE = "TUCKER_CPU_ISA"
CORE_VARIABLE = "TUCKER_CPU_CORE"
# Megabytes of idle buffers kept at most, 1024 where it is not set.
POOL_VARIABLE = "TUCKER_CPU_POOL_MB"
CORES = ("direct", "winograd2", "winograd4")


@cache
def load() -> Verdict:
    """Load the extension once; a no says why not."""
    if not LIBRARY.exists():
        return Verdict(False, f"the compiled extension is absent: {build_status()['reason']}")
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return Verdict(False, f"the compiled extension does not load with torch {torch.__version__}: {error}")
    return Verdict(True, f"compiled extension with {', '.join(isas())} kernels")


@cache
def load_cuda() -> Verdict:
    """Load the CUDA kernels once, with or without a GPU; a no says why not."""
    if not CUDA_LIBRARY.exists():
        status = build_status()
        return Verdict(
            False, f"the CUDA kernels were not compiled: {status.get('cuda_reason', status['reason'])}"
        )
    try:
        torch.ops.load_library(str(CUDA_LIBRARY))
    except OSError as error:
        return Verdict(False, f"the CUDA kernels do not load with torch {torch.__version__}: {error}")
    return Verdict(True, "compiled CUDA kernels")


@cache
def _functions() -> ctypes.CDLL:
    """What the extension exports beside its ops."""
    return ctypes.CDLL(str(LIBRARY))


@cache
def isas() -> tuple[str, ...]:
    """Names of the CPU kernels that this processor can run, best first."""
    names = _functions().tucker_ops_cpu_isas
    names.restype = ctypes.c_char_p
    return tuple(names().decode().split(","))


def pool_bytes() -> int:
    """Bytes of idle buffers that fused networks keep for their next call; see POOL_VARIABLE."""
    size = _functions().tucker_ops_cpu_pool_bytes
    size.restype = ctypes.c_int64
    return size()


def isa() -> str:
    """The CPU kernels in use: the best, or what the variable TUCKER_CPU_ISA names."""
    return os.environ.get(ISA_VARIABLE) or isas()[0]


def multiplies_bfloat16() -> bool:
    """Do the kernels in use multiply bfloat16, rather than widen it to float32?"""
    return isa().endswith("bf16") or isa() == "wide_amx"


def tiles(problem: Problem) -> tuple[int, int, int]:
    """How the CPU kernel cuts `problem` up: m of Winograd's F(m×m, 3×3) or 0, and rows and columns of a tile."""

    def three(values: tuple[int, ...], fill: int) -> tuple[int, ...]:
        return (fill,) * (3 - len(values)) + tuple(values)

    numbers = [problem.batch, problem.in_channels, problem.rank_in, problem.rank_out, problem.out_channels]
    for values in (problem.input_size, problem.output_size, problem.kernel_size, problem.stride):
        numbers += three(values, 1)
    numbers += [*three(problem.padding, 0), *three(problem.dilation, 1), problem.layout == "channels_last"]
    numbers.append(problem.dtype == torch.bfloat16)
    result = (ctypes.c_int64 * 3)()
    done = _functions().tucker_ops_cpu_tiles((ctypes.c_int64 * len(numbers))(*numbers), result)
    if not done:
        core = os.environ.get(CORE_VARIABLE)
        raise BackendError(f"{ISA_VARIABLE}={isa()} cannot run here, or {CORE_VARIABLE}={core} is not known")
    return tuple(result)


def build_status() -> dict[str, str]:
    """What setup.py noted: {"native": "built" or "absent", "reason": …}, and so "cuda" and "cuda_reason"."""
    try:
        return json.loads(STATUS.read_text())
    except (OSError, ValueError):
        return {"native": "absent", "reason": "tucker_ops was not built here; run `pip install .`"}
