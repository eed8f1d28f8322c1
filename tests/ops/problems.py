"""Seeded random problems for `tucker_conv`, and the error measure that every test of it uses."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from tucker_ops.ops.reference import three_convs
from tucker_ops.types import conv_output_size

# Relative RMS error allowed against float64 on the same rounded inputs and weights (measured: fp32 8e-7,
# bf16 2e-3 for the one-pass kernel and 4e-3 for three rounded convolutions).
TOLERANCE = {torch.float32: 2e-5, torch.float16: 6e-4, torch.bfloat16: 5e-3, torch.float64: 1e-12}
GRADIENT_TOLERANCE = {torch.float32: 1e-4}


@dataclass(frozen=True)
class Case:
    """Arguments of one call; tensors are made from `seed`."""

    seed: int
    batch: int
    channels: tuple[int, int, int, int]  # C_in, R_in, R_out, C_out
    size: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    bias: bool
    layout: str  # contiguous, channels_last, transposed, sliced

    def __str__(self) -> str:
        return (
            f"{self.seed}-{self.layout}-k{self.kernel}-s{self.stride}-d{self.dilation}-{self.size}".replace(
                " ", ""
            )
        )

    @property
    def geometry(self) -> tuple[tuple[int, ...], ...]:
        return self.stride, self.padding, self.dilation

    def tensors(self, dtype: torch.dtype, requires_grad: bool = False) -> list[Tensor | None]:
        """input, u_in, core, u_out, bias in `dtype`, the input in the case's layout."""
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=generator)

        c_in, r_in, r_out, c_out = self.channels
        x = normal(self.batch, c_in, *self.size).to(dtype)
        if self.layout == "channels_last":
            x = x.to(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
        elif self.layout == "transposed":
            x = x.transpose(-1, -2).contiguous().transpose(-1, -2)
        elif self.layout == "sliced":
            x = torch.cat((x, x), dim=-1)[..., : self.size[-1]]
        tensors = [x, normal(r_in, c_in), normal(r_out, r_in, *self.kernel), normal(c_out, r_out)]
        tensors.append(normal(c_out) if self.bias else None)
        return [None if t is None else t.to(dtype).requires_grad_(requires_grad) for t in tensors]


def random_cases(count: int, seed: int = 0, *, winograd: bool = False) -> list[Case]:
    """`count` valid problems: odd sizes, extents below the kernel, mixed strides, dilation, batches, layouts.

    With `winograd`, kernel 3×3 at stride and dilation 1 in height and width, so that Winograd applies.
    """
    rng = random.Random(seed)
    cases: list[Case] = []
    kernels = {3: [(3, 3, 3), (1, 3, 3), (3, 3, 1), (5, 5, 5), (1, 1, 1), (2, 3, 5), (3, 1, 1)]}
    kernels[2] = [(3, 3), (1, 3), (3, 1), (5, 5), (1, 1), (2, 4)]
    strides = {
        3: [(1, 1, 1), (1, 1, 1), (2, 2, 2), (3, 3, 3), (1, 2, 2), (2, 1, 3)],
        2: [(1, 1), (2, 2), (3, 3), (1, 2)],
    }
    if winograd:
        kernels = {3: [(3, 3, 3), (1, 3, 3), (2, 3, 3), (5, 3, 3)], 2: [(3, 3)]}
        strides = {3: [(1, 1, 1), (1, 1, 1), (2, 1, 1), (3, 1, 1)], 2: [(1, 1)]}
    while len(cases) < count:
        ndim = rng.choice([2, 3, 3])
        kernel, stride = rng.choice(kernels[ndim]), rng.choice(strides[ndim])
        dilation = tuple(rng.choice([1, 1, 1, 2, 3]) for _ in range(ndim))
        if winograd:
            dilation = (*dilation[:-2], 1, 1)
        padding = tuple(rng.randint(0, 3) for _ in range(ndim))
        size = tuple(rng.choice([1, 2, 3, 5, 7, 8, 13, 17]) for _ in range(ndim))
        if min(conv_output_size(size, kernel, stride, padding, dilation)) < 1:
            continue
        cases.append(
            Case(
                seed=len(cases),
                batch=rng.choice([1, 1, 2, 3, 0]),
                channels=tuple(rng.choice([1, 3, 4, 8, 9, 16, 17, 24, 33, 40]) for _ in range(4)),
                size=size,
                kernel=kernel,
                stride=stride,
                padding=padding,
                dilation=dilation,
                bias=rng.random() < 0.7,
                layout=rng.choice(["contiguous", "channels_last", "transposed", "sliced"]),
            )
        )
    return cases


def reference(tensors: list[Tensor | None], geometry) -> Tensor:
    """The answer in float64 on the same rounded values."""
    x, u_in, core, u_out, bias = (None if t is None else t.detach().double() for t in tensors)
    return three_convs(x, u_in, core, u_out, bias, *(list(g) for g in geometry))


def relative_rms(actual: Tensor, expected: Tensor) -> float:
    """sqrt(mean((actual - expected)²) / mean(expected²)); 0 for empty tensors; NaN stays NaN."""
    if expected.numel() == 0:
        return 0.0
    error = (actual.detach().double() - expected).square().mean().sqrt()
    scale = expected.square().mean().sqrt()
    return (error / scale if scale > 0 else error).item()


def tolerance(dtype: torch.dtype, numel: int, table: dict[torch.dtype, float] = TOLERANCE) -> float:
    """Four times the gate below 256 elements, where rounding does not average out."""
    return table[dtype] * (4 if numel < 256 else 1)
