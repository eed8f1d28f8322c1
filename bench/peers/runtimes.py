"""What the peers outside torch have in common: are they installed, and do they keep to an instruction set?"""

from __future__ import annotations

import importlib.util
import os

from bench.ceilings import instruction_sets

INSTALL = "pip install -c constraints.txt -e '.[bench-peers]'"
LIMIT_VARIABLE = "ONEDNN_MAX_CPU_ISA"


def missing(*packages: str) -> str | None:
    """Names those of `packages` that are not installed, and the remedy; None where none is missing."""
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    return f"{' and '.join(absent)} not installed; {INSTALL}" if absent else None


def unlimited(runtime: str) -> str | None:
    """Why a runtime without a switch for its instruction set is out of place in a run limited to AVX2."""
    if os.environ.get(LIMIT_VARIABLE) and "avx512" in instruction_sets():
        return f"{runtime} cannot be kept from using AVX-512 in this run, which is limited to AVX2"
    return None
