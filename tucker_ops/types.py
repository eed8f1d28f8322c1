"""Frozen descriptions of what is computed: a layer (`ConvSpec`) and one call of the op (`Problem`)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tucker_ops.errors import ShapeError

# (R_in, R_out), or (R_in, R_out, R_taps) with a rank of the kernel's taps as well.
Ranks = tuple[int, int] | tuple[int, int, int]


def ranks_text(ranks: Ranks) -> str:
    """As in "16, 24", or "16, 24, 9" with a rank of the taps."""
    return ", ".join(map(str, ranks))


def conv_output_size(
    size: tuple[int, ...],
    kernel_size: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
) -> tuple[int, ...]:
    """Output extents of a convolution, per axis floor((n + 2p - d(k-1) - 1) / s) + 1 (torch.nn.Conv3d)."""
    return tuple(
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(size, kernel_size, stride, padding, dilation, strict=True)
    )


@dataclass(frozen=True)
class ConvSpec:
    """What a convolution layer computes, apart from its weights and the size of its input.

    Tuples have one entry per spatial axis (2 or 3). ``transposed`` layers follow
    torch.nn.ConvTransposeNd, with ``output_padding``.
    """

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1
    bias: bool = True
    transposed: bool = False
    output_padding: tuple[int, ...] = ()

    @property
    def ndim(self) -> int:
        return len(self.kernel_size)

    def output_size(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """Spatial extents of the output for an input of spatial extents `size`."""
        if len(size) != self.ndim:
            raise ShapeError(f"a {self.ndim}D convolution needs {self.ndim} extents, got {tuple(size)}")
        if not self.transposed:
            return conv_output_size(tuple(size), self.kernel_size, self.stride, self.padding, self.dilation)
        extra = self.output_padding or (0,) * self.ndim
        return tuple(
            (n - 1) * s - 2 * p + d * (k - 1) + o + 1
            for n, k, s, p, d, o in zip(
                size, self.kernel_size, self.stride, self.padding, self.dilation, extra, strict=True
            )
        )


@dataclass(frozen=True)
class Problem:
    """One call of `tucker_conv`: all that the choice of a backend may depend on.

    ``layout`` is "contiguous" (N, C, then space), "channels_last", or "strided" (any other strides).
    """

    batch: int
    in_channels: int
    rank_in: int
    rank_out: int
    out_channels: int
    input_size: tuple[int, ...]
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    dtype: torch.dtype
    device: str
    layout: str
    bias: bool

    @property
    def ndim(self) -> int:
        return len(self.kernel_size)

    @property
    def output_size(self) -> tuple[int, ...]:
        return conv_output_size(self.input_size, self.kernel_size, self.stride, self.padding, self.dilation)


@dataclass(frozen=True)
class BlockProblem:
    """One call of `tucker_block`: all that the choice of a backend may depend on.

    ``channels`` has one entry per source, ``factors`` by how much its extents are smaller than ``input_size``.
    ``rank_in`` is the core's input, ``rank_out`` its output; ``out_channels`` equals the latter without u_out.
    ``rows`` has one entry per source as well: how many of the core's inputs it makes. ``expanded``: some source is in
    rank space.
    """

    batch: int
    channels: tuple[int, ...]
    factors: tuple[tuple[int, ...], ...]
    rank_in: int
    rank_out: int
    out_channels: int
    input_size: tuple[int, ...]
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    dtype: torch.dtype
    device: str
    rows: tuple[int, ...]
    expanded: bool
    u_out: bool
    stats: str

    @property
    def side_by_side(self) -> bool:
        """Do the sources make the core's inputs in turn, instead of all of them each?"""
        return sum(self.rows) == self.rank_in

    @property
    def ndim(self) -> int:
        return len(self.kernel_size)

    @property
    def output_size(self) -> tuple[int, ...]:
        return conv_output_size(self.input_size, self.kernel_size, self.stride, self.padding, self.dilation)
