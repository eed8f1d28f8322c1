"""From a configuration to ranks: the rank policies of `tucker_ops.decompose.ranks`, applied to a network."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING

import numpy as np

from tucker_ops.convert.config import BUDGETS, CompressionConfig
from tucker_ops.convert.rules import not_cheaper
from tucker_ops.cost import Cost, core_params
from tucker_ops.decompose import Spectrum
from tucker_ops.decompose.ranks import Options, allocate, energy_rank, factor_rank, rank_grid
from tucker_ops.errors import ConfigError
from tucker_ops.types import Ranks

if TYPE_CHECKING:
    from tucker_ops.convert.plan import LayerPlan

# Choices of one layer beyond which those that no budget would take are thrown out before more are listed.
MOST_CHOICES = 100_000
CostOf = Callable[[str, Ranks], Cost]
# Milliseconds that a layer takes at ranks, or dense (None), all its runs of one forward pass together.
LatencyOf = Callable[[str, Ranks | None], float]


def choose_ranks(
    layers: Mapping[str, LayerPlan],
    spectra: Mapping[str, Spectrum | None],
    tucker: CostOf,
    total_params: int,
    config: CompressionConfig,
    latency: LatencyOf | None = None,
) -> dict[str, LayerPlan]:
    """`layers` with ranks, cost and expected error, or a reason, for each of the layers in `spectra`.

    A spectrum of None stands for weights that are not there; all policies but `factor` need them. Raises
    ConfigError without them, or for a budget that cannot be met.
    """
    absent = [name for name, values in spectra.items() if values is None]
    if absent and config.policy != "factor":
        raise ConfigError(
            f"{config.policy}= chooses ranks by the weights, but those of {absent[0]} are on the meta "
            "device; load the weights first, or use factor="
        )
    if config.policy in BUDGETS:
        chosen = _by_budget(layers, spectra, tucker, total_params, config, latency)
    else:
        chosen = {name: _by_rule(layers[name], values, config) for name, values in spectra.items()}

    result = dict(layers)
    for name, ranks in chosen.items():
        layer = layers[name]
        if isinstance(ranks, str):
            result[name] = replace(layer, reason=ranks)
            continue
        cost = tucker(name, ranks)
        reason = not_cheaper(layer.dense, cost, ranks) if config.only_if_cheaper else None
        if reason is not None:
            result[name] = replace(layer, reason=reason)
            continue
        values = spectra[name]
        error = None if values is None else values.relative_error(ranks)
        loss = None if values is None or values.nats is None else values.nats * error**2
        result[name] = replace(layer, ranks=ranks, tucker=cost, expected_error=error, expected_loss=loss)
    return result


def _by_rule(layer: LayerPlan, values: Spectrum | None, config: CompressionConfig) -> Ranks:
    limits = {"min_rank": config.min_rank, "align": config.align}
    if config.policy == "energy":
        kept_in, kept_out = values.share_kept()
        return energy_rank(kept_in, config.energy, **limits), energy_rank(kept_out, config.energy, **limits)
    channels = (layer.spec.in_channels, layer.spec.out_channels)
    rank_in, rank_out = (factor_rank(c, config.factor, rounding=config.rounding, **limits) for c in channels)
    return rank_in, rank_out


def _by_budget(
    layers: Mapping[str, LayerPlan],
    spectra: Mapping[str, Spectrum],
    tucker: CostOf,
    total_params: int,
    config: CompressionConfig,
    latency: LatencyOf | None,
) -> dict[str, Ranks | str]:
    """Ranks, or the reason to stay dense, of each layer under one budget for the whole network."""
    unit = config.policy
    asked = getattr(config, unit)

    def price(name: str, ranks: Ranks | None) -> float:
        if unit == "latency_ms":
            return latency(name, ranks)
        return getattr(layers[name].dense if ranks is None else tucker(name, ranks), unit)

    if unit == "latency_ms":
        # Only layers that can change have times; what the rest takes is the measurer's to take off.
        total = sum(price(name, None) for name in spectra)
    else:
        total = total_params if unit == "params" else sum(layer.dense.macs for layer in layers.values())
    budget = asked * total if asked <= 1 and unit != "latency_ms" else asked
    fixed = total - sum(price(name, None) for name in spectra)

    choices: dict[str, list[Ranks | None]] = {}
    options: list[Options] = []
    for name, values in spectra.items():
        layer = layers[name]
        costs = (lambda r, name=name: tucker(name, r), lambda r, name=name: price(name, r))
        choices[name], option = _options(layer, values, *costs, config)
        options.append(option)

    picked = allocate(options, budget - fixed)
    if picked is None:
        least = fixed + sum(option.cost.min() for option in options)
        if unit == "latency_ms":
            raise ConfigError(
                f"latency_ms={asked:g} is less than the {least:.1f} ms that the layers take at least with min_rank "
                f"{config.min_rank}; ask for more, or lower min_rank"
            )
        least = int(least)
        share = math.ceil(1e4 * least / total) / 1e4
        raise ConfigError(
            f"{unit}={asked:g} asks for at most {int(budget):,} {unit} of the dense network's {total:,}, but "
            f"it cannot go below {least:,} ({share:.4f}) with min_rank {config.min_rank} and the "
            "layers that stay dense; ask for at least that, or lower min_rank"
        )
    chosen: dict[str, Ranks | str] = {}
    for (name, ranks), index in zip(choices.items(), picked, strict=True):
        if ranks[index] is not None:
            chosen[name] = ranks[index]
        elif len(ranks) == 1:
            chosen[name] = f"not cheaper at any ranks from {config.min_rank} up"
        else:
            chosen[name] = f"the budget of {unit}={asked:g} leaves room for it"
    return chosen


def _options(
    layer: LayerPlan,
    values: Spectrum,
    tucker: Callable[[Ranks], Cost],
    price: Callable[[Ranks | None], float],
    config: CompressionConfig,
) -> tuple[list[Ranks | None], Options]:
    """All ranks the layer may take, and None for staying dense, with cost and error.

    With a calibration the error is the expected loss in nats, which adds up over layers. Without one it is -log of
    the share of the layer's energy that is kept. Shares, because a norm follows nearly every convolution and takes
    its scale away; logarithms, because layers come one after the other, so that shares multiply. A sum of
    relative errors would wipe out a large layer to spare many small ones.
    """
    grids = [
        rank_grid(channels, min_rank=config.min_rank, align=config.align)
        for channels in (layer.spec.in_channels, layer.spec.out_channels)
    ]
    if values.nats is None:
        lost = -(1 - values.squared_errors()).clamp(min=1e-12).log()
    else:
        lost = values.nats * values.squared_errors()
    choices: list[Ranks | None] = []
    cost, error = [], []
    for ranks in product(*grids):
        of_layer, errors = tucker(ranks), lost[ranks[0] - 1, ranks[1] - 1]
        if not config.only_if_cheaper or not_cheaper(layer.dense, of_layer, ranks) is None:
            choices.append(ranks)
            cost.append(price(ranks))
            error.append(float(errors[-1]))
        if config.gives_tap_ranks:
            taps, params = _tap_ranks(layer, of_layer, ranks, config)
            choices += [(*ranks, rank) for rank in taps.tolist()]
            cost += params.tolist()
            error += errors[taps - 1].tolist()
            if len(choices) > MOST_CHOICES:
                choices, cost, error = _undominated(choices, cost, error)
    if config.only_if_cheaper:
        choices.append(None)
        cost.append(price(None))
        error.append(0.0)
    if config.gives_tap_ranks:
        choices, cost, error = _undominated(choices, cost, error)
    return choices, Options(np.array(cost, dtype=np.float64), np.array(error))


def _undominated(
    choices: list[Ranks | None], cost: list[float], error: list[float]
) -> tuple[list[Ranks | None], list[float], list[float]]:
    """Those beside which none costs as little and errs less; `allocate` takes no other."""
    order = np.lexsort((error, cost))
    errors = np.array(error)[order]
    best_before = np.minimum.accumulate(np.concatenate([[np.inf], errors[:-1]]))
    kept = order[errors < best_before]
    return tuple([values[i] for i in kept] for values in (choices, cost, error))


def _tap_ranks(
    layer: LayerPlan, pair: Cost, ranks: tuple[int, int], config: CompressionConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Ranks of the taps that save parameters at these ranks of the channels, which cost `pair`, and what is left."""
    taps = np.arange(1, math.prod(layer.spec.kernel_size))
    params = pair.params - core_params(layer.spec, *ranks) + core_params(layer.spec, *ranks, taps)
    saves = params < pair.params
    if config.only_if_cheaper:
        saves &= (params < layer.dense.params) & (pair.macs < layer.dense.macs)
    return taps[saves], params[saves]
