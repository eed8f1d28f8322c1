"""Schemas, fakes, autograd and autocast of `tucker_ops::tucker_conv`.

The schema lives in Python so that a missing compiled extension costs speed and nothing else. The
public op is one opaque node for torch.compile and torch.export; each compiled backend is a private
op of its own, which a package that runs without Python can pin.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import Library

from tucker_ops.ops.check import problem_of
from tucker_ops.ops.reference import memory_format

LIBRARY = Library("tucker_ops", "DEF")

_TENSORS = "Tensor input, Tensor u_in, Tensor core, Tensor u_out"

LIBRARY.define(
    f"tucker_conv({_TENSORS}, Tensor? bias=None, SymInt[] stride=[1], SymInt[] padding=[0], SymInt[] dilation=[1], "
    "*, str? backend=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
LIBRARY.define(
    f"_tucker_conv_cpu({_TENSORS}, Tensor? bias, int[] stride, int[] padding, int[] dilation) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)

# `device`: capability such as 90, multiprocessors, bytes of shared memory of a block and of a multiprocessor. `choice`:
# empty, or 1 where TF32 will do for float32 and 0 where not; after it 0 for the stages one by one, 1 for the one-pass
# kernel or an error, 2 for it where it can, and after that its form and how many output planes a block makes.
CUDA_ARGUMENTS = "int[] device, int[] choice"
LIBRARY.define(
    f"_tucker_conv_cuda({_TENSORS}, Tensor? bias, int[] stride, int[] padding, int[] dilation, {CUDA_ARGUMENTS}) "
    "-> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _empty_output(input, u_in, core, u_out, bias, stride, padding, dilation) -> Tensor:
    problem = problem_of(input, u_in, core, u_out, bias, stride, padding, dilation)
    size = (problem.batch, problem.out_channels, *problem.output_size)
    return torch.empty(size, dtype=input.dtype, device=input.device, memory_format=memory_format(input))


@torch.library.register_fake("tucker_ops::tucker_conv", lib=LIBRARY)
def _(input, u_in, core, u_out, bias=None, stride=(1,), padding=(0,), dilation=(1,), *, backend=None):
    return _empty_output(input, u_in, core, u_out, bias, stride, padding, dilation)


@torch.library.register_fake("tucker_ops::_tucker_conv_cpu", lib=LIBRARY)
def _(input, u_in, core, u_out, bias, stride, padding, dilation):
    return _empty_output(input, u_in, core, u_out, bias, stride, padding, dilation)


@torch.library.register_fake("tucker_ops::_tucker_conv_cuda", lib=LIBRARY)
def _(input, u_in, core, u_out, bias, stride, padding, dilation, device, choice):
    problem = problem_of(input, u_in, core, u_out, bias, stride, padding, dilation)
    size = (problem.batch, problem.out_channels, *problem.output_size)
    layout = torch.channels_last if problem.ndim == 2 else torch.channels_last_3d
    return torch.empty(size, dtype=input.dtype, device=input.device, memory_format=layout)


def _setup_context(ctx, inputs, keyword_only_inputs, output):
    input, u_in, core, u_out, _bias, stride, padding, dilation = inputs
    ctx.save_for_backward(input, u_in, core, u_out)
    ctx.geometry = (list(stride), list(padding), list(dilation))


def _backward(ctx, grad):
    """Chain rule through the three convolutions; t and z are recomputed, so only the inputs are kept.

    Written in differentiable torch operations, so that double backward works as well.
    """
    input, u_in, core, u_out = ctx.saved_tensors
    ndim = core.dim() - 2
    stride, padding, dilation = (v * ndim if len(v) == 1 else v for v in ctx.geometry)
    ones, zeros = [1] * ndim, [0] * ndim
    w_in = u_in.reshape(*u_in.shape, *ones)
    w_out = u_out.reshape(*u_out.shape, *ones)
    need_input, need_in, need_core, need_out, need_bias = ctx.needs_input_grad[:5]

    def conv(x, weight, stride=ones, padding=zeros, dilation=ones):
        return torch.ops.aten.convolution(x, weight, None, stride, padding, dilation, False, zeros, 1)

    def conv_backward(grad, x, weight, mask, stride=ones, padding=zeros, dilation=ones):
        return torch.ops.aten.convolution_backward(
            grad, x, weight, None, stride, padding, dilation, False, zeros, 1, [*mask, False]
        )[:2]

    grad_bias = grad.sum((0, *range(2, ndim + 2))) if need_bias else None
    grad_input = grad_in = grad_core = grad_out = None
    below_core = need_input or need_in
    t = conv(input, w_in) if need_core or need_out or below_core else None
    if need_out or need_core or below_core:
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
        None,
        None,
        None,
    )


torch.library.register_autograd(
    "tucker_ops::tucker_conv", _backward, setup_context=_setup_context, lib=LIBRARY
)


def _register_autocast(device_type: str, key: str) -> None:
    # torch.library.register_autocast fixes one dtype at registration; autocast's dtype is the user's choice.
    exclude = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        eligible = tensor is not None and tensor.is_floating_point() and tensor.dtype != torch.float64
        return tensor.to(dtype) if eligible and tensor.device.type == device_type else tensor

    def kernel(
        input, u_in, core, u_out, bias=None, stride=(1,), padding=(0,), dilation=(1,), *, backend=None
    ):
        dtype = torch.get_autocast_dtype(device_type)
        tensors = [cast(t, dtype) for t in (input, u_in, core, u_out, bias)]
        with torch._C._ExcludeDispatchKeyGuard(exclude):
            return torch.ops.tucker_ops.tucker_conv(*tensors, stride, padding, dilation, backend=backend)

    LIBRARY.impl("tucker_conv", kernel, key)


_register_autocast("cpu", "AutocastCPU")
_register_autocast("cuda", "AutocastCUDA")
