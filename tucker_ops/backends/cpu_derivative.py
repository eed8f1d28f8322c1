"""The gradients of `tucker_conv` and of dense convolutions on the CPU, through the compiled kernels.

Intermediates are channels-last, whatever the input's layout. The outer stages and their gradients are products at every
voxel. The core's forward and, at stride 1, its gradient, which is a convolution with the flipped core, run in the
one-pass kernels (Winograd where that applies), the gradient of its weights in a kernel of its own or, where that
measured faster, in oneDNN; the core's gradient at a stride is oneDNN's. A dense convolution is a core with nothing
around it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tucker_ops.backends import native
from tucker_ops.ops.block import block_memory_format
from tucker_ops.ops.reference import memory_format

# Where our kernel for the core's weights measured as fast as oneDNN's or faster: output voxels in a row, R_in · R_out.
# In 2D, and in 3D with AVX-512; with AVX2 everywhere in 3D.
LONG_ROW_2D, FEW_PAIRS_2D = 64, 2048
LONG_ROW_AVX512, FEW_PAIRS_AVX512 = 32, 1024
# Of dense kernels, which have more channels: voxels in a row, and channels of either side.
LONG_ROW_DENSE, FEWEST_CHANNELS_DENSE = 64, 16
# Channels · depth · height up to which torch computes a single item by its own kernels, on one thread, not by oneDNN's;
# and pairs of channels up to which ours beat those at the weights.
FEW_ELEMENTS, FEW_PAIRS_ALONE = 20480, 128 * 128
# Output voxels of a batch from which on dense forwards and gradients measured faster than oneDNN's.
FEWEST_VOXELS_DENSE = {torch.float32: 2048, torch.bfloat16: 12_000}


def _readable(x: Tensor) -> Tensor:
    """`x` contiguous, or its voxels as rows of channels, evenly spaced; a copy only of what is neither.

    Such rows has a channels-last tensor, and a part of one, as the gradient of a concatenation hands it down.
    """
    axes = [*range(x.dim() - 1, 1, -1), 0]
    stride = next((x.stride(axis) for axis in axes if x.shape[axis] > 1), x.shape[1])
    rows = (x.shape[1] == 1 or x.stride(1) == 1) and stride >= x.shape[1]
    for axis in axes:
        rows = rows and (x.shape[axis] == 1 or x.stride(axis) == stride)
        stride *= x.shape[axis]
    return x if rows else x.contiguous(memory_format=memory_format(x))


def pointwise(x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
    """matrix [A, C] · x [N, C, *spatial] + bias, channels-last."""
    bias = None if bias is None else bias.contiguous()
    return torch.ops.tucker_ops._pointwise_cpu(_readable(x), matrix.contiguous(), bias)


def pointwise_gradient(
    grad: Tensor, x: Tensor, matrix: Tensor, *needed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Of x, matrix and bias, as far as needed."""
    return torch.ops.tucker_ops._pointwise_gradient_cpu(
        _readable(grad), _readable(x), matrix.contiguous(), *needed
    )


def _core(x: Tensor, core: Tensor, stride, padding, dilation, bias: Tensor | None = None) -> Tensor:
    """core ∗ x + bias, channels-last, by the kernels of a fused block without outer stages."""
    none, last = [None], block_memory_format(len(stride), False)
    x = x.contiguous(memory_format=last)
    values, _, _ = torch.ops.tucker_ops._tucker_block_cpu(
        [x],
        none,
        none,
        none,
        [1.0],
        none,
        None,
        core.contiguous(),
        stride,
        padding,
        dilation,
        None,
        None if bias is None else bias.contiguous(),
        "none",
    )
    return values


def _core_gradient(grad: Tensor, t: Tensor, core: Tensor, stride, padding, dilation) -> Tensor:
    ones = [1] * len(stride)
    spread = [d * (k - 1) - p for d, k, p in zip(dilation, core.shape[2:], padding, strict=True)]
    if list(stride) == ones and min(spread) >= 0:
        flipped = core.transpose(0, 1).flip(list(range(2, core.dim())))
        return _core(grad, flipped, ones, spread, dilation)
    return torch.ops.aten.convolution_backward(
        grad, t, core, None, stride, padding, dilation, False, [0] * len(stride), 1, [True, False, False]
    )[0]


def onednn_errs(kernel, stride, dilation, size) -> bool:
    """Is this a convolution of whose weights torch 2.13's oneDNN computes a wrong gradient, or writes past its memory?

    With AVX-512 it does where a kernel reaches further than the input, and for one tap at a stride.
    """
    reaches = any(d * (k - 1) + 1 > n for k, d, n in zip(kernel, dilation, size, strict=True))
    return reaches or (math.prod(kernel) == 1 and max(stride) > 1)


def _ours_is_faster(grad: Tensor, t: Tensor) -> bool:
    row, pairs = grad.shape[-1], grad.shape[1] * t.shape[1]
    if t.dim() == 4:
        return row >= LONG_ROW_2D or pairs <= FEW_PAIRS_2D
    if not native.isa().startswith(("avx512", "amx")):
        return True
    return _torch_is_slow(t) or row >= LONG_ROW_AVX512 or pairs <= FEW_PAIRS_AVX512


def _torch_is_slow(x: Tensor) -> bool:
    """Is this a float32 volume that torch does not hand to oneDNN, but computes itself, on one thread?"""
    single = x.dim() == 5 and x.dtype == torch.float32 and x.shape[0] == 1
    return single and math.prod(x.shape[1:4]) <= FEW_ELEMENTS


def _core_weights(
    grad: Tensor, t: Tensor, core: Tensor, stride, padding, dilation, *, ours: bool | None = None
) -> Tensor:
    """Of the core; `ours` says whose kernel is faster, where the measurements of cores do not."""
    kernel, last = list(core.shape[2:]), block_memory_format(len(stride), False)
    ours = grad.dtype == torch.float32 and (_ours_is_faster(grad, t) if ours is None else ours)
    if ours or onednn_errs(kernel, stride, dilation, t.shape[2:]):
        grad, t = (x.float().contiguous(memory_format=last) for x in (grad, t))
        return torch.ops.tucker_ops._core_gradient_cpu(grad, t, kernel, stride, padding, dilation)
    core, zeros = core.contiguous(memory_format=last), [0] * len(stride)
    return torch.ops.aten.convolution_backward(
        grad, t, core, None, stride, padding, dilation, False, zeros, 1, [False, True, False]
    )[1]


def dense_is_faster(x: Tensor, weight: Tensor, padding) -> bool:
    """Does a dense convolution of x [N, C, *spatial] at stride 1, with 3×3 taps in the plane, take less time here?"""
    size = [n + 2 * p - k + 1 for n, p, k in zip(x.shape[2:], padding, weight.shape[2:], strict=True)]
    voxels = x.shape[0] * math.prod(size)
    if min(size) < 1 or voxels < 1:
        return False
    ones = [1] * len(size)
    return (
        voxels >= FEWEST_VOXELS_DENSE[x.dtype]
        or _torch_is_slow(x)
        or onednn_errs(weight.shape[2:], ones, ones, x.shape[2:])
    )


def dense(x: Tensor, weight: Tensor, bias: Tensor | None, padding) -> Tensor:
    """weight ∗ x + bias at stride 1, channels-last."""
    ones = [1] * len(padding)
    return _core(x, weight, ones, padding, ones, bias)


def dense_gradient(
    grad: Tensor, x: Tensor, weight: Tensor, padding, *needed: bool
) -> tuple[Tensor | None, ...]:
    """Of x, weight and bias, as far as needed."""
    need_x, need_weight, need_bias = needed
    ones = [1] * len(padding)
    of_x = _core_gradient(grad, x, weight, ones, padding, ones) if need_x else None
    of_weight = None
    if need_weight:
        channels = weight.shape[:2]
        long = grad.shape[-1] >= LONG_ROW_DENSE and min(channels) >= FEWEST_CHANNELS_DENSE
        alone = _torch_is_slow(x) and math.prod(channels) <= FEW_PAIRS_ALONE
        of_weight = _core_weights(grad, x, weight, ones, padding, ones, ours=long or alone)
    return of_x, of_weight, grad.sum((0, *range(2, grad.dim()))) if need_bias else None


def _wide(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """bf16 in float32, where the processor does not multiply bf16: torch would take a hundred times as long."""
    if native.multiplies_bfloat16():
        return tensors
    return tuple(None if t is None else t.float() for t in tensors)


def stages(input, u_in, core, u_out, bias, stride, padding, dilation) -> tuple[Tensor, Tensor, Tensor]:
    dtype, layout = input.dtype, memory_format(input)
    x, u_in, core, u_out, bias = _wide(input, u_in, core, u_out, bias)
    t = pointwise(x, u_in)
    z = _core(t, core, stride, padding, dilation)
    values = pointwise(z, u_out, bias).to(dtype)
    return values.contiguous(memory_format=layout), t.to(dtype), z.to(dtype)


def run(
    grad, input, u_in, core, u_out, stride, padding, dilation, mask, t=None, z=None
) -> tuple[Tensor | None, ...]:
    dtype = input.dtype
    need_input, need_in, need_core, need_out, need_bias = mask
    below_core = need_input or need_in
    grad, input, u_in, core, u_out, t, z = _wide(grad, input, u_in, core, u_out, t, z)
    grads: list[Tensor | None] = [None] * 5
    if (need_core or need_out) and t is None:
        t = pointwise(input, u_in)
    if need_out and z is None:
        z = _core(t, core, stride, padding, dilation)
    below = need_core or below_core
    if need_out:
        grad_z, grads[3], grads[4] = pointwise_gradient(grad, z, u_out, below, need_out, need_bias)
    else:
        grad_z = pointwise(grad, u_out.T) if below else None
        grads[4] = grad.sum((0, *range(2, grad.dim()))) if need_bias else None
    if need_core:
        grads[2] = _core_weights(grad_z, t, core, stride, padding, dilation)
    if below_core:
        like = grad_z.new_empty(1).expand(grad.shape[0], core.shape[1], *input.shape[2:]) if t is None else t
        grad_t = _core_gradient(grad_z, like, core, stride, padding, dilation)
        if need_in:
            grads[0], grads[1], _ = pointwise_gradient(grad_t, input, u_in, need_input, need_in, False)
        else:
            grads[0] = pointwise(grad_t, u_in.T)
    return tuple(None if value is None else value.to(dtype) for value in grads)
