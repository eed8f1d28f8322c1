"""Patches of a volume as a network sees them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

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


def mirrorings(axes: Sequence[int] | None) -> list[tuple[int, ...]]:
    """The ways in which nnU-Net's prediction may show a patch to a network: half of them as it is, the others mirrored.

    One each for the mirrorings along `axes` of a batch [N, C, *spatial], in its dimensions, and as many without any,
    because prediction mirrors along all axes or, as it is often asked to, not at all. Just one for no axes.
    """
    dims = [2 + axis for axis in axes or ()]
    mirrored = [chosen for count in range(1, len(dims) + 1) for chosen in combinations(dims, count)]
    return [way for pair in ((way, ()) for way in mirrored) for way in pair] or [()]
