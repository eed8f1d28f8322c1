"""What decomposition and spectrum share: a checked float64 view of a kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from tucker_ops.errors import ConversionError, DtypeError, ShapeError

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def as_out_in_taps(weight: Tensor, transposed: bool) -> Tensor:
    """The kernel as float64 [C_out, C_in, taps] on the CPU.

    weight is [C_out, C_in, *kernel], or [C_in, C_out, *kernel] if `transposed`. Raises ShapeError for fewer
    than two dimensions or an empty kernel, DtypeError for anything but a real floating dtype, ConversionError
    for weights on the meta device or with NaN or infinity in them.
    """
    if weight.dtype not in _DTYPES:
        names = ", ".join(str(d).removeprefix("torch.") for d in _DTYPES)
        raise DtypeError(f"kernel dtype {weight.dtype} cannot be decomposed; convert it to one of {names}")
    if weight.ndim < 2 or weight.numel() == 0:
        raise ShapeError(
            f"a kernel must be [C_out, C_in, *kernel] and hold weights, got shape {tuple(weight.shape)}"
        )
    if weight.is_meta:
        raise ConversionError("the kernel is on the meta device and holds no values; load the weights first")
    kernel = weight.detach().to(device="cpu", dtype=torch.float64).flatten(2)
    if weight.ndim == 2:
        kernel = kernel.unsqueeze(-1)
    bad = int((~torch.isfinite(kernel)).sum())
    if bad:
        raise ConversionError(
            f"the kernel holds {bad} NaN or infinite values of {kernel.numel()}; "
            "such weights cannot be decomposed, check the checkpoint they came from"
        )
    return kernel.transpose(0, 1) if transposed else kernel
