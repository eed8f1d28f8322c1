"""Reference: the three convolutions, written as three convolutions.

Every fast path is tested against this function in float64. It is also the `reference` backend.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def three_convs(
    input: Tensor,
    u_in: Tensor,
    core: Tensor,
    u_out: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> Tensor:
    """conv(1, u_in), then conv(kernel, core, stride, padding, dilation), then conv(1, u_out) + bias.

    input [N, C_in, *spatial], u_in [R_in, C_in], core [R_out, R_in, *kernel], u_out [C_out, R_out],
    bias [C_out] or None; any floating dtype and device that torch convolves. Returns
    [N, C_out, *output]. Formula: Tucker-2 of the kernel, Kim et al. 2016 (arXiv 1511.06530), eq. 4-6.
    """
    ndim = core.dim() - 2
    conv = F.conv2d if ndim == 2 else F.conv3d
    t = conv(input, u_in.reshape(*u_in.shape, *(1,) * ndim))
    z = conv(t, core, None, stride, padding, dilation)
    return conv(z, u_out.reshape(*u_out.shape, *(1,) * ndim), bias)


def memory_format(tensor: Tensor) -> torch.memory_format:
    """The layout that the op's output takes from its input: channels-last if the input is, else contiguous."""
    channels_last = torch.channels_last if tensor.dim() == 4 else torch.channels_last_3d
    if not tensor.is_contiguous() and tensor.is_contiguous(memory_format=channels_last):
        return channels_last
    return torch.contiguous_format
