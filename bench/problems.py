"""What is timed: convolutions as they occur in nnU-Net, by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from tucker_ops.errors import ConfigError
from tucker_ops.types import ConvSpec, Problem

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class BenchProblem:
    """One convolution, its ranks (R_in, R_out), and an input [batch, C_in, *size] of `dtype`."""

    name: str
    where: str
    spec: ConvSpec
    ranks: tuple[int, int]
    size: tuple[int, ...]
    batch: int = 1
    dtype_name: str = "float32"

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.dtype_name]

    @property
    def output_shape(self) -> tuple[int, ...]:
        return (self.batch, self.spec.out_channels, *self.spec.output_size(self.size))

    def of_op(self, device: str, layout: str) -> Problem:
        """What `tucker_conv` is asked to compute, on a kind of device and in a layout."""
        spec = self.spec
        return Problem(
            batch=self.batch,
            in_channels=spec.in_channels,
            rank_in=self.ranks[0],
            rank_out=self.ranks[1],
            out_channels=spec.out_channels,
            input_size=self.size,
            kernel_size=spec.kernel_size,
            stride=spec.stride,
            padding=spec.padding,
            dilation=spec.dilation,
            dtype=self.dtype,
            device=device,
            layout=layout,
            bias=True,
        )

    def cropped(self, extent: int) -> BenchProblem:
        """The same layer on an input of at most `extent` voxels an axis, and at least its kernel."""
        reach = [d * (k - 1) + 1 for k, d in zip(self.spec.kernel_size, self.spec.dilation, strict=True)]
        size = tuple(min(n, max(extent, r)) for n, r in zip(self.size, reach, strict=True))
        return replace(self, size=size)

    def __str__(self) -> str:
        """As in "64→32 3³ @64³ r32/16": channels, kernel, stride if any, input extents, ranks."""
        spec = self.spec
        stride = "" if set(spec.stride) == {1} else f" /{_extents(spec.stride)}"
        ranks = "/".join(map(str, dict.fromkeys(self.ranks)))
        channels = f"{spec.in_channels}→{spec.out_channels}"
        return f"{channels} {_extents(spec.kernel_size)}{stride} @{_extents(self.size)} r{ranks}"


def _extents(values: tuple[int, ...]) -> str:
    if len(set(values)) == 1:
        return f"{values[0]}{'²³'[len(values) - 2]}"
    return "×".join(map(str, values))


def _layer(
    name: str,
    where: str,
    channels: tuple[int, int],
    ranks: tuple[int, int],
    size: tuple[int, ...],
    *,
    kernel: Sequence[int] | None = None,
    stride: Sequence[int] | None = None,
    batch: int = 1,
    dtype: str = "float32",
) -> BenchProblem:
    """An nnU-Net convolution: odd kernel (3 by default), padded to keep the extent, with bias."""
    ndim = len(size)
    kernel = tuple(kernel or (3,) * ndim)
    spec = ConvSpec(
        in_channels=channels[0],
        out_channels=channels[1],
        kernel_size=kernel,
        stride=tuple(stride or (1,) * ndim),
        padding=tuple(k // 2 for k in kernel),
        dilation=(1,) * ndim,
    )
    return BenchProblem(name, where, spec, ranks, size, batch, dtype)


def _cube(extent: int) -> tuple[int, int, int]:
    return (extent, extent, extent)


# A 64³ patch of the six-stage PlainConvUNet at rank 1/2, the hippocampus network, a slice, and an anisotropic
# plan whose first stages convolve within slices only: together under three minutes on two cores.
SMALL: tuple[BenchProblem, ...] = (
    _layer("stage0", "64³ patch, stage 0", (32, 32), (16, 16), _cube(64)),
    _layer("stage1", "64³ patch, stage 1", (64, 64), (32, 32), _cube(32)),
    _layer("stage2", "64³ patch, stage 2", (128, 128), (64, 64), _cube(16)),
    _layer("stage3", "64³ patch, stage 3", (256, 256), (128, 128), _cube(8)),
    _layer("stage4", "128³ patch, stage 4", (320, 320), (160, 160), _cube(8)),
    _layer("decoder0", "64³ patch, after the last skip", (64, 32), (32, 16), _cube(64)),
    _layer("down1", "64³ patch, first strided", (32, 64), (16, 32), _cube(64), stride=(2, 2, 2)),
    _layer("hippocampus0", "hippocampus, stage 0", (32, 32), (16, 16), (40, 56, 40)),
    _layer("hippocampus1_third", "hippocampus, stage 1, factor 0.3", (64, 64), (16, 16), (20, 28, 20)),
    _layer("hippocampus3", "hippocampus, bottleneck", (256, 256), (128, 128), (5, 7, 5)),
    _layer("slice0", "2D plan, stage 0", (32, 32), (16, 16), (256, 256)),
    _layer("anisotropic0", "thick slices, stage 0", (32, 32), (16, 16), (16, 96, 96), kernel=(1, 3, 3)),
    _layer("stage0_bf16", "64³ patch, stage 0", (32, 32), (16, 16), _cube(64), dtype="bfloat16"),
    _layer(
        "hippocampus3_bf16", "hippocampus, bottleneck", (256, 256), (128, 128), (5, 7, 5), dtype="bfloat16"
    ),
)

_PATCH_128: tuple[BenchProblem, ...] = (
    _layer("stage0_128", "128³ patch, stage 0", (32, 32), (16, 16), _cube(128)),
    _layer("stage1_128", "128³ patch, stage 1", (64, 64), (32, 32), _cube(64)),
    _layer("stage2_128", "128³ patch, stage 2", (128, 128), (64, 64), _cube(32)),
    _layer("stage3_128", "128³ patch, stage 3", (256, 256), (128, 128), _cube(16)),
    _layer("stage5_128", "128³ patch, stage 5", (320, 320), (160, 160), _cube(4)),
    _layer("decoder0_128", "128³ patch, after the last skip", (64, 32), (32, 16), _cube(128)),
    _layer("decoder1_128", "128³ patch, decoder of stage 1", (128, 64), (64, 32), _cube(64)),
    _layer("down3_128", "128³ patch, third strided", (128, 256), (64, 128), _cube(32), stride=(2, 2, 2)),
    _layer("stage0_quarter", "128³ patch, stage 0, rank 1/4", (32, 32), (8, 8), _cube(128)),
    _layer("stage2_quarter", "128³ patch, stage 2, rank 1/4", (128, 128), (32, 32), _cube(32)),
    _layer("slice0_512", "2D plan, stage 0, batch 4", (32, 32), (16, 16), (512, 512), batch=4),
    _layer("slice3_512", "2D plan, stage 3, batch 4", (256, 256), (128, 128), (64, 64), batch=4),
    _layer(
        "anisotropic_down", "thick slices, strided", (32, 64), (16, 32), (20, 160, 128),
        kernel=(1, 3, 3), stride=(1, 2, 2),
    ),
    _layer("through_slices", "kernel across slices", (64, 64), (32, 32), (20, 80, 64), kernel=(3, 1, 1)),
)  # fmt: skip

FULL: tuple[BenchProblem, ...] = (
    *SMALL,
    *_PATCH_128,
    *(replace(problem, name=f"{problem.name}_bf16", dtype_name="bfloat16") for problem in _PATCH_128),
)

# Name, channels, extents of the input and stride of every distinct k³ convolution, but for the first, which has one
# input channel and stays dense: (in → out) of an encoder stage, the strided one before it, and the first after a skip.
_Layers = tuple[tuple[str, tuple[int, int], tuple[int, ...], int], ...]


def _unet(features: Sequence[int], patch: tuple[int, ...]) -> _Layers:
    """A PlainConvUNet whose stages halve the extents, with two convolutions a stage."""
    layers = []
    for stage, channels in enumerate(features):
        size = tuple(n >> stage for n in patch)
        if stage:
            before = tuple(n >> (stage - 1) for n in patch)
            layers.append((f"down{stage}", (features[stage - 1], channels), before, 2))
        layers.append((f"stage{stage}", (channels, channels), size, 1))
        if stage < len(features) - 1:
            layers.append((f"decoder{stage}", (2 * channels, channels), size, 1))
    return tuple(layers)


def _ranked(network: str, where: str, layers: _Layers) -> tuple[BenchProblem, ...]:
    """Every layer at ranks 1/2, 1/3 and 1/4 in fp32 and bf16; equal problems once, under the first name."""
    problems = {}
    for name, channels, size, stride in layers:
        for share, divisor in (("", 2), ("_third", 3), ("_quarter", 4)):
            ranks = tuple(max(8, 8 * round(n / divisor / 8)) for n in channels)
            for suffix, dtype in (("", "float32"), ("_bf16", "bfloat16")):
                problem = _layer(
                    f"{name}_{network}{share}{suffix}", f"{where}, {name}", channels, ranks, size,
                    stride=(stride,) * len(size), dtype=dtype,
                )  # fmt: skip
                problems.setdefault((problem.spec, ranks, size, dtype), problem)
    return tuple(problems.values())


CPU_FULL: tuple[BenchProblem, ...] = (
    *_ranked("128", "128³ patch", _unet((32, 64, 128, 256, 320, 320), _cube(128))),
    *_ranked("hippocampus", "hippocampus", _unet((32, 64, 128, 256), (40, 56, 40))),
)

# In the order of the network; under ten minutes on two cores, all peers included.
_CPU = ("stage0_128", "decoder0_128", "down1_128", "stage1_128", "stage2_128", "stage3_128", "stage4_128")
CPU: tuple[BenchProblem, ...] = tuple(
    next(problem for problem in CPU_FULL if problem.name == f"{name}{suffix}")
    for name in _CPU
    for suffix in ("", "_bf16")
)

SETS: dict[str, tuple[BenchProblem, ...]] = {"small": SMALL, "full": FULL}
SUITES: dict[str, tuple[BenchProblem, ...]] = {"cpu": CPU, "cpu-full": CPU_FULL}


def select(set_name: str, names: Sequence[str] = ()) -> tuple[BenchProblem, ...]:
    """The problems of a set or suite, or those of `names` in it; raises ConfigError for a name that is not there."""
    sets = {**SETS, **SUITES}
    if set_name not in sets:
        raise ConfigError(f"there is no set of problems {set_name!r}; choose one of {', '.join(sets)}")
    problems = {problem.name: problem for problem in sets[set_name]}
    unknown = [name for name in names if name not in problems]
    if unknown:
        raise ConfigError(
            f"no problem named {', '.join(unknown)} in the set {set_name!r}; it has {', '.join(problems)}"
        )
    return tuple(problems[name] for name in names) if names else tuple(problems.values())
