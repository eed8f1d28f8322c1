"""How the Triton kernels are cut into programs: rows and channels of a block, warps, and loads in flight."""

from __future__ import annotations

from dataclasses import dataclass

# Fewer do not make a matrix product on tensor cores.
LEAST_BLOCK = 16
# Elements of the fp32 accumulator of a program of four warps: 64 registers a thread.
MOST_ACCUMULATORS = 8192


@dataclass(frozen=True)
class Config:
    """rows: output voxels of a program; channels: of the summed dimension at a time; warps; stages: loads in flight."""

    rows: int
    channels: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Configs:
    """One `Config` for each kernel."""

    reduce: Config = Config(128, 64, 4, 3)
    convolve: Config = Config(128, 32, 4, 3)
    outer: Config = Config(64, 64, 4, 3)


# None has been timed: no card could be reached. They keep accumulators in registers and three stages of loads within
# the shared memory of every card from compute capability 8.0 on (tests/backends/test_triton.py compiles them for four).
DEFAULT = Configs()


def block_of(count: int, most: int) -> int:
    """The power of two, from LEAST_BLOCK to `most`, that holds `count` or as much of it as may be."""
    block = LEAST_BLOCK
    while block < count and block < most:
        block *= 2
    return block


def rows_of(config: Config, columns: int) -> int:
    """Rows of a block whose accumulator has `columns`: those of the config, or what registers allow."""
    return max(LEAST_BLOCK, min(config.rows, MOST_ACCUMULATORS // columns))
