"""Argument checks of the op. They run in Python before any kernel, on real and on fake tensors alike."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor

from tucker_ops.errors import DeviceError, DtypeError, RankError, ShapeError
from tucker_ops.ops.reference import memory_format
from tucker_ops.types import Problem

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


LARGEST = 2**31 - 1


def ntuple(value: int | Sequence[int], ndim: int, name: str, minimum: int) -> list[int]:
    """`value` as one integer per spatial axis, each from `minimum` to 2**31 - 1; raises ShapeError otherwise."""
    values = list(value) if isinstance(value, Sequence) else [value]
    if len(values) == 1:
        values = values * ndim
    if len(values) != ndim:
        raise ShapeError(f"{name} has {len(values)} entries for a {ndim}D convolution: give 1 or {ndim}")
    if any(isinstance(v, bool) or not isinstance(v, (Integral, torch.SymInt)) for v in values):
        raise ShapeError(f"{name} must be an integer or {ndim} integers, got {value!r}")
    # numpy's integers are fine, but the op's schema takes Python's.
    values = [v if isinstance(v, torch.SymInt) else int(v) for v in values]
    if any(v < minimum or v > LARGEST for v in values):
        raise ShapeError(f"{name} must lie between {minimum} and {LARGEST} on every axis, got {values}")
    return values


def check_tensors(**given: Tensor | None) -> None:
    """Raise DtypeError unless each is a dense (strided) torch.Tensor; `bias` may be None."""
    for name, tensor in given.items():
        if tensor is None and name == "bias":
            continue
        if not isinstance(tensor, Tensor):
            raise DtypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.layout != torch.strided:
            raise DtypeError(f"{name} has layout {tensor.layout}; convert it with .to_dense()")


def problem_of(
    input: Tensor,
    u_in: Tensor,
    core: Tensor,
    u_out: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Problem:
    """The `Problem` these arguments describe.

    Raises ShapeError, RankError, DtypeError or DeviceError if they do not fit together.
    """
    check_tensors(input=input, u_in=u_in, core=core, u_out=u_out, bias=bias)
    given = {"input": input, "u_in": u_in, "core": core, "u_out": u_out}
    if bias is not None:
        given["bias"] = bias
    ndim = core.dim() - 2
    if ndim not in (2, 3):
        raise ShapeError(
            f"core must be [R_out, R_in, *kernel] with 2 or 3 kernel axes, got shape {tuple(core.shape)}"
        )
    if input.dim() != ndim + 2:
        raise ShapeError(
            f"input must be [N, C_in, *spatial] with {ndim} spatial axes to fit core {tuple(core.shape)}, "
            f"got shape {tuple(input.shape)}"
        )
    if u_in.dim() != 2 or u_out.dim() != 2:
        raise ShapeError(
            f"u_in must be [R_in, C_in] and u_out [C_out, R_out], got {tuple(u_in.shape)} and {tuple(u_out.shape)}"
        )
    if u_in.shape[1] != input.shape[1]:
        raise ShapeError(
            f"u_in {tuple(u_in.shape)} takes {u_in.shape[1]} channels, but the input has {input.shape[1]}: "
            f"shape {tuple(input.shape)}"
        )
    if core.shape[1] != u_in.shape[0] or core.shape[0] != u_out.shape[1]:
        raise ShapeError(
            f"core {tuple(core.shape)} must be [R_out, R_in, *kernel] with R_in = {u_in.shape[0]} from u_in and "
            f"R_out = {u_out.shape[1]} from u_out"
        )
    if bias is not None and tuple(bias.shape) != (u_out.shape[0],):
        raise ShapeError(f"bias must be [C_out] = [{u_out.shape[0]}], got {tuple(bias.shape)}")
    if min(*core.shape[:2], *u_in.shape, *u_out.shape) < 1:
        raise RankError(
            f"ranks and channels must be at least 1, got u_in {tuple(u_in.shape)}, core {tuple(core.shape)}, "
            f"u_out {tuple(u_out.shape)}"
        )

    dtypes = {name: tensor.dtype for name, tensor in given.items()}
    if len(set(dtypes.values())) != 1:
        raise DtypeError(
            f"all tensors must have one dtype, got {dtypes}: convert them with .to(dtype), or run under "
            "autocast, which converts all but float64"
        )
    if input.dtype not in DTYPES:
        raise DtypeError(f"dtype {input.dtype} is not computed; use one of {[str(d) for d in DTYPES]}")
    devices = {name: str(tensor.device) for name, tensor in given.items()}
    if len(set(devices.values())) != 1:
        raise DeviceError(f"all tensors must be on one device, got {devices}: move them with .to(device)")

    spatial = tuple(input.shape[2:])
    problem = Problem(
        batch=input.shape[0],
        in_channels=input.shape[1],
        rank_in=core.shape[1],
        rank_out=core.shape[0],
        out_channels=u_out.shape[0],
        input_size=spatial,
        kernel_size=tuple(core.shape[2:]),
        stride=tuple(ntuple(stride, ndim, "stride", 1)),
        padding=tuple(ntuple(padding, ndim, "padding", 0)),
        dilation=tuple(ntuple(dilation, ndim, "dilation", 1)),
        dtype=input.dtype,
        device=input.device.type,
        layout=_layout(input),
        bias=bias is not None,
    )
    if min(problem.kernel_size) < 1 or min(spatial) < 1:
        raise ShapeError(
            f"kernel and input extents must be at least 1, got kernel {problem.kernel_size} and input {spatial}"
        )
    if min(problem.output_size) < 1:
        raise ShapeError(
            f"kernel {problem.kernel_size} with dilation {problem.dilation} does not fit into input {spatial} "
            f"padded by {problem.padding}: the output would be {problem.output_size}; pad more"
        )
    return problem


def _layout(input: Tensor) -> str:
    if memory_format(input) != torch.contiguous_format:
        return "channels_last"
    return "contiguous" if input.is_contiguous() else "strided"
