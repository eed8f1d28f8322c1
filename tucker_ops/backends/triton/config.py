"""How the Triton kernels are cut into programs: rows and channels of a block, warps, and loads in flight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields, replace

# Fewer do not make a matrix product on tensor cores.
LEAST_BLOCK = 16
# Of a program on a card of capability 8.6, 8.9 or 12.0, the least of all from 8.0 on.
SHARED_BYTES = 99 * 1024
# Elements of the fp32 accumulator of a program of four warps: 64 registers a thread.
MOST_ACCUMULATORS = 8192


@dataclass(frozen=True)
class Config:
    """rows: output voxels of a program; channels: of the summed dimension at a time; warps; stages: loads in flight.

    Of channels, `convolve` takes half as many of 32 bits at a time, and of taps read together twice as many.
    """

    rows: int
    channels: int
    warps: int
    stages: int

    def __post_init__(self):
        """Raises ValueError for what no kernel can be cut into: a table of choices is a file that anyone may edit."""
        for field, least, most in (
            ("rows", LEAST_BLOCK, 1024),
            ("channels", LEAST_BLOCK, 1024),
            ("warps", 1, 32),
        ):
            value = getattr(self, field)
            if not least <= value <= most or value & (value - 1):
                raise ValueError(f"{field} must be a power of two from {least} to {most}, not {value}")
        if not 1 <= self.stages <= 16:
            raise ValueError(f"stages must be 1 to 16, not {self.stages}")


@dataclass(frozen=True)
class Configs:
    """One `Config` for each kernel."""

    reduce: Config = Config(128, 64, 4, 3)
    convolve: Config = Config(128, 64, 4, 3)
    outer: Config = Config(64, 64, 4, 3)


# None has been timed here: no card could be reached. They keep accumulators in registers, and two or three stages of
# loads within the shared memory of every card from compute capability 8.0 on (tests/backends/test_triton.py compiles
# them for four). `python -m bench.gpu.instructions` counts what they execute.
DEFAULT = Configs()


# What `tune` tries in the place of the default, kernel by kernel; one that a card has no room for is left out there.
CANDIDATES: dict[str, tuple[Config, ...]] = {
    "reduce": (Config(64, 64, 4, 3), Config(128, 32, 4, 4), Config(64, 32, 2, 4), Config(256, 64, 8, 3)),
    "convolve": (
        Config(64, 64, 4, 3),
        Config(128, 32, 4, 3),
        Config(128, 64, 4, 2),
        Config(128, 64, 8, 3),
        Config(256, 64, 8, 3),
    ),
    "outer": (Config(32, 64, 4, 4), Config(128, 64, 4, 2), Config(64, 64, 8, 3)),
}


def as_integers(configs: Configs) -> list[int]:
    """As a table of tuned choices holds them: four integers a kernel, in the order of the fields."""
    return [number for kernel in fields(configs) for number in astuple(getattr(configs, kernel.name))]


def from_integers(values: Sequence[int]) -> Configs:
    """The way back."""
    return Configs(*(Config(*values[i : i + 4]) for i in range(0, len(values), 4)))


def block_of(count: int, most: int) -> int:
    """The power of two, from LEAST_BLOCK to `most`, that holds `count` or as much of it as may be."""
    block = LEAST_BLOCK
    while block < count and block < most:
        block *= 2
    return block


def with_room(config: Config, stage_bytes: int) -> Config:
    """`config` with as many of its stages, of this size each, as every card of 8.0 and newer has room for, or two."""
    return replace(config, stages=min(config.stages, max(2, SHARED_BYTES // stage_bytes)))


def rows_of(config: Config, columns: int) -> int:
    """Rows of a block whose accumulator has `columns`: those of the config, or what registers allow."""
    return max(LEAST_BLOCK, min(config.rows, MOST_ACCUMULATORS * config.warps // 4 // columns))
