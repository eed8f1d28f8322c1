"""Rank policies: a rule per layer (factor, energy), and one budget shared by all layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from torch import Tensor


def factor_rank(channels: int, factor: float, *, min_rank: int, align: int, rounding: str) -> int:
    """channels·factor to a multiple of `align`, then clamped to [min_rank, channels].

    rounding "nearest" takes ties up; "ceil" goes up always, which with align=1 is the rule of Weber et al.
    (arXiv 2404.09683).
    """
    # Decimal arithmetic: 0.7 * 30 is a little above 21 in binary, and ceil would make 22 of it.
    steps = channels * Fraction(repr(float(factor))) / align
    count = math.ceil(steps) if rounding == "ceil" else math.floor(steps + Fraction(1, 2))
    return min(channels, max(min_rank, count * align))


def energy_rank(share_kept: Tensor, share: float, *, min_rank: int, align: int) -> int:
    """The least multiple of `align` at which `share_kept` [C] reaches `share`, clamped to [min_rank, C]."""
    channels = len(share_kept)
    # Rounding of the cumulative sum must not demand a full rank for a share that all but nothing misses.
    short = int((share_kept < share - 1e-12).sum())
    count = math.ceil(min(channels, short + 1) / align) * align
    return min(channels, max(min_rank, count))


def rank_grid(channels: int, *, min_rank: int, align: int) -> list[int]:
    """Ranks a budget may choose from: multiples of `align` in [min_rank, channels], and both ends."""
    first = min(min_rank, channels)
    steps = range(math.ceil(first / align) * align, channels + 1, align)
    return sorted({first, *steps, channels})


@dataclass(frozen=True)
class Options:
    """What one layer may become: cost and error of each choice, in the unit of the budget.

    ``cost`` and ``error`` are [n], n at least 1. Errors of different layers must be comparable.
    """

    cost: np.ndarray
    error: np.ndarray


def allocate(layers: Sequence[Options], budget: float) -> list[int] | None:
    """Share one budget among layers: the index of the choice of each, or None if the cheapest are too dear.

    Starts from each layer's cheapest choice and, as long as one fits, takes the step that lowers the summed
    error most per unit of cost. Within a layer that walks the lower convex hull of its (cost, error) points,
    which is optimal for every budget the walk stops at exactly (Shoham and Gersho, 1988).
    """
    chosen = [int(np.lexsort((layer.error, layer.cost))[0]) for layer in layers]
    left = budget - sum(float(layer.cost[i]) for layer, i in zip(layers, chosen, strict=True))
    if left < 0:
        return None
    steps = [_best_step(layer, i, left) for layer, i in zip(layers, chosen, strict=True)]
    while any(step is not None for step in steps):
        k = max((k for k, step in enumerate(steps) if step is not None), key=lambda k: steps[k][0])
        _, target = steps[k]
        price = float(layers[k].cost[target] - layers[k].cost[chosen[k]])
        if price <= left:
            left -= price
            chosen[k] = target
        steps[k] = _best_step(layers[k], chosen[k], left)
    return chosen


def _best_step(layer: Options, current: int, left: float) -> tuple[float, int] | None:
    """(error saved per unit of cost, index) of the best choice that costs at most `left` more."""
    price = layer.cost - layer.cost[current]
    saved = layer.error[current] - layer.error
    able = (price > 0) & (price <= left) & (saved > 0)
    if not able.any():
        return None
    gain = np.where(able, saved / np.where(able, price, 1), -1.0)
    best = int(gain.argmax())
    return float(gain[best]), best
