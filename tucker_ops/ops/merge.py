"""Schema, fake and checks of `tucker_ops::tucker_merge`: a residual addition with the norms and activations around it.

out = LeakyReLU(Σ_i LeakyReLU(values_i · scale_i + shift_i, slope_i), out_slope), channels-last; with one tensor, that
tensor with its norm and activation applied. Inference only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tucker_ops.errors import DeviceError, DtypeError, ShapeError
from tucker_ops.ops.block import block_memory_format, no_backward
from tucker_ops.ops.check import DTYPES
from tucker_ops.ops.schema import LIBRARY

_ARGUMENTS = "Tensor[] values, Tensor?[] scale, Tensor?[] shift, float[] slope, float out_slope"

LIBRARY.define(f"tucker_merge({_ARGUMENTS}) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
for _name in ("_tucker_merge_cpu", "_tucker_merge_cuda"):
    LIBRARY.define(f"{_name}({_ARGUMENTS}) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


def check_merge(values, scale, shift, slope, out_slope) -> None:
    """ShapeError, DtypeError or DeviceError unless the arguments fit together."""
    if not values or not len(values) == len(scale) == len(shift) == len(slope):
        raise ShapeError(
            f"tucker_merge needs one or more tensors, and scale, shift and slope for each, got {len(values)}, "
            f"{len(scale)}, {len(shift)} and {len(slope)}"
        )
    first = values[0]
    if first.dim() not in (4, 5) or any(t.dim() != first.dim() for t in values) or _shape_of(values) is None:
        raise ShapeError(
            f"tensors must be [N, C, *spatial] of shapes that broadcast, got {[tuple(t.shape) for t in values]}"
        )
    pending = [t for t in (*scale, *shift) if t is not None]
    for given in (scale, shift):
        for t, value in zip(given, values, strict=True):
            if t is not None and tuple(t.shape) != tuple(value.shape[:2]):
                raise ShapeError(
                    f"scale and shift must be [N, C] = {list(value.shape[:2])} of their tensor, got {list(t.shape)}"
                )
    wide = torch.float64 if first.dtype == torch.float64 else torch.float32
    if first.dtype not in DTYPES or any(t.dtype != first.dtype for t in values):
        raise DtypeError(f"tensors must have one floating dtype, got {[t.dtype for t in values]}")
    if any(t.dtype != wide for t in pending):
        raise DtypeError(
            f"scale and shift must be {wide} for {first.dtype}, got {[t.dtype for t in pending]}"
        )
    if any(t.device != first.device for t in (*values, *pending)):
        raise DeviceError("all tensors must be on one device: move them with .to(device)")


def _shape_of(values) -> torch.Size | None:
    """The shape of their sum; None where they do not broadcast."""
    try:
        return torch.broadcast_shapes(*(t.shape for t in values))
    except RuntimeError:
        return None


def _empty_output(values, scale, shift, slope, out_slope) -> Tensor:
    check_merge(values, scale, shift, slope, out_slope)
    like, layout = values[0], block_memory_format(values[0].dim() - 2, False)
    return torch.empty(_shape_of(values), dtype=like.dtype, device=like.device, memory_format=layout)


torch.library.register_fake("tucker_ops::tucker_merge", _empty_output, lib=LIBRARY)
torch.library.register_fake("tucker_ops::_tucker_merge_cpu", _empty_output, lib=LIBRARY)
torch.library.register_fake("tucker_ops::_tucker_merge_cuda", _empty_output, lib=LIBRARY)
torch.library.register_autograd("tucker_ops::tucker_merge", no_backward, lib=LIBRARY)
