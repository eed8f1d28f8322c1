"""Where a convolution reads: three axes whatever its dimension, as the Triton kernels take them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor


@dataclass(frozen=True)
class Geometry:
    """Three axes whatever the dimension: kernel, stride, padding, dilation, extents of input and of output."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    size: tuple[int, ...]
    out_size: tuple[int, ...]

    @classmethod
    def of(cls, input: Tensor, core: Tensor, stride, padding, dilation) -> Geometry:
        kernel, size = tuple(core.shape[2:]), tuple(input.shape[2:])
        out = tuple(
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, k, s, p, d in zip(size, kernel, stride, padding, dilation, strict=True)
        )
        fills = ((kernel, 1), (stride, 1), (padding, 0), (dilation, 1), (size, 1), (out, 1))
        return cls(*((fill,) * (3 - len(values)) + tuple(values) for values, fill in fills))

    @classmethod
    def pointwise(cls, size: Sequence[int]) -> Geometry:
        size = (1,) * (3 - len(size)) + tuple(size)
        return cls((1,) * 3, (1,) * 3, (0,) * 3, (1,) * 3, size, size)

    @property
    def taps(self) -> int:
        return math.prod(self.kernel)

    def of_gradient(self) -> Geometry:
        """Of the gradient of a convolution at stride 1, which is one with the flipped kernel."""
        spread = tuple(
            d * (k - 1) - p for d, k, p in zip(self.dilation, self.kernel, self.padding, strict=True)
        )
        return replace(self, padding=spread, size=self.out_size, out_size=self.size)

    def constants(self) -> dict[str, int]:
        names = {
            "KERNEL": self.kernel,
            "STRIDE": self.stride,
            "PADDING": self.padding,
            "DILATION": self.dilation,
        }
        return {
            f"{name}_{axis}": value
            for name, values in names.items()
            for axis, value in zip("DHW", values, strict=True)
        }
