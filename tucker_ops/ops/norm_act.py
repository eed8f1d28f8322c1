"""`tucker_ops::norm_act`: InstanceNorm and LeakyReLU as one op, for training; schema, fake, autograd and reference.

y = LeakyReLU(weight · (x - mean) · rstd + bias, slope), statistics over the voxels of each item and channel, the
variance divided by their number as torch's norm does (Ulyanov et al. 2016, arXiv 1607.08022). x [N, C, *spatial];
weight, bias [C] or None for 1 and 0; slope 1 for no activation. Returns y, mean and rstd = 1 / sqrt(variance + eps),
[N, C] in fp32 (fp64 for x in fp64). Kept for backward are x, mean and rstd.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from tucker_ops.errors import DeviceError, DtypeError, ShapeError
from tucker_ops.ops.check import DTYPES, check_tensors
from tucker_ops.ops.gradient import differentiate
from tucker_ops.ops.reference import memory_format
from tucker_ops.ops.schema import LIBRARY

_AFFINE = "Tensor? weight, Tensor? bias"

LIBRARY.define(
    f"norm_act(Tensor input, {_AFFINE}, float eps, float slope) -> (Tensor values, Tensor mean, Tensor rstd)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
LIBRARY.define(
    f"norm_act_backward(Tensor grad, Tensor input, Tensor mean, Tensor rstd, {_AFFINE}, float eps, float slope, "
    "bool[] output_mask) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
LIBRARY.define(
    f"_norm_act_cpu(Tensor input, {_AFFINE}, float eps, float slope) -> (Tensor values, Tensor mean, Tensor rstd)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
LIBRARY.define(
    f"_norm_act_again_cpu(Tensor input, Tensor mean, Tensor rstd, {_AFFINE}, float slope) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
LIBRARY.define(
    f"_norm_act_backward_cpu(Tensor grad, Tensor input, Tensor mean, Tensor rstd, {_AFFINE}, float slope, "
    "bool need_input) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of statistics: float64 stays, all else is float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_norm_act(input: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    """ShapeError, DtypeError or DeviceError unless the arguments fit together."""
    given = {"weight": weight, "bias": bias}
    given = {name: tensor for name, tensor in given.items() if tensor is not None}
    check_tensors(input=input, **given)
    if input.dim() not in (4, 5):
        raise ShapeError(f"input must be [N, C, *spatial] with 2 or 3 spatial axes, got {tuple(input.shape)}")
    if input.dtype not in DTYPES:
        raise DtypeError(
            f"dtype {input.dtype} is not computed; use one of {[str(dtype) for dtype in DTYPES]}"
        )
    if math.prod(input.shape[2:]) < 2:
        raise ShapeError(
            f"a norm over voxels takes more than 1 spatial element, as torch's does; got shape {tuple(input.shape)}"
        )
    for name, tensor in given.items():
        if tuple(tensor.shape) != (input.shape[1],):
            raise ShapeError(
                f"{name} must be [C] = [{input.shape[1]}] for this input, got {tuple(tensor.shape)}"
            )
        if not tensor.is_floating_point():
            raise DtypeError(f"{name} must be of a floating dtype, got {tensor.dtype}")
        if tensor.device != input.device:
            raise DeviceError(
                f"{name} is on {tensor.device}, the input on {input.device}: move them with .to(device)"
            )


def reference(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, slope: float
) -> tuple[Tensor, Tensor, Tensor]:
    """What the op means, in differentiable torch operations; values, mean and rstd."""
    wide = wide_dtype(input.dtype)
    x = input.to(wide)
    axes = tuple(range(2, x.dim()))
    variance, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
    rstd = torch.rsqrt(variance + eps)
    values = (x - mean) * rstd
    ones = (1,) * len(axes)
    if weight is not None:
        values = values * weight.to(wide).reshape(-1, *ones)
    if bias is not None:
        values = values + bias.to(wide).reshape(-1, *ones)
    if slope != 1:
        values = F.leaky_relu(values, slope)
    return values.to(input.dtype), mean.flatten(1), rstd.flatten(1)


def reference_backward(
    grad: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    slope: float,
    mask: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of input, weight and bias, None where `mask` says no; differentiable again.

    The statistics are functions of the input here.
    """
    wide = wide_dtype(input.dtype)
    axes = tuple(range(2, input.dim()))
    ones = (1,) * len(axes)
    x = input.to(wide)
    variance, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
    rstd = torch.rsqrt(variance + eps)
    normalised = (x - mean) * rstd
    before = normalised
    if weight is not None:
        before = before * weight.to(wide).reshape(-1, *ones)
    if bias is not None:
        before = before + bias.to(wide).reshape(-1, *ones)
    behind = grad.to(wide)
    if slope != 1:
        behind = torch.where(before > 0, behind, behind * slope)
    every = (0, *axes)
    grad_weight = (behind * normalised).sum(every).to(input.dtype if weight is None else weight.dtype)
    grad_bias = behind.sum(every).to(input.dtype if bias is None else bias.dtype)
    along = behind if weight is None else behind * weight.to(wide).reshape(-1, *ones)
    grad_input = rstd * (
        along - along.mean(axes, keepdim=True) - normalised * (along * normalised).mean(axes, keepdim=True)
    )
    found = (grad_input.to(input.dtype), grad_weight, grad_bias)
    return tuple(value if wanted else None for value, wanted in zip(found, mask, strict=True))


@torch.library.register_fake("tucker_ops::_norm_act_cpu", lib=LIBRARY)
@torch.library.register_fake("tucker_ops::norm_act", lib=LIBRARY)
def _(input, weight, bias, eps, slope):
    check_norm_act(input, weight, bias)
    values = torch.empty(
        input.shape, dtype=input.dtype, device=input.device, memory_format=memory_format(input)
    )
    statistics = [input.new_empty(input.shape[:2], dtype=wide_dtype(input.dtype)) for _ in range(2)]
    return values, *statistics


@torch.library.register_fake("tucker_ops::norm_act_backward", lib=LIBRARY)
def _(grad, input, mean, rstd, weight, bias, eps, slope, output_mask):
    check_norm_act(input, weight, bias)
    layout = memory_format(input)
    found = (
        torch.empty(input.shape, dtype=input.dtype, device=input.device, memory_format=layout),
        *(
            input.new_empty(input.shape[1], dtype=input.dtype if t is None else t.dtype)
            for t in (weight, bias)
        ),
    )
    return tuple(
        value if wanted else input.new_empty(0) for value, wanted in zip(found, output_mask, strict=True)
    )


@torch.library.register_fake("tucker_ops::_norm_act_again_cpu", lib=LIBRARY)
def _(input, mean, rstd, weight, bias, slope):
    check_norm_act(input, weight, bias)
    return torch.empty_like(input)


@torch.library.register_fake("tucker_ops::_norm_act_backward_cpu", lib=LIBRARY)
def _(grad, input, mean, rstd, weight, bias, slope, need_input):
    check_norm_act(input, weight, bias)
    grad_input = torch.empty_like(input) if need_input else input.new_empty(0)
    return grad_input, *(input.new_empty(input.shape[1], dtype=torch.float32) for _ in range(2))


def _keep(ctx, inputs, output):
    input, weight, bias, eps, slope = inputs
    _values, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(input, mean, rstd, weight, bias)
    ctx.numbers = (eps, slope)


def _backward(ctx, grad, *_):
    mask = list(ctx.needs_input_grad[:3])
    grads = torch.ops.tucker_ops.norm_act_backward(grad, *ctx.saved_tensors, *ctx.numbers, mask)
    return *(g if wanted else None for g, wanted in zip(grads, mask, strict=True)), None, None


torch.library.register_autograd("tucker_ops::norm_act", _backward, setup_context=_keep, lib=LIBRARY)


def _keep_for_second(ctx, inputs, output):
    grad, input, _mean, _rstd, weight, bias, eps, slope, mask = inputs
    ctx.save_for_backward(grad, input, weight, bias)
    ctx.numbers = (eps, slope, list(mask))


def _second_backward(ctx, *grads):
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 4, 5)]
    found = differentiate(
        lambda *inputs: reference_backward(*inputs, *ctx.numbers), ctx.saved_tensors, needs, grads
    )
    return found[0], found[1], None, None, found[2], found[3], None, None, None


torch.library.register_autograd(
    "tucker_ops::norm_act_backward", _second_backward, setup_context=_keep_for_second, lib=LIBRARY
)
