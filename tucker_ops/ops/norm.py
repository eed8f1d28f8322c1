"""Schema, fake and reference of `tucker_ops::norm_affine`: what InstanceNorm multiplies by and adds, from statistics.

scale = weight / sqrt(max(m2, 0) / count + eps), shift = bias - mean · scale; mean and m2 [N, C] in float32 or float64,
weight and bias [C] of any floating dtype, or None for 1 and 0. Variance divides by count, as torch's norm does.
Inference only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tucker_ops.errors import DeviceError, DtypeError, ShapeError
from tucker_ops.ops.block import no_backward
from tucker_ops.ops.schema import LIBRARY

_TENSORS = "Tensor mean, Tensor m2, Tensor? weight, Tensor? bias"

for _name, _count in (("norm_affine", "SymInt"), ("_norm_affine_cuda", "int")):
    LIBRARY.define(
        f"{_name}({_TENSORS}, {_count} count, float eps) -> (Tensor scale, Tensor shift)",
        tags=(torch.Tag.pt2_compliant_tag,),
    )


def check_norm(mean: Tensor, m2: Tensor, weight: Tensor | None, bias: Tensor | None, count: int) -> None:
    """ShapeError, DtypeError or DeviceError unless the arguments fit together."""
    if mean.dim() != 2 or m2.shape != mean.shape or count < 1:
        raise ShapeError(
            f"mean and m2 must be [N, C] of at least one value each, got {tuple(mean.shape)}, {tuple(m2.shape)} and "
            f"count {count}"
        )
    if any(t is not None and tuple(t.shape) != (mean.shape[1],) for t in (weight, bias)):
        raise ShapeError(f"weight and bias must be [C] = [{mean.shape[1]}]")
    if mean.dtype not in (torch.float32, torch.float64) or m2.dtype != mean.dtype:
        raise DtypeError(f"mean and m2 must both be float32 or float64, got {mean.dtype} and {m2.dtype}")
    if any(t is not None and t.device != mean.device for t in (m2, weight, bias)):
        raise DeviceError("all tensors must be on one device: move them with .to(device)")


def norm_affine(
    mean: Tensor, m2: Tensor, weight: Tensor | None, bias: Tensor | None, count: int, eps: float
) -> tuple[Tensor, Tensor]:
    """What the op means, in torch operations."""
    check_norm(mean, m2, weight, bias, count)
    scale = torch.rsqrt((m2 / count).clamp_min(0) + eps)
    if weight is not None:
        scale = scale * weight.to(scale.dtype)
    shift = -mean * scale
    return scale, shift if bias is None else shift + bias.to(shift.dtype)


def _empty(mean, m2, weight, bias, count, eps):
    check_norm(mean, m2, weight, bias, count)
    return torch.empty_like(mean), torch.empty_like(mean)


torch.library.register_fake("tucker_ops::norm_affine", _empty, lib=LIBRARY)
torch.library.register_fake("tucker_ops::_norm_affine_cuda", _empty, lib=LIBRARY)
torch.library.register_autograd("tucker_ops::norm_affine", no_backward, lib=LIBRARY)
