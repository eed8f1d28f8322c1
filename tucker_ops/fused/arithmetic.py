"""What a fused network computes beside its blocks: norms from statistics, weights multiplied together."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from tucker_ops.ops.norm import norm_affine
from tucker_ops.ops.reference import memory_format


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def instance_norm_affine(
    values: Tensor, mean: Tensor, m2: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """scale and shift [N, C] that InstanceNorm applies to `values` [N, C, *] of these statistics [N, C].

    Variance is M2 / n, as in torch (biased). Raises torch's own ValueError for a single voxel per channel.
    """
    count = math.prod(values.shape[2:])
    if count == 1:
        F.instance_norm(values)
    if mean.is_cuda:
        # One small kernel for seven: a network has dozens of norms.
        return torch.ops.tucker_ops.norm_affine(mean, m2, weight, bias, count, eps)
    return norm_affine(mean, m2, weight, bias, count, eps)


def rank_norm_affine(
    values: Tensor,
    mean: Tensor,
    m2: Tensor,
    u_out: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """scale and shift [N, C] that InstanceNorm applies to u_out · `values`, from statistics of the values.

    values [N, R, *], mean [N, R], m2 [N, R, R], u_out [C, R]: the expansion is linear, so its mean is u_out · mean and
    its M2 the diagonal of u_out · m2 · u_outᵀ, computed in float64 because directions may cancel.
    """
    u = u_out.double()
    expanded = mean.double() @ u.mT
    deviations = ((u @ m2.double()) * u).sum(2)
    return instance_norm_affine(values, expanded.to(mean.dtype), deviations.to(m2.dtype), weight, bias, eps)


def batch_norm_affine(
    values: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """scale and shift [N, C] that BatchNorm applies at evaluation, from its running statistics [C]."""
    dtype = _wide(values.dtype)
    scale = torch.rsqrt(var.to(dtype) + eps)
    if weight is not None:
        scale = scale * weight.to(dtype)
    shift = -mean.to(dtype) * scale
    if bias is not None:
        shift = shift + bias.to(dtype)
    size = (values.shape[0], scale.shape[0])
    return scale.expand(size).contiguous(), shift.expand(size).contiguous()


def expanded(values: Tensor, u_out: Tensor) -> Tensor:
    """u_out [C, R] times values [N, R, *] of a block in rank space."""
    conv = F.conv2d if values.dim() == 4 else F.conv3d
    return conv(values, u_out.reshape(*u_out.shape, *(1,) * (values.dim() - 2)))


def in_dtype_of(values: Tensor, other: Tensor) -> Tensor:
    """`values` as a block left them, in the dtype of the network's input."""
    return values.to(other.dtype)


def laid_out_like(values: Tensor, input: Tensor) -> Tensor:
    """A result in the layout that torch's own modules would have left it in: channels-last if the input is."""
    return values.contiguous(memory_format=memory_format(input))


def identity(weight: Tensor) -> Tensor:
    """u_in [C, C] of a dense convolution's weight [C_out, C, *kernel]."""
    return torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)


def columns(u_in: Tensor, begin: int, end: int) -> Tensor:
    """The part of u_in [R_in, C] that multiplies channels begin to end of a concatenation."""
    return u_in[:, begin:end].contiguous()


def tucker_weight(u_in: Tensor, core: Tensor, u_out: Tensor) -> Tensor:
    """The kernel [C_in, C_out, *kernel] of a factorised transposed convolution."""
    product = torch.einsum("si,sr...,or->io...", *(t.to(_wide(t.dtype)) for t in (u_in, core, u_out)))
    return product.to(core.dtype)


def upsampling(u_in: Tensor | None, begin: int, end: int, weight: Tensor) -> Tensor:
    """u_in [R_in, C] times a transposed convolution [C_below, C_up, *s] whose output is channels begin to end.

    Returns [*s, R_in, C_below], one matrix for every position within the stride; [*s, C_up, C_below] without u_in.
    """
    if u_in is None:
        return weight.movedim((0, 1), (-1, -2)).contiguous()
    dtype = _wide(weight.dtype)
    part = u_in[:, begin:end].to(dtype)
    product = torch.einsum("ru,cus->src", part, weight.to(dtype).flatten(2)).to(weight.dtype)
    return product.reshape(*weight.shape[2:], *product.shape[1:]).contiguous()


def carried_bias(
    u_in: Tensor | None, begin: int, end: int, channels: int, bias: Tensor, before: Tensor | None
) -> Tensor:
    """The bias [end - begin] of a transposed convolution behind u_in [R_in, channels], added to `before`.

    Returns [R_in]; without u_in [channels].
    """
    if u_in is None:
        carried = F.pad(bias, (begin, channels - end))
    else:
        carried = (u_in[:, begin:end].to(_wide(bias.dtype)) @ bias.to(_wide(bias.dtype))).to(bias.dtype)
    return carried if before is None else before + carried


class Remembered:
    """A product of weights, kept until one of them changes.

    Whether they have is asked of their values, not of version counters, which miss changes through ``.data``. One
    object serves one place in one network. Safe to call from several threads. On a GPU nothing is remembered: to ask
    would make the host wait for it, and could not be captured in a graph.
    """

    def __init__(self, function: Callable[..., Tensor]):
        self.function = function
        self.__name__ = self.__qualname__ = function.__name__
        self.__module__ = function.__module__
        self._last: tuple[tuple, Tensor] | None = None

    def __call__(self, *args) -> Tensor:
        if torch.compiler.is_compiling() or any(isinstance(a, Tensor) and a.is_cuda for a in args):
            return self.function(*args)
        known = self._last
        if known is not None and all(map(_same, known[0], args)):
            return known[1]
        result = self.function(*args)
        self._last = (tuple(a.clone() if isinstance(a, Tensor) else a for a in args), result)
        return result


def _same(a: object, b: object) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
    return a is b or (not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b)
