"""What stands in the graph of a network in training: functions with gradients of their own, on the CPU's kernels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from tucker_ops.backends import cpu_derivative
from tucker_ops.backends.select import dense_kernels, norm_act_kernels, pointwise_kernels


def channels_last(input: Tensor) -> Tensor:
    """`input` in this layout, by its strides too where a single channel fits both, which torch takes for contiguous."""
    if input.shape[1] == 1:
        return input.contiguous().squeeze(1).unsqueeze(-1).movedim(-1, 1)
    return input.contiguous(memory_format=torch.channels_last if input.dim() == 4 else torch.channels_last_3d)


def _as_autocast_would(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The arguments of a convolution, cast where autograd sees it: inside our functions it would not."""
    if not torch.is_autocast_enabled("cpu"):
        return tensors
    dtype = torch.get_autocast_dtype("cpu")
    return tuple(None if t is None else t.to(dtype) for t in tensors)


def norm_act_conv(
    input: Tensor, weight, bias, eps: float, slope: float, u_in, core, u_out, conv_bias, stride, padding, dilation
) -> Tensor:  # fmt: skip
    """`norm_act`, then `tucker_conv`; the activated tensor between them is made again for the gradient."""
    input, *conv = _as_autocast_would(input, u_in, core, u_out, conv_bias)
    with torch.autocast("cpu", enabled=False):
        return _NormActConv.apply(input, weight, bias, eps, slope, *conv, stride, padding, dilation)


class _NormActConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, weight, bias, eps, slope, u_in, core, u_out, conv_bias, *geometry):
        values, mean, rstd = torch.ops.tucker_ops.norm_act(input, weight, bias, eps, slope)
        ctx.save_for_backward(input, mean, rstd, weight, bias, u_in, core, u_out)
        ctx.numbers, ctx.geometry = (eps, slope), geometry
        return torch.ops.tucker_ops.tucker_conv(values, u_in, core, u_out, conv_bias, *geometry)

    @staticmethod
    def backward(ctx, grad):
        input, mean, rstd, weight, bias, u_in, core, u_out = ctx.saved_tensors
        eps, slope = ctx.numbers
        need_input, need_weight, need_bias, _, _, *need_conv = ctx.needs_input_grad[:9]
        below = need_input or need_weight or need_bias
        if torch.is_grad_enabled() or not norm_act_kernels(input):
            # To be differentiated again, or on tensors that the compiled kernels do not take.
            values = torch.ops.tucker_ops.norm_act(input, weight, bias, eps, slope)[0]
        else:
            affine = (None if t is None else t.float().contiguous() for t in (weight, bias))
            values = torch.ops.tucker_ops._norm_act_again_cpu(input, mean, rstd, *affine, slope)
        wanted = [below, *need_conv]
        grads = torch.ops.tucker_ops.tucker_conv_backward(
            grad, values, u_in, core, u_out, *ctx.geometry, wanted
        )
        of_conv = [g if needed else None for g, needed in zip(grads[1:], need_conv, strict=True)]
        of_norm: list[Tensor | None] = [None] * 3
        if below:
            mask = [need_input, need_weight, need_bias]
            found = torch.ops.tucker_ops.norm_act_backward(
                grads[0], input, mean, rstd, weight, bias, eps, slope, mask
            )
            of_norm = [g if needed else None for g, needed in zip(found, mask, strict=True)]
        return *of_norm, None, None, *of_conv, None, None, None


def pointwise_conv(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A convolution of one tap; weight [A, C] or [A, C, 1, …]. Channels-last where our kernels compute it."""
    input, weight, bias = _as_autocast_would(input, weight, bias)
    with torch.autocast("cpu", enabled=False):
        return _pointwise(input, weight, bias)


def _pointwise(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if pointwise_kernels(input) and weight.dtype == input.dtype:
        return _Pointwise.apply(input, weight, bias)
    conv = F.conv2d if input.dim() == 4 else F.conv3d
    return conv(input, weight.reshape(*weight.shape[:2], *(1,) * (input.dim() - 2)), bias)


class _Pointwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, weight, bias):
        ctx.save_for_backward(input, weight)
        return cpu_derivative.pointwise(input, weight.flatten(1), bias)

    @staticmethod
    def backward(ctx, grad):
        input, weight = ctx.saved_tensors
        needed = list(ctx.needs_input_grad)
        matrix = weight.flatten(1)
        if torch.is_grad_enabled():
            # To be differentiated again.
            grads = (
                torch.einsum("ac,na...->nc...", matrix, grad),
                torch.einsum("nav,ncv->ac", grad.flatten(2), input.flatten(2)),
                grad.flatten(2).sum((0, 2)),
            )
        else:
            grads = cpu_derivative.pointwise_gradient(grad, input, matrix, *needed)
        shapes = (input.shape, weight.shape, (weight.shape[0],))
        return tuple(
            g.reshape(shape) if need else None for g, shape, need in zip(grads, shapes, needed, strict=True)
        )


def dense_conv(input: Tensor, weight: Tensor, bias: Tensor | None, padding: list[int]) -> Tensor:
    """A dense convolution at stride 1, on our kernels where they measured faster than torch's; as `pointwise_conv`."""
    input, weight, bias = _as_autocast_would(input, weight, bias)
    with torch.autocast("cpu", enabled=False):
        return _dense(input, weight, bias, padding)


def _dense(input: Tensor, weight: Tensor, bias: Tensor | None, padding: list[int]) -> Tensor:
    if weight.dtype == input.dtype and dense_kernels(input, weight, padding):
        return _DenseConv.apply(input, weight, bias, padding)
    conv = F.conv2d if input.dim() == 4 else F.conv3d
    return conv(input, weight, bias, padding=padding)


class _DenseConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, weight, bias, padding):
        ctx.save_for_backward(input, weight)
        ctx.padding = padding
        return cpu_derivative.dense(input, weight, bias, padding)

    @staticmethod
    def backward(ctx, grad):
        input, weight = ctx.saved_tensors
        needed = list(ctx.needs_input_grad[:3])
        if torch.is_grad_enabled():
            # To be differentiated again.
            ones, zeros = [1] * len(ctx.padding), [0] * len(ctx.padding)
            grads = torch.ops.aten.convolution_backward(
                grad, input, weight, weight.shape[:1], ones, ctx.padding, ones, False, zeros, 1, needed
            )
        else:
            grads = cpu_derivative.dense_gradient(grad, input, weight, ctx.padding, *needed)
        return *(g if need else None for g, need in zip(grads, needed, strict=True)), None


def tucker_conv_transpose(
    input: Tensor, u_in, core, u_out, bias, stride, padding, output_padding, dilation
) -> Tensor:
    """The forward of TuckerConvTranspose2d and 3d, its outer stages by `pointwise_conv`."""
    transposed = F.conv_transpose2d if input.dim() == 4 else F.conv_transpose3d
    t = pointwise_conv(input, u_in, None)
    z = transposed(t, core, None, stride, padding, output_padding, dilation=dilation)
    return pointwise_conv(z, u_out, bias)
