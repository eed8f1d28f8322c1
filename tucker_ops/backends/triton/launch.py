"""Launches of the Triton kernels: `tucker_conv`, its stages and its gradient, for tensors on one device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from tucker_ops.backends.gpu import MOST_VOXELS
from tucker_ops.backends.triton.config import (
    DEFAULT,
    LEAST_BLOCK,
    Config,
    Configs,
    block_of,
    rows_of,
    with_room,
)
from tucker_ops.backends.triton.geometry import Geometry
from tucker_ops.backends.triton.kernels import convolve_rows, outer_rows, reduce_rows
from tucker_ops.errors import BackendError
from tucker_ops.ops.block import block_memory_format
from tucker_ops.ops.reference import memory_format

INTERPRETED = triton.knobs.runtime.interpret
MOST_COLUMNS = 128
# Programs of a weight's gradient, enough for any card, and shares that its voxels are split into, at most.
MOST_PROGRAMS = 4096
MOST_SHARES = 1024
# Ranks of a source that is expanded, of which a program holds all.
MOST_EXPANDED = 512
# Of a block of `expand`, of a block of u_out, and of deviations for a covariance: what leaves room for the rest within
# SHARED_BYTES.
EXPAND_BYTES, U_BYTES, DEVIATIONS_BYTES = 32 * 1024, 16 * 1024, 64 * 1024


def launch(kernel, grid: tuple[int, ...], arguments: Sequence, constants: dict, config: Config) -> None:
    """The one place that starts a kernel, on the card of its first argument; empty grids start nothing."""
    if math.prod(grid):
        # Triton starts it on torch's current card and stream, wherever the tensors are.
        with torch.cuda.device_of(arguments[0]):
            kernel[grid](*arguments, **constants, num_warps=config.warps, num_stages=config.stages)


def arithmetic(dtype: torch.dtype) -> dict[str, object]:
    """How products of this dtype are computed: TF32 where torch's setting for convolutions allows it."""
    tf32 = dtype == torch.float32 and torch.backends.cudnn.conv.fp32_precision == "tf32" and not INTERPRETED
    return {"PRECISION": "tf32" if tf32 else "ieee", "UPCAST": INTERPRETED and dtype == torch.bfloat16}


def channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=block_memory_format(tensor.dim() - 2, False))


def empty_rows(like: Tensor, channels: int, size: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised [N, channels, *size], channels-last."""
    layout = block_memory_format(like.dim() - 2, False)
    shape = (like.shape[0], channels, *size)
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device, memory_format=layout)


def reduce(x: Tensor, matrix: Tensor, config: Config) -> Tensor:
    """matrix [R, C] · x [N, C, *spatial], channels-last both."""
    t = empty_rows(x, matrix.shape[0], x.shape[2:])
    reduce_into(t, x, config, matrix=matrix)
    return t


def reduce_into(
    t: Tensor,
    x: Tensor,
    config: Config,
    *,
    matrix: Tensor | None = None,
    expand: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    slope: float = 1.0,
    in_bias: Tensor | None = None,
    partial: Tensor | None = None,
    first: int = 0,
    final: bool = True,
) -> None:
    """Writes channels `first` to `first` + R of t by `reduce_rows`; tensors contiguous, activations channels-last.

    `final`: t is what `convolve` reads, not a sum to be gone on with.
    """
    ndim = x.dim() - 2
    steps = tuple(matrix.shape[:-2]) if matrix is not None and matrix.dim() > 2 else (1,) * ndim
    steps = (1,) * (3 - ndim) + steps
    size = (1,) * (3 - ndim) + tuple(x.shape[2:])
    source_channels = x.shape[1]
    channels = source_channels if expand is None else expand.shape[0]
    ranks = channels if matrix is None else matrix.shape[-2]
    block_r, block_e = block_of(ranks, MOST_COLUMNS), LEAST_BLOCK
    if expand is not None:
        if source_channels > MOST_EXPANDED:
            raise BackendError(
                f"backend 'triton' holds at most {MOST_EXPANDED} ranks of a source to be expanded, not "
                f"{source_channels}; call it with backend='reference'"
            )
        # A block of all the source's channels is held beside the rest, in registers and in shared memory.
        block_e = block_of(source_channels, MOST_EXPANDED)
        most = max(LEAST_BLOCK, min(32, EXPAND_BYTES // (block_e * x.dtype.itemsize)))
        config = replace(config, channels=min(config.channels, most), stages=2)
        if matrix is None:
            block_r = min(block_r, most)
    block_c = block_r if matrix is None else block_of(channels, config.channels)
    rows = rows_of(config, max(block_r, block_c, block_e))
    grid = (
        triton.cdiv(math.prod(size), rows),
        math.prod(steps) * triton.cdiv(ranks, block_r),
        x.shape[0],
    )
    unit_c, unit_s, unit_r = unit_of(channels), unit_of(source_channels), unit_of(ranks, t.shape[1], first)
    arguments = (
        x, matrix, expand, scale, shift, in_bias, partial, t, *size, channels // unit_c, source_channels // unit_s,
        ranks // unit_r, t.shape[1] // unit_r, first // unit_r, float(slope),
    )  # fmt: skip
    constants = {
        "HAS_MATRIX": matrix is not None, "HAS_EXPAND": expand is not None, "HAS_SCALE": scale is not None,
        "HAS_SHIFT": shift is not None, "HAS_BIAS": in_bias is not None, "HAS_PARTIAL": partial is not None,
        "ROUND_T": final,
        "ACTIVATION": slope != 1, "STEP_D": steps[0], "STEP_H": steps[1], "STEP_W": steps[2],
        "UNIT_C": unit_c, "UNIT_S": unit_s, "UNIT_R": unit_r,
        "BLOCK_M": rows, "BLOCK_C": block_c, "BLOCK_E": block_e, "BLOCK_R": block_r, **arithmetic(x.dtype),
    }  # fmt: skip
    launch(reduce_rows, grid, arguments, constants, config)


@dataclass(frozen=True)
class Convolved:
    """What `convolve` returns: z is None and the statistics are empty where they were not asked for."""

    values: Tensor
    z: Tensor | None
    mean: Tensor
    m2: Tensor


def convolve(
    t: Tensor,
    core: Tensor,
    geometry: Geometry,
    config: Config,
    *,
    u_out: Tensor | None = None,
    bias: Tensor | None = None,
    out_size: Sequence[int],
    rounded: bool = True,
    transposed: bool = False,
    keep: bool = False,
    stats: str = "none",
    layout: torch.memory_format | None = None,
    dtype: torch.dtype | None = None,
) -> Convolved:
    """core ∗ t, then u_out where it is given, by `convolve_rows`.

    t [N, K, *spatial] channels-last; core [taps, K, R] contiguous; u_out [C, R], any strides; out_size: the output's
    extents, those of the convolution's input if `transposed`. rounded: t is from `reduce`. keep: z as well. stats: as
    of `tucker_block`.
    """
    _, rank_in, rank_out = core.shape
    channels = rank_out if u_out is None else u_out.shape[0]
    last = block_memory_format(t.dim() - 2, False)
    values = torch.empty(
        (t.shape[0], channels, *out_size),
        dtype=dtype or t.dtype,
        device=t.device,
        memory_format=layout or last,
    )
    z = empty_rows(t, rank_out, out_size) if keep else None
    block_r = block_of(rank_out, MOST_COLUMNS if u_out is None else 2**20)
    block_c = block_of(channels, max(LEAST_BLOCK, min(64, U_BYTES // (block_r * t.dtype.itemsize))))
    rows = rows_of(config, block_r)
    if stats == "covariance":
        # Deviations lie in shared memory four times for their products.
        rows = min(rows, DEVIATIONS_BYTES // (16 * block_r))
    voxels = math.prod(out_size)
    blocks = triton.cdiv(voxels, rows)
    mean = m2 = covariance = None
    if stats != "none":
        mean, m2 = (values.new_empty((t.shape[0], blocks, channels), dtype=torch.float32) for _ in range(2))
    if stats == "covariance":
        covariance = values.new_empty((t.shape[0], blocks, channels, channels), dtype=torch.float32)
    if transposed and geometry.stride == (1, 1, 1):
        geometry, core, transposed = geometry.of_gradient(), core.flip(0), False
    size, produced = (geometry.out_size, geometry.size) if transposed else (geometry.size, geometry.out_size)
    together = 1 if transposed else together_of(geometry.kernel, rank_in, config, t.dtype)
    if together > 1:
        block_k = block_of(together * rank_in, 2**20)
    else:
        block_k = block_of(rank_in, 2 * config.channels // t.dtype.itemsize)
    config = with_room(config, (rows + block_r) * block_k * t.dtype.itemsize)
    if u_out is not None and not (u_out.is_contiguous() or u_out.T.is_contiguous()):
        u_out = u_out.contiguous()
    unit_k, unit_r, unit_c = unit_of(rank_in), unit_of(rank_out), unit_of(channels)
    arguments = (
        t, core, u_out, bias, values, z, mean, m2, covariance, *size, *produced,
        rank_in // unit_k, rank_out // unit_r, channels // unit_c,
    )  # fmt: skip
    constants = {
        **geometry.constants(), "TRANSPOSED": transposed, "HAS_U": u_out is not None, "HAS_BIAS": bias is not None,
        "HAS_Z": keep, "HAS_STATS": mean is not None, "HAS_COVARIANCE": covariance is not None,
        "U_RANKS_LAST": u_out is not None and u_out.is_contiguous(),
        "CHANNELS_LAST": layout != torch.contiguous_format, "T_ROUNDED": rounded,
        "UNIT_K": unit_k, "UNIT_R": unit_r, "UNIT_C": unit_c,
        "TOGETHER": together, "BLOCK_M": rows, "BLOCK_K": block_k, "BLOCK_R": block_r, "BLOCK_C": block_c,
        **arithmetic(t.dtype),
    }  # fmt: skip
    grid = (blocks, triton.cdiv(rank_out, block_r), t.shape[0])
    launch(convolve_rows, grid, arguments, constants, config)
    if mean is None:
        mean = m2 = torch.empty((t.shape[0], 0), dtype=torch.float32, device=t.device)
    else:
        mean, m2 = _combine(mean, m2 if covariance is None else covariance, rows, voxels)
    return Convolved(values, z, mean, m2)


def _combine(mean: Tensor, m2: Tensor, rows: int, voxels: int) -> tuple[Tensor, Tensor]:
    """Statistics of all voxels from those of blocks of rows (Chan, Golub, LeVeque 1979), in float64.

    mean [N, blocks, C], m2 the same or, of products, [N, blocks, C, C]; returns them without the second axis.
    """
    counts = torch.full((mean.shape[1], 1), rows, dtype=torch.float64, device=mean.device)
    counts[-1] = voxels - rows * (mean.shape[1] - 1)
    wide = mean.double()
    whole = (wide * counts).sum(1) / voxels
    deviations = wide - whole.unsqueeze(1)
    squares = m2.sum(1, dtype=torch.float64)
    if m2.dim() == 3:
        return whole.float(), (squares + (deviations.square() * counts).sum(1)).float()
    squares = squares + deviations.mT @ (deviations * counts)
    # A matrix product need not add up (i, j) and (j, i) in the same order.
    return whole.float(), ((squares + squares.mT) / 2).float()


def outer(a: Tensor, b: Tensor, geometry: Geometry, config: Config) -> Tensor:
    """[taps, A, B] in fp32: Σ over output voxels of a · bᵀ, b read through each tap, by `outer_rows`."""
    items, channels_a, channels_b = a.shape[0], a.shape[1], b.shape[1]
    voxels = items * math.prod(geometry.size)
    if geometry == Geometry.pointwise(geometry.size) and voxels * max(channels_a, channels_b) <= MOST_VOXELS:
        # One line of all voxels.
        geometry, items = Geometry.pointwise([voxels]), 1
    together = together_of(geometry.kernel, channels_b, config, a.dtype)
    block_a, block_b = block_of(channels_a, 64), block_of(together * channels_b, 64 if together == 1 else 128)
    taps = geometry.taps // together
    depth, height, width = geometry.out_size
    rows = block_of(width, config.rows)
    blocks = items * depth * height * triton.cdiv(width, rows)
    columns = triton.cdiv(channels_a, block_a) * triton.cdiv(together * channels_b, block_b)
    # The sums of all shares are written and read again, so there are as many as fill a card and no more.
    each = max(4, triton.cdiv(blocks, min(MOST_SHARES, max(1, MOST_PROGRAMS // (taps * columns)))))
    shares = triton.cdiv(blocks, each)
    partial = torch.empty(
        (shares, taps, channels_a, together * channels_b), dtype=torch.float32, device=a.device
    )
    unit_a, unit_b = unit_of(channels_a), unit_of(channels_b)
    arguments = (
        a, b, partial, items, *geometry.size, *geometry.out_size, channels_a // unit_a, channels_b // unit_b, each
    )  # fmt: skip
    constants = {
        **geometry.constants(), "UNIT_A": unit_a, "UNIT_B": unit_b, "TOGETHER": together,
        "BLOCK_M": rows, "BLOCK_A": block_a, "BLOCK_B": block_b, **arithmetic(a.dtype),
    }  # fmt: skip
    launch(outer_rows, (shares, taps, columns), arguments, constants, config)
    sums = partial.sum(0).view(taps, channels_a, together, channels_b)
    return sums.transpose(1, 2).reshape(geometry.taps, channels_a, channels_b)


def unit_of(*counts: int) -> int:
    """In which to count channels: 8, a load of 16 bytes, where it divides all of them."""
    return 1 if any(count % 8 for count in counts) else 8


def together_of(kernel: Sequence[int], channels: int, config: Config, dtype: torch.dtype) -> int:
    """Taps along the width that `convolve_rows` and `outer_rows` read as one: all, unless that is too much at once."""
    depth, height, width = kernel
    # Of each step of the others there is a bit in 32.
    few = depth * height < 32 and width * channels * dtype.itemsize <= 4 * config.channels
    return width if few else 1


def taps_first(core: Tensor, *, transposed: bool = False) -> Tensor:
    """core [R_out, R_in, *kernel] as [taps, R_in, R_out], or, for the gradient, [taps, R_out, R_in]."""
    flat = core.flatten(2)
    return flat.permute((2, 0, 1) if transposed else (2, 1, 0)).contiguous()


def forward(input, *call, configs: Configs = DEFAULT) -> Tensor:
    """`tucker_conv` in two launches; the output in the layout of the input."""
    return _forward(input, *call, keep=False, configs=configs)[0]


def stages(input, *call, configs: Configs = DEFAULT) -> tuple[Tensor, Tensor, Tensor]:
    """`forward`, with t and z."""
    return _forward(input, *call, keep=True, configs=configs)


def _forward(
    input, u_in, core, u_out, bias, stride, padding, dilation, *, keep: bool, configs: Configs
) -> tuple[Tensor, Tensor, Tensor | None]:
    x = channels_last(input)
    geometry = Geometry.of(x, core, stride, padding, dilation)
    t = reduce(x, u_in.contiguous(), configs.reduce)
    out = convolve(
        t,
        taps_first(core),
        geometry,
        configs.convolve,
        u_out=u_out,
        bias=None if bias is None else bias.contiguous(),
        out_size=geometry.out_size[3 - (core.dim() - 2) :],
        keep=keep,
        layout=memory_format(input),
    )
    return out.values, t, out.z


def backward(
    grad,
    input,
    u_in,
    core,
    u_out,
    stride,
    padding,
    dilation,
    mask,
    t=None,
    z=None,
    *,
    configs: Configs = DEFAULT,
) -> tuple[Tensor | None, ...]:
    """The gradient, as `tucker_ops.ops.reference.three_convs_backward`; what mask leaves out is not computed."""
    need_input, need_in, need_core, need_out, need_bias = mask
    below_core = need_input or need_in
    x, g = channels_last(input), channels_last(grad)
    ndim = core.dim() - 2
    geometry = Geometry.of(x, core, stride, padding, dilation)
    grad_input = grad_in = grad_core = grad_out = None
    kept = t is not None
    if (need_core or need_out) and t is None:
        t = reduce(x, u_in.contiguous(), configs.reduce)
    if need_out:
        if z is None:
            size = geometry.out_size[3 - ndim :]
            z = convolve(
                channels_last(t),
                taps_first(core),
                geometry,
                configs.convolve,
                out_size=size,
                rounded=not kept,
            ).values
        pointwise = Geometry.pointwise(grad.shape[2:])
        grad_out = outer(g, channels_last(z), pointwise, configs.outer)[0].to(u_out.dtype)
    if need_core or below_core:
        grad_z = reduce(g, u_out.T.contiguous(), configs.reduce)
    if need_core:
        taps = outer(grad_z, channels_last(t), geometry, configs.outer)
        grad_core = taps.permute(1, 2, 0).reshape(core.shape).to(core.dtype)
    if below_core:
        out = convolve(
            grad_z,
            taps_first(core, transposed=True),
            geometry,
            configs.convolve,
            u_out=u_in.T if need_input else None,
            out_size=input.shape[2:],
            transposed=True,
            keep=need_in and need_input,
        )
        grad_t = out.z if need_input else out.values
        grad_input = out.values if need_input else None
        if need_in:
            grad_in = outer(grad_t, x, Geometry.pointwise(input.shape[2:]), configs.outer)[0].to(u_in.dtype)
    grad_bias = None
    if need_bias:
        axes = (0, *range(2, grad.dim()))
        grad_bias = grad.sum(axes, dtype=torch.float32).to(grad.dtype)
    return grad_input, grad_in, grad_core, grad_out, grad_bias


def block(
    sources, expand, scale, shift, slope, reduce, in_bias, core, stride, padding, dilation, u_out, bias, stats,
    contiguous, float32_values, *, configs: Configs = DEFAULT,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`tucker_block`: a launch for each source, unless the only one is what the core reads, and one for the core."""
    sources = [channels_last(source) for source in sources]
    expand, scale, shift, reduce = (
        [None if t is None else t.contiguous() for t in given] for given in (expand, scale, shift, reduce)
    )
    in_bias, bias = (None if t is None else t.contiguous() for t in (in_bias, bias))
    first, ndim = sources[0], core.dim() - 2
    factor = reduce[0].shape[:ndim] if reduce[0] is not None and reduce[0].dim() > 2 else (1,) * ndim
    size = [n * f for n, f in zip(first.shape[2:], factor, strict=True)]
    pending = [*expand, *scale, *shift, *reduce, in_bias]
    if len(sources) == 1 and slope[0] == 1 and all(tensor is None for tensor in pending):
        t = first
    else:
        t = empty_rows(first, core.shape[1], size)
        _read_sources(t, sources, expand, scale, shift, slope, reduce, in_bias, configs.reduce)
    geometry = Geometry.of(t, core, stride, padding, dilation)
    out = convolve(
        t,
        taps_first(core),
        geometry,
        configs.convolve,
        u_out=u_out,
        bias=bias,
        out_size=geometry.out_size[3 - ndim :],
        rounded=t is not first,
        stats=stats,
        layout=torch.contiguous_format if contiguous else None,
        dtype=torch.float32 if float32_values else None,
    )
    # An op's outputs share no memory.
    return out.values, out.mean, out.m2.clone() if out.m2 is out.mean else out.m2


def _read_sources(t, sources, expand, scale, shift, slope, reduce, in_bias, config: Config) -> None:
    """Writes t, the core's input, from all sources: side by side, or added up in fp32 and rounded once."""
    rows = [
        (s.shape[1] if u is None else u.shape[0]) if m is None else m.shape[-2]
        for s, u, m in zip(sources, expand, reduce, strict=True)
    ]
    side_by_side = sum(rows) == t.shape[1]
    total = None
    if not side_by_side:
        total = empty_rows(t, t.shape[1], t.shape[2:], torch.float32)
    begin = 0
    for i, source in enumerate(sources):
        last = i == len(sources) - 1
        reduce_into(
            t if side_by_side or last else total,
            source,
            config,
            matrix=reduce[i],
            expand=expand[i],
            scale=scale[i],
            shift=shift[i],
            slope=slope[i],
            in_bias=in_bias if side_by_side or last else None,
            partial=None if side_by_side or i == 0 else total,
            first=begin,
            final=side_by_side or last,
        )
        begin += rows[i] if side_by_side else 0
