"""Schema, fake and checks of `tucker_ops::tucker_block`, the unit that a fused network is made of.

Inference only: it has no derivative and says so. `tucker_ops.ops.reference.block` is what it means.

    sources[i]   [N, C_i, *spatial], at the input's extents or a whole fraction of them
    expand[i]    [C_i, R_i] of a source [N, R_i, *spatial] in rank space, or None
    scale[i], shift[i]  [N, C_i] in fp32 of the norm still to be applied, or None; slope[i] of LeakyReLU, 1 for none
    reduce[i]    [rows, C_i], for a source at 1/s of the extents [*s, rows, C_i]; None: the source as it is, rows = C_i
                 rows = R_in for all: they are summed; rows that add up to R_in: they are put side by side
    in_bias      [R_in], added inside the volume only;  core [R_out, R_in, *kernel];  u_out [C_out, R_out] or None
    t = Σ_i reduce_i · LeakyReLU(scale_i · expand_i · source_i + shift_i) + in_bias, zero-padded; side by side ⊕ for Σ
    values = u_out · (core ∗ t) + bias
    stats = "none": mean and m2 are [N, 0]. "channel": mean and m2, the sum of squared deviations, [N, C_out].
    "covariance": m2 [N, C_out, C_out], the sums of products of deviations of two channels

Statistics are those of fp32 accumulators; kernels that multiply bf16 may take them after the core's output is rounded.
A block in rank space returns the core's output without u_out and its covariance, from which follows the norm of what
u_out would make of it; its reader takes u_out as `expand`.

Values are channels-last unless `contiguous` is asked for, and of the sources' dtype unless `float32_values` are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tucker_ops.errors import DeviceError, DtypeError, RankError, ShapeError, TuckerOpsError
from tucker_ops.ops.check import DTYPES, check_tensors, ntuple
from tucker_ops.ops.schema import CUDA_ARGUMENTS, LIBRARY
from tucker_ops.types import BlockProblem

STATS = ("none", "channel", "covariance")

_SOURCES = (
    "Tensor[] sources, Tensor?[] expand, Tensor?[] scale, Tensor?[] shift, float[] slope, Tensor?[] reduce"
)
_REST = "Tensor? u_out, Tensor? bias, str stats, bool contiguous=False, bool float32_values=False"
_RETURNS = "(Tensor values, Tensor mean, Tensor m2)"

LIBRARY.define(
    f"tucker_block({_SOURCES}, Tensor? in_bias, Tensor core, SymInt[] stride, SymInt[] padding, SymInt[] dilation, "
    f"{_REST}, *, str? backend=None) -> {_RETURNS}",
    tags=(torch.Tag.pt2_compliant_tag,),
)
LIBRARY.define(
    f"_tucker_block_cpu({_SOURCES}, Tensor? in_bias, Tensor core, int[] stride, int[] padding, int[] dilation, "
    f"{_REST}) -> {_RETURNS}",
    tags=(torch.Tag.pt2_compliant_tag,),
)
LIBRARY.define(
    f"_tucker_block_cuda({_SOURCES}, Tensor? in_bias, Tensor core, int[] stride, int[] padding, int[] dilation, "
    f"Tensor? u_out, Tensor? bias, str stats, bool contiguous, bool float32_values, {CUDA_ARGUMENTS}) -> {_RETURNS}",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def block_problem_of(
    sources, expand, scale, shift, slope, reduce, in_bias, core, stride, padding, dilation, u_out, bias, stats
) -> BlockProblem:
    """The `BlockProblem` these arguments describe; ShapeError, RankError, DtypeError or DeviceError if they do
    not fit together.
    """
    lists = {"expand": expand, "scale": scale, "shift": shift, "slope": slope, "reduce": reduce}
    if not sources:
        raise ShapeError("tucker_block needs at least one source, got none")
    for name, values in lists.items():
        if len(values) != len(sources):
            raise ShapeError(
                f"{name} has {len(values)} entries for {len(sources)} sources: give one for each"
            )
    if stats not in STATS:
        raise ShapeError(f"stats must be one of {STATS}, got {stats!r}")
    ndim = core.dim() - 2
    if ndim not in (2, 3):
        raise ShapeError(
            f"core must be [R_out, R_in, *kernel] with 2 or 3 kernel axes, got {tuple(core.shape)}"
        )
    rank_out, rank_in = core.shape[:2]
    first = sources[0]
    for i, source in enumerate(sources):
        if source.dim() != ndim + 2 or source.shape[0] != first.shape[0]:
            raise ShapeError(
                f"source {i} must be [N, C, *spatial] with {ndim} spatial axes and N = {first.shape[0]}, got "
                f"{tuple(source.shape)}"
            )
    factors = [_factor(i, reduce[i], ndim) for i in range(len(sources))]
    sizes = [
        tuple(n * f for n, f in zip(source.shape[2:], factor, strict=True))
        for source, factor in zip(sources, factors, strict=True)
    ]
    size, channels, rows = sizes[0], [], []
    if any(other != size for other in sizes):
        raise ShapeError(
            f"sources of extents {[tuple(s.shape[2:]) for s in sources]}, times {factors}, must have the same extents, "
            f"got {sizes}"
        )
    for i, source in enumerate(sources):
        c = source.shape[1] if expand[i] is None else expand[i].shape[0]
        if expand[i] is not None and tuple(expand[i].shape) != (c, source.shape[1]):
            raise ShapeError(
                f"expand of source {i} must be [C, {source.shape[1]}], got {tuple(expand[i].shape)}"
            )
        for name, given in (("scale", scale[i]), ("shift", shift[i])):
            if given is not None and tuple(given.shape) != (first.shape[0], c):
                raise ShapeError(
                    f"{name} of source {i} must be [N, C] = [{first.shape[0]}, {c}], got {tuple(given.shape)}"
                )
        if reduce[i] is not None and reduce[i].shape[-1] != c:
            raise ShapeError(
                f"reduce of source {i} must be [rows, C = {c}], or have factors before that, got "
                f"{list(reduce[i].shape)}"
            )
        channels.append(c)
        rows.append(c if reduce[i] is None else reduce[i].shape[-2])
    if sum(rows) != rank_in and (set(rows) != {rank_in} or any(matrix is None for matrix in reduce)):
        raise ShapeError(
            f"sources of {rows} rows fit no core of {rank_in} inputs: each needs a reduce of {rank_in} rows, or those "
            "of all must add up to that many"
        )
    out_channels = rank_out if u_out is None else u_out.shape[0]
    if u_out is not None and tuple(u_out.shape) != (out_channels, rank_out):
        raise ShapeError(f"u_out must be [C_out, R_out = {rank_out}], got {tuple(u_out.shape)}")
    for name, vector, length in (("in_bias", in_bias, rank_in), ("bias", bias, out_channels)):
        if vector is not None and tuple(vector.shape) != (length,):
            raise ShapeError(f"{name} must be [{length}], got {tuple(vector.shape)}")
    if min(rank_in, rank_out, out_channels, *channels) < 1:
        raise RankError(f"ranks and channels must be at least 1, got core {tuple(core.shape)}")

    weights = [t for t in (*expand, *reduce, in_bias, core, u_out, bias) if t is not None]
    check_tensors(**{f"tensor {i}": t for i, t in enumerate((*sources, *weights))})
    dtypes = {t.dtype for t in (*sources, *weights)}
    if len(dtypes) != 1 or first.dtype not in DTYPES:
        raise DtypeError(
            f"sources and weights must have one dtype of {[str(d) for d in DTYPES]}, got {dtypes}: convert with .to"
        )
    wide = torch.float64 if first.dtype == torch.float64 else torch.float32
    pending = [t for t in (*scale, *shift) if t is not None]
    if any(t.dtype != wide for t in pending):
        raise DtypeError(
            f"scale and shift must be {wide} for {first.dtype} sources, got {[t.dtype for t in pending]}"
        )
    devices = {str(t.device) for t in (*sources, *weights, *pending)}
    if len(devices) != 1:
        raise DeviceError(f"all tensors must be on one device, got {devices}: move them with .to(device)")
    problem = BlockProblem(
        batch=first.shape[0],
        channels=tuple(channels),
        factors=tuple(factors),
        rank_in=rank_in,
        rank_out=rank_out,
        out_channels=out_channels,
        input_size=size,
        kernel_size=tuple(core.shape[2:]),
        stride=tuple(ntuple(stride, ndim, "stride", 1)),
        padding=tuple(ntuple(padding, ndim, "padding", 0)),
        dilation=tuple(ntuple(dilation, ndim, "dilation", 1)),
        dtype=first.dtype,
        device=first.device.type,
        rows=tuple(rows),
        expanded=any(u is not None for u in expand),
        u_out=u_out is not None,
        stats=stats,
    )
    if min(*problem.kernel_size, *size) < 1 or min(problem.output_size) < 1:
        raise ShapeError(
            f"kernel {problem.kernel_size} with dilation {problem.dilation} does not fit into input {size} padded by "
            f"{problem.padding}: the output would be {problem.output_size}; pad more"
        )
    return problem


def _factor(i: int, matrix: Tensor | None, ndim: int) -> tuple[int, ...]:
    """By how much a source's extents are smaller than the input's: the leading axes of its matrices."""
    if matrix is None or matrix.dim() == 2:
        return (1,) * ndim
    if matrix.dim() != ndim + 2:
        raise ShapeError(
            f"reduce of source {i} must be [R_in, C] or [*s, R_in, C] with {ndim} factors, got {list(matrix.shape)}"
        )
    return tuple(matrix.shape[:ndim])


def block_memory_format(ndim: int, contiguous: bool) -> torch.memory_format:
    """Layout of the values: channels-last, unless the caller asks for contiguous ones."""
    if contiguous:
        return torch.contiguous_format
    return torch.channels_last if ndim == 2 else torch.channels_last_3d


def split_call(args: tuple) -> tuple[tuple, tuple[bool, bool]]:
    """The op's arguments as those of `block_problem_of` and (contiguous, float32_values), which may be left out."""
    call, options = args[:14], args[14:]
    return call, (*options, False, False)[:2]


def _empty_outputs(*args):
    call, (contiguous, float32_values) = split_call(args)
    problem = block_problem_of(*call)
    like = call[0][0]
    wide = torch.float64 if like.dtype == torch.float64 else torch.float32
    values = torch.empty(
        (problem.batch, problem.out_channels, *problem.output_size),
        dtype=torch.float32 if float32_values else like.dtype,
        device=like.device,
        memory_format=block_memory_format(problem.ndim, contiguous),
    )
    size = (problem.batch, 0 if problem.stats == "none" else problem.out_channels)
    m2_size = (*size, problem.out_channels) if problem.stats == "covariance" else size
    return values, values.new_empty(size, dtype=wide), values.new_empty(m2_size, dtype=wide)


@torch.library.register_fake("tucker_ops::tucker_block", lib=LIBRARY)
def _(*args, backend=None):
    return _empty_outputs(*args)


@torch.library.register_fake("tucker_ops::_tucker_block_cpu", lib=LIBRARY)
def _(*args):
    return _empty_outputs(*args)


@torch.library.register_fake("tucker_ops::_tucker_block_cuda", lib=LIBRARY)
def _(*args):
    *call, _device, _choice = args
    return _empty_outputs(*call)


def no_backward(ctx, *grads):
    raise TuckerOpsError(
        "a fused network has no derivative: it computes inference. Call the network in training mode, or without "
        "torch.no_grad, through its own modules"
    )


torch.library.register_autograd("tucker_ops::tucker_block", no_backward, lib=LIBRARY)
