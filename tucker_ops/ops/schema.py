"""Schemas, fakes and autocast of `tucker_ops::tucker_conv`; its derivative is in `tucker_ops.ops.gradient`.

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


def register_autocast(name: str) -> None:
    """Makes op `name`, whose first five arguments are tensors (the last or None), cast them as autocast's user chose.

    torch.library.register_autocast fixes one dtype at registration.
    """
    for device_type, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        LIBRARY.impl(name, _autocast_kernel(name, device_type, key), key)


def _autocast_kernel(name: str, device_type: str, key: str):
    exclude = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        eligible = tensor is not None and tensor.is_floating_point() and tensor.dtype != torch.float64
        return tensor.to(dtype) if eligible and tensor.device.type == device_type else tensor

    def kernel(input, u_in, core, u_out, bias=None, *geometry, backend=None):
        dtype = torch.get_autocast_dtype(device_type)
        tensors = [cast(t, dtype) for t in (input, u_in, core, u_out, bias)]
        with torch._C._ExcludeDispatchKeyGuard(exclude):
            return getattr(torch.ops.tucker_ops, name)(*tensors, *geometry, backend=backend)

    return kernel


register_autocast("tucker_conv")
