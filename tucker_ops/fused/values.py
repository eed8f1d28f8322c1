"""What a value of a traced network is until something reads it: not computed further than it has to be."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx, nn


@dataclass(frozen=True)
class Pending:
    """values, a norm (scale and shift, or none) and a LeakyReLU (slope, 1 for none) that its reader applies.

    ``expand``: u_out, by which values in rank space are multiplied before that. ``from_block``: values are a block's,
    in the dtype in which blocks compute, or in that of the input where they are the network's result (``is_result``).
    """

    values: fx.Node
    scale: fx.Node | None = None
    shift: fx.Node | None = None
    slope: float = 1.0
    mean: fx.Node | None = None
    m2: fx.Node | None = None
    expand: fx.Node | None = None
    from_block: bool = False
    is_result: bool = False

    @property
    def is_normed(self) -> bool:
        return self.scale is not None or self.slope != 1.0

    @property
    def is_raw(self) -> bool:
        return self.expand is None and not self.is_normed


@dataclass(frozen=True)
class Upsampled:
    """A transposed convolution whose kernel equals its stride, not computed yet."""

    below: Pending
    module: nn.Module
    target: str
    channels: int


@dataclass(frozen=True)
class Concatenated:
    """Values side by side along channels."""

    parts: tuple[Pending | Upsampled, ...]
    channels: tuple[int, ...]


@dataclass(frozen=True)
class Summed:
    """A residual addition and the LeakyReLU behind it (slope, 1 for none), not computed yet."""

    parts: tuple[Pending, ...]
    slope: float = 1.0


Value = Pending | Upsampled | Concatenated | Summed
