"""What the backends on NVIDIA GPUs have in common: how far their kernels count."""

from __future__ import annotations

import math
from collections.abc import Iterable

from tucker_ops.backends.base import Verdict
from tucker_ops.types import BlockProblem, Problem

# Voxels of an item, in 32 bits and with a block more.
MOST_VOXELS = 2**31 - 4096
# Items, each in a row of a launch's grid.
MOST_ITEMS = 65535


def countable(problem: Problem | BlockProblem, extents: Iterable[tuple[int, ...]]) -> Verdict:
    """Are voxels within these extents, and items, no more than the kernels count?"""
    for size in extents:
        if math.prod(size) > MOST_VOXELS:
            return Verdict(False, f"counts at most {MOST_VOXELS:,} voxels an item, not {math.prod(size):,}")
    if problem.batch > MOST_ITEMS:
        return Verdict(False, f"takes at most {MOST_ITEMS:,} items at once, not {problem.batch:,}")
    return Verdict(True, "float16, bfloat16 or float32 on the GPU")
