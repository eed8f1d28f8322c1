"""Reference: the three convolutions, written as three convolutions.

Every fast path is tested against this function in float64. It is also the `reference` backend.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def three_convs(
    input: Tensor,
    u_in: Tensor,
    core: Tensor,
    u_out: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> Tensor:
    """conv(1, u_in), then conv(kernel, core, stride, padding, dilation), then conv(1, u_out) + bias.

    input [N, C_in, *spatial], u_in [R_in, C_in], core [R_out, R_in, *kernel], u_out [C_out, R_out],
    bias [C_out] or None; any floating dtype and device that torch convolves. Returns
    [N, C_out, *output]. Formula: Tucker-2 of the kernel, Kim et al. 2016 (arXiv 1511.06530), eq. 4-6.
    """
    return three_stages(input, u_in, core, u_out, bias, stride, padding, dilation)[0]


def three_stages(
    input: Tensor,
    u_in: Tensor,
    core: Tensor,
    u_out: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """`three_convs` with what is computed on the way: values, t [N, R_in, *spatial] and z [N, R_out, *output]."""
    ndim = core.dim() - 2
    conv = F.conv2d if ndim == 2 else F.conv3d
    t = conv(input, u_in.reshape(*u_in.shape, *(1,) * ndim))
    z = conv(t, core, None, stride, padding, dilation)
    return conv(z, u_out.reshape(*u_out.shape, *(1,) * ndim), bias), t, z


def three_convs_backward(
    grad: Tensor,
    input: Tensor,
    u_in: Tensor,
    core: Tensor,
    u_out: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    mask: list[bool],
    t: Tensor | None = None,
    z: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """Chain rule through `three_convs`: gradients of input, u_in, core, u_out and bias, None where `mask` says no.

    grad [N, C_out, *output]; t = u_in · input [N, R_in, *spatial] and z = core ∗ t [N, R_out, *output] are computed
    here unless given. Written in differentiable torch operations, so that it can be differentiated again.
    """
    ndim = core.dim() - 2
    stride, padding, dilation = (
        list(v) * ndim if len(v) == 1 else list(v) for v in (stride, padding, dilation)
    )
    ones, zeros = [1] * ndim, [0] * ndim
    w_in = u_in.reshape(*u_in.shape, *ones)
    w_out = u_out.reshape(*u_out.shape, *ones)
    need_input, need_in, need_core, need_out, need_bias = mask

    def conv(x, weight, stride=ones, padding=zeros, dilation=ones):
        return torch.ops.aten.convolution(x, weight, None, stride, padding, dilation, False, zeros, 1)

    def conv_backward(grad, x, weight, mask, stride=ones, padding=zeros, dilation=ones):
        return torch.ops.aten.convolution_backward(
            grad, x, weight, None, stride, padding, dilation, False, zeros, 1, [*mask, False]
        )[:2]

    grad_bias = grad.sum((0, *range(2, ndim + 2))) if need_bias else None
    grad_input = grad_in = grad_core = grad_out = None
    below_core = need_input or need_in
    if (need_core or need_out or below_core) and t is None:
        t = conv(input, w_in)
    if need_out or need_core or below_core:
        if z is None:
            z = conv(t, core, stride, padding, dilation)
        grad_z, grad_out = conv_backward(grad, z, w_out, (need_core or below_core, need_out))
    if need_core or below_core:
        grad_t, grad_core = conv_backward(grad_z, t, core, (below_core, need_core), stride, padding, dilation)
    if below_core:
        grad_input, grad_in = conv_backward(grad_t, input, w_in, (need_input, need_in))
    return (
        grad_input,
        grad_in.reshape(u_in.shape) if need_in else None,
        grad_core,
        grad_out.reshape(u_out.shape) if need_out else None,
        grad_bias,
    )


def block(
    sources: list[Tensor],
    expand: list[Tensor | None],
    scale: list[Tensor | None],
    shift: list[Tensor | None],
    slope: list[float],
    reduce: list[Tensor | None],
    in_bias: Tensor | None,
    core: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    u_out: Tensor | None,
    bias: Tensor | None,
    stats: str,
    values_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What `tucker_block` means, one torch operation after the other; see `tucker_ops.fused.block`.

    Computes in float64 if the sources are, else in float32; at the end values are rounded to `values_dtype`, by default
    that of the sources.
    """
    dtype = torch.float64 if sources[0].dtype == torch.float64 else torch.float32
    ndim = core.dim() - 2
    conv = F.conv2d if ndim == 2 else F.conv3d
    ones = (1,) * ndim

    def pointwise(x: Tensor, matrix: Tensor) -> Tensor:
        return conv(x, matrix.to(dtype).reshape(*matrix.shape, *ones))

    parts = []
    for x, u, a, b, negative, matrix in zip(sources, expand, scale, shift, slope, reduce, strict=True):
        value = x.to(dtype)
        if u is not None:
            value = pointwise(value, u)
        if a is not None:
            value = value * a.to(dtype).reshape(*a.shape, *ones)
        if b is not None:
            value = value + b.to(dtype).reshape(*b.shape, *ones)
        if negative != 1:
            value = F.leaky_relu(value, negative)
        if matrix is not None and matrix.dim() > 2:
            value = _upsample(value, matrix.to(dtype))
        elif matrix is not None:
            value = pointwise(value, matrix)
        parts.append(value)
    side_by_side = sum(part.shape[1] for part in parts) == core.shape[1]
    t = torch.cat(parts, 1) if side_by_side else sum(parts)
    if in_bias is not None:
        t = t + in_bias.to(dtype).reshape(-1, *ones)
    values = conv(t, core.to(dtype), None, stride, padding, dilation)
    if u_out is not None:
        values = pointwise(values, u_out)
    if bias is not None:
        values = values + bias.to(dtype).reshape(-1, *ones)
    mean, m2 = _statistics(values, stats)
    return values.to(values_dtype or sources[0].dtype), mean, m2


def merge(
    values: list[Tensor],
    scale: list[Tensor | None],
    shift: list[Tensor | None],
    slope: list[float],
    out_slope: float,
) -> Tensor:
    """What `tucker_merge` means: see `tucker_ops.ops.merge`. Computes in float64 if the values are, else in float32."""
    dtype = torch.float64 if values[0].dtype == torch.float64 else torch.float32
    ones = (1,) * (values[0].dim() - 2)
    total = 0
    for x, a, b, negative in zip(values, scale, shift, slope, strict=True):
        value = x.to(dtype)
        if a is not None:
            value = value * a.reshape(*a.shape, *ones)
        if b is not None:
            value = value + b.reshape(*b.shape, *ones)
        total = total + F.leaky_relu(value, negative)
    return F.leaky_relu(total, out_slope).to(values[0].dtype)


def _upsample(x: Tensor, matrices: Tensor) -> Tensor:
    """A transposed convolution of kernel = stride = s: matrices [*s, R, C], x [N, C, *] to [N, R, *]."""
    *factors, ranks, channels = matrices.shape
    batch, extents, ndim = x.shape[0], x.shape[2:], len(factors)
    parts = torch.einsum("src,nc...->nrs...", matrices.reshape(-1, ranks, channels), x)
    parts = parts.reshape(batch, ranks, *factors, *extents)
    order = [0, 1]
    for axis in range(ndim):
        order += [2 + ndim + axis, 2 + axis]
    size = [n * f for n, f in zip(extents, factors, strict=True)]
    return parts.permute(order).reshape(batch, ranks, *size)


def _statistics(values: Tensor, stats: str) -> tuple[Tensor, Tensor]:
    """Mean [N, C] and M2 [N, C], the sum of squared deviations, or of products [N, C, C] for a covariance; empty
    [N, 0] without stats.
    """
    wide = values if values.dtype == torch.float64 else values.float()
    if stats == "none":
        empty = wide.new_empty(values.shape[0], 0)
        return empty, empty.clone()
    flat = wide.flatten(2).double()
    mean = flat.mean(2)
    deviations = flat - mean.unsqueeze(2)
    m2 = deviations @ deviations.mT if stats == "covariance" else deviations.square().sum(2)
    return mean.to(wide.dtype), m2.to(wide.dtype)


def memory_format(tensor: Tensor) -> torch.memory_format:
    """The layout that the op's output takes from its input: channels-last if the input is, else contiguous."""
    channels_last = torch.channels_last if tensor.dim() == 4 else torch.channels_last_3d
    if not tensor.is_contiguous() and tensor.is_contiguous(memory_format=channels_last):
        return channels_last
    return torch.contiguous_format
