"""`tucker_conv`, as users call it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from tucker_ops.backends.select import Explanation, explain_problem
from tucker_ops.errors import BackendError, ShapeError
from tucker_ops.ops.check import check_tensors, ntuple, problem_of
from tucker_ops.ops.gradient import keeps_stages
from tucker_ops.ops.reference import three_convs
from tucker_ops.types import Problem

IntOrInts = int | Sequence[int]


def tucker_conv(
    input: Tensor,
    u_in: Tensor,
    core: Tensor,
    u_out: Tensor,
    bias: Tensor | None = None,
    stride: IntOrInts = 1,
    padding: IntOrInts = 0,
    dilation: IntOrInts = 1,
    *,
    backend: str | None = None,
) -> Tensor:
    """Tucker-2 convolution in one pass, in 2D and 3D.

    Equals conv(1x1, u_in) -> conv(kernel, core, stride, padding, dilation) -> conv(1x1, u_out) + bias
    (Kim et al. 2016, arXiv 1511.06530).

    Args:
        input: [N, C_in, *spatial] or, as in torch.nn.Conv3d, [C_in, *spatial]; float32, bfloat16, float16
            or float64; any strides. Zero padding is exact because the first stage has no bias.
        u_in: [R_in, C_in].
        core: [R_out, R_in, *kernel].
        u_out: [C_out, R_out].
        bias: [C_out] or None.
        stride, padding, dilation: voxels; one integer, or one per spatial axis.
        backend: name from `tucker_ops.backends()`, or None to choose; see `tucker_ops.explain`.

    Returns:
        [N, C_out, *output] in the input's dtype; channels-last if the input is, else contiguous.

    On the CPU, a NaN or an infinity in the input may reach outputs up to three voxels further than the kernel
    does, where Winograd's algorithm computes the core; `tucker_ops.explain` tells where that is.

    Backward works to second order; forward-mode derivatives run on the reference. The gradient needs the intermediates
    t = u_in · input and z = core ∗ t, and computes them again: only the input and the weights are kept. With
    TUCKER_KEEP_STAGES=1 they are kept, for (R_in + R_out) / C_in more memory and less arithmetic.

    Raises:
        ShapeError, RankError, DtypeError, DeviceError: arguments that do not fit together.
        BackendError: a named backend that does not exist or cannot run this problem.
    """
    check_tensors(input=input, u_in=u_in, core=core, u_out=u_out, bias=bias)
    batched, geometry = _normalise(input, core, stride, padding, dilation)
    if backend is not None and not isinstance(backend, str):
        raise BackendError(f"backend must be a name, got {backend!r}; see tucker_ops.backends()")
    if forward_ad._current_level >= 0:
        # A custom op has no forward-mode derivative and would silently return a zero tangent.
        if backend not in (None, "reference"):
            raise BackendError(f"backend {backend!r} has no forward-mode derivative; leave backend unset")
        problem_of(batched, u_in, core, u_out, bias, *geometry)
        out = three_convs(batched, u_in, core, u_out, bias, *geometry)
    elif _differentiated(input, u_in, core, u_out, bias) and keeps_stages():
        call = torch.ops.tucker_ops.tucker_conv_stages
        out, _, _ = call(batched, u_in, core, u_out, bias, *geometry, backend=backend)
    else:
        out = torch.ops.tucker_ops.tucker_conv(batched, u_in, core, u_out, bias, *geometry, backend=backend)
    return out if batched is input else out.squeeze(0)


def _differentiated(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def explain(
    input: Tensor | Problem,
    u_in: Tensor | None = None,
    core: Tensor | None = None,
    u_out: Tensor | None = None,
    bias: Tensor | None = None,
    stride: IntOrInts = 1,
    padding: IntOrInts = 0,
    dilation: IntOrInts = 1,
    *,
    backend: str | None = None,
) -> Explanation:
    """Which backend runs this call of `tucker_conv`, and what every other one says; print it.

    Takes the arguments of `tucker_conv`, or one `Problem`; raises what `tucker_conv` would.
    """
    if isinstance(input, Problem):
        return explain_problem(input, backend)
    check_tensors(input=input, u_in=u_in, core=core, u_out=u_out, bias=bias)
    batched, geometry = _normalise(input, core, stride, padding, dilation)
    return explain_problem(problem_of(batched, u_in, core, u_out, bias, *geometry), backend)


def _normalise(input, core, stride, padding, dilation):
    ndim = core.dim() - 2
    if ndim not in (2, 3):
        raise ShapeError(
            f"core must be [R_out, R_in, *kernel] with 2 or 3 kernel axes, got shape {tuple(core.shape)}"
        )
    geometry = (
        ntuple(stride, ndim, "stride", 1),
        ntuple(padding, ndim, "padding", 0),
        ntuple(dilation, ndim, "dilation", 1),
    )
    return (input.unsqueeze(0) if input.dim() == ndim + 1 else input), geometry
