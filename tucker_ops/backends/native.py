"""Loads the compiled extension, and remembers why it is absent where it is."""

from __future__ import annotations

import ctypes
import json
import os
from functools import cache
from pathlib import Path

import torch

from tucker_ops.backends.base import Verdict

_PACKAGE = Path(__file__).resolve().parents[1]
LIBRARY = _PACKAGE / "libtucker_ops_native.so"
STATUS = _PACKAGE / "_build_status.json"
ISA_VARIABLE = "TUCKER_CPU_ISA"
CORE_VARIABLE = "TUCKER_CPU_CORE"


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
def isas() -> tuple[str, ...]:
    """Names of the CPU kernels that this processor can run, best first."""
    names = ctypes.CDLL(str(LIBRARY)).tucker_ops_cpu_isas
    names.restype = ctypes.c_char_p
    return tuple(names().decode().split(","))


def isa() -> str:
    """The CPU kernels in use: the best, or what the variable TUCKER_CPU_ISA names."""
    return os.environ.get(ISA_VARIABLE) or isas()[0]


def build_status() -> dict[str, str]:
    """What setup.py noted about the build: {"native": "built" or "absent", "reason": …}."""
    try:
        return json.loads(STATUS.read_text())
    except (OSError, ValueError):
        return {"native": "absent", "reason": "tucker_ops was not built here; run `pip install .`"}
