"""Schemas, fakes and autograd of the gradient of `tucker_conv`, and of the forward that keeps what it needs.

`tucker_conv_backward` takes the gradient of the output and returns those of input, u_in, core, u_out and bias; one that
`output_mask` leaves out is an empty tensor. t = u_in · input and z = core ∗ t are computed again unless they are given.
`tucker_conv_stages` is `tucker_conv` that returns them too, channels-last, for users who would rather keep them.
`tucker_ops.ops.reference` says what both mean; a second derivative is always the reference's.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tucker_ops.errors import ConfigError, DeviceError, DtypeError, ShapeError
from tucker_ops.ops.block import block_memory_format
from tucker_ops.ops.check import problem_of
from tucker_ops.ops.reference import memory_format, three_convs_backward
from tucker_ops.ops.schema import LIBRARY, register_autocast
from tucker_ops.types import Problem

KEEP_VARIABLE = "TUCKER_KEEP_STAGES"
NAMES = ("input", "u_in", "core", "u_out", "bias")

_TENSORS = "Tensor input, Tensor u_in, Tensor core, Tensor u_out"
_GEOMETRY = "SymInt[] stride, SymInt[] padding, SymInt[] dilation"

LIBRARY.define(
    f"tucker_conv_backward(Tensor grad, {_TENSORS}, {_GEOMETRY}, bool[] output_mask, Tensor? t=None, Tensor? z=None, "
    "*, str? backend=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
LIBRARY.define(
    f"tucker_conv_stages({_TENSORS}, Tensor? bias, {_GEOMETRY}, *, str? backend=None) "
    "-> (Tensor values, Tensor t, Tensor z)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


# The core's part alone, float32, channels-last: grad [N, R_out, *output], t [N, R_in, *spatial].
LIBRARY.define(
    "_core_gradient_cpu(Tensor grad, Tensor t, int[] kernel, int[] stride, int[] padding, int[] dilation) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)

# matrix · x + bias at every voxel, channels-last, and its gradient: float32 and bfloat16; x and grad [N, C, *spatial],
# contiguous or channels-last; matrix [A, C]. The gradient of x comes in the layout of x; what is not needed is empty.
LIBRARY.define(
    "_pointwise_cpu(Tensor x, Tensor matrix, Tensor? bias=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
LIBRARY.define(
    "_pointwise_gradient_cpu(Tensor grad, Tensor x, Tensor matrix, bool need_x, bool need_matrix, bool need_bias) "
    "-> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)

register_autocast("tucker_conv_stages")


def gradient_problem_of(
    grad: Tensor, input: Tensor, u_in, core, u_out, stride, padding, dilation, output_mask, t, z
) -> Problem:
    """The forward's `Problem`; raises as `problem_of`, and where grad, t, z or output_mask do not fit to it."""
    problem = problem_of(input, u_in, core, u_out, None, stride, padding, dilation)
    if len(output_mask) != len(NAMES):
        raise ShapeError(
            f"output_mask must have {len(NAMES)} entries, one for each of {NAMES}, got {len(output_mask)}"
        )
    given = {
        "grad": (grad, problem.out_channels, problem.output_size),
        "t": (t, problem.rank_in, problem.input_size),
        "z": (z, problem.rank_out, problem.output_size),
    }
    for name, (tensor, channels, size) in given.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != (problem.batch, channels, *size):
            raise ShapeError(
                f"{name} must be {[problem.batch, channels, *size]} for this input, got {list(tensor.shape)}"
            )
        if tensor.dtype != input.dtype:
            raise DtypeError(f"{name} must be {input.dtype} as the input is, got {tensor.dtype}")
        if tensor.device != input.device:
            raise DeviceError(f"{name} is on {tensor.device}, the input on {input.device}")
    return problem


def keeps_stages() -> bool:
    """Does the forward keep t and z for the backward (TUCKER_KEEP_STAGES=1), or are they computed again (0, unset)?"""
    value = os.environ.get(KEEP_VARIABLE) or "0"
    if value not in ("0", "1"):
        raise ConfigError(
            f"{KEEP_VARIABLE} is {value!r}: set it to 1 to keep the intermediates of tucker_conv for its gradient, or "
            "to 0 to compute them again"
        )
    return value == "1"


@torch.library.register_fake("tucker_ops::tucker_conv_backward", lib=LIBRARY)
def _(
    grad,
    input,
    u_in,
    core,
    u_out,
    stride,
    padding,
    dilation,
    output_mask,
    t=None,
    z=None,
    *,
    backend=None,
):
    gradient_problem_of(grad, input, u_in, core, u_out, stride, padding, dilation, output_mask, t, z)
    like = (
        torch.empty(input.shape, dtype=input.dtype, device=input.device, memory_format=memory_format(input)),
        *(torch.empty(w.shape, dtype=w.dtype, device=w.device) for w in (u_in, core, u_out)),
        u_out.new_empty(u_out.shape[0]),
    )
    return tuple(
        tensor if wanted else input.new_empty(0) for tensor, wanted in zip(like, output_mask, strict=True)
    )


@torch.library.register_fake("tucker_ops::tucker_conv_stages", lib=LIBRARY)
def _(input, u_in, core, u_out, bias, stride, padding, dilation, *, backend=None):
    problem = problem_of(input, u_in, core, u_out, bias, stride, padding, dilation)
    last = block_memory_format(problem.ndim, False)

    def empty(channels, size, layout):
        shape = (problem.batch, channels, *size)
        return torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=layout)

    return (
        empty(problem.out_channels, problem.output_size, memory_format(input)),
        empty(problem.rank_in, problem.input_size, last),
        empty(problem.rank_out, problem.output_size, last),
    )


@torch.library.register_fake("tucker_ops::_core_gradient_cpu", lib=LIBRARY)
def _(grad, t, kernel, stride, padding, dilation):
    return t.new_empty(grad.shape[1], t.shape[1], *kernel)


@torch.library.register_fake("tucker_ops::_pointwise_cpu", lib=LIBRARY)
def _(x, matrix, bias=None):
    last = block_memory_format(x.dim() - 2, False)
    size = (x.shape[0], matrix.shape[0], *x.shape[2:])
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=last)


@torch.library.register_fake("tucker_ops::_pointwise_gradient_cpu", lib=LIBRARY)
def _(grad, x, matrix, need_x, need_matrix, need_bias):
    like = (
        torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x)),
        matrix.new_empty(matrix.shape),
        matrix.new_empty(matrix.shape[0]),
    )
    return tuple(
        tensor if needed else x.new_empty(0)
        for tensor, needed in zip(like, (need_x, need_matrix, need_bias), strict=True)
    )


def _backward(ctx, grad, *_):
    """The chain rule as one op. What is kept are the inputs, and t and z where the forward made them."""
    mask = list(ctx.needs_input_grad[:5])
    grads = torch.ops.tucker_ops.tucker_conv_backward(
        grad, *ctx.saved_tensors[:4], *ctx.geometry, mask, *ctx.saved_tensors[4:], backend=ctx.backend
    )
    return *(g if wanted else None for g, wanted in zip(grads, mask, strict=True)), None, None, None


def _keep_inputs(ctx, inputs, keyword_only_inputs, output):
    input, u_in, core, u_out, _bias, stride, padding, dilation = inputs
    ctx.save_for_backward(input, u_in, core, u_out)
    ctx.geometry = (list(stride), list(padding), list(dilation))
    ctx.backend = keyword_only_inputs.get("backend")


def _keep_stages(ctx, inputs, keyword_only_inputs, output):
    _keep_inputs(ctx, inputs, keyword_only_inputs, output)
    _values, t, z = output
    ctx.mark_non_differentiable(t, z)
    ctx.save_for_backward(*inputs[:4], t, z)


torch.library.register_autograd("tucker_ops::tucker_conv", _backward, setup_context=_keep_inputs, lib=LIBRARY)
torch.library.register_autograd(
    "tucker_ops::tucker_conv_stages", _backward, setup_context=_keep_stages, lib=LIBRARY
)


def _keep_for_second(ctx, inputs, keyword_only_inputs, output):
    ctx.save_for_backward(*inputs[:5])
    ctx.call = [list(values) for values in inputs[5:9]]


def differentiate(
    function: Callable[..., Sequence[Tensor | None]],
    inputs: Sequence[Tensor | None],
    needs: Sequence[bool],
    grads: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Gradients of `function`'s outputs, weighted by `grads`, of the inputs that `needs` names, else None."""
    wanted = [i for i, needed in enumerate(needs) if needed]
    with torch.enable_grad():
        inputs = [None if tensor is None else tensor.detach().requires_grad_() for tensor in inputs]
        pairs = [
            (value, grad)
            for value, grad in zip(function(*inputs), grads, strict=True)
            if value is not None and grad is not None and value.requires_grad
        ]
        found = torch.autograd.grad(
            [value for value, _ in pairs],
            [inputs[i] for i in wanted],
            [grad for _, grad in pairs],
            allow_unused=True,
        )
    result: list[Tensor | None] = [None] * len(inputs)
    for i, grad in zip(wanted, found, strict=True):
        result[i] = grad
    return result


def _second_backward(ctx, *grads):
    """Differentiates the reference of the gradient; t and z are functions of the inputs there."""
    found = differentiate(
        lambda *inputs: three_convs_backward(*inputs, *ctx.call),
        ctx.saved_tensors,
        ctx.needs_input_grad[:5],
        grads,
    )
    return *found, *[None] * 6


torch.library.register_autograd(
    "tucker_ops::tucker_conv_backward", _second_backward, setup_context=_keep_for_second, lib=LIBRARY
)
