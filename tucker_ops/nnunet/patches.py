"""Patches of a volume as a network sees them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def random_patch(volume: Tensor, size: Sequence[int], generator: torch.Generator) -> Tensor:
    """[C, *size] from anywhere in the volume (a slice of it for a 2D network); zeros around those that are smaller."""
    if len(size) < volume.ndim - 1:
        volume = volume[:, int(torch.randint(volume.shape[1], (), generator=generator))]
    pad = []
    for have, want in zip(reversed(volume.shape[1:]), reversed(size), strict=True):
        missing = max(0, want - have)
        pad += [missing // 2, missing - missing // 2]
    volume = nn.functional.pad(volume, pad)
    corner = [
        int(torch.randint(have - want + 1, (), generator=generator))
        for have, want in zip(volume.shape[1:], size, strict=True)
    ]
    return volume[(slice(None), *(slice(c, c + n) for c, n in zip(corner, size, strict=True)))].contiguous()
