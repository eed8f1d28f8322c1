"""Ranks for a time: layers timed as `fuse` runs them, then the whole network until it takes what was asked."""

from __future__ import annotations

import copy
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from tucker_ops import convert
from tucker_ops.convert import Calibration, CompressionConfig, LayerPlan, Plan
from tucker_ops.convert.modules import convolutions
from tucker_ops.convert.trace import trace
from tucker_ops.cost import Voxels, one_pass_cost
from tucker_ops.errors import ConfigError
from tucker_ops.fused import fuse
from tucker_ops.nn import tucker_module
from tucker_ops.types import ConvSpec, Ranks

Progress = Callable[[str, int, int], None]

# How far from what was asked the measured time may lie, and how often it is tried to come nearer.
TOLERANCE = 0.05
ATTEMPTS = 8
# What timing a network takes, and a layer; the latter are many, and only steer.
SECONDS, LAYER_SECONDS = 1.0, 0.1


@dataclass(frozen=True)
class Latency:
    """Median time of one patch through the fused network, batch 1, of how many passes, on what."""

    asked_ms: float
    measured_ms: float
    dense_ms: float
    passes: int
    device: str
    threads: int


def plan_for_latency(
    network: nn.Module,
    config: CompressionConfig,
    input_shape: Sequence[int],
    calibration: Calibration | None = None,
    *,
    device: str = "cpu",
    progress: Progress | None = None,
) -> tuple[Plan, Latency]:
    """The best plan whose network takes `config.latency_ms` for one input on this machine, fused, in float32.

    Each layer is timed at a few ranks and a time fitted to its three products. Ranks are shared out by those times,
    and the network of random weights that they make is timed; what it misses corrects the budget of the next attempt.
    Raises ConfigError where the time is more than the dense network takes, or less than the smallest does. On a machine
    that changes its pace meanwhile the result may miss by more than `TOLERANCE`; `Plan.notes` says what was measured.
    """
    network = copy.deepcopy(network).to(device).eval().requires_grad_(False)
    x = torch.randn(tuple(input_shape), device=device)
    asked = config.latency_ms
    dense_ms, _ = time_network(fuse(copy.deepcopy(network), precision="fp32"), x)
    if asked >= dense_ms:
        raise ConfigError(
            f"latency_ms={asked:g} is no less than the {dense_ms:.1f} ms that the dense network takes here when fused; "
            "predict with it as it is (tucker-ops predict fuses it), or ask for less"
        )
    smallest = convert.plan(network, replace(config, latency_ms=None, factor=1e-9), input_shape=input_shape)
    least_ms, _ = time_network(_with_ranks(network, smallest), x)
    if asked < (1 - TOLERANCE) * least_ms:
        raise ConfigError(
            f"latency_ms={asked:g} cannot be reached: the smallest network takes {least_ms:.1f} ms here, the dense one "
            f"{dense_ms:.1f}; ask for something between, or lower min_rank"
        )
    times = LayerTimes(network, config, x, progress)
    # Between budgets of the layers whose networks are known to be too fast and too slow.
    low, high = (times.least_total(), least_ms), (times.dense_total(), dense_ms)
    best: tuple[float, Plan, Latency] | None = None
    for attempt in range(ATTEMPTS):
        # Never quite at an end, where a straight line between noisy times could stay for ever.
        share = min(max((asked - low[1]) / max(high[1] - low[1], 1e-9), 0.1), 0.9)
        budget = low[0] + share * (high[0] - low[0])
        plan = convert.plan(
            network,
            replace(config, latency_ms=budget),
            input_shape=input_shape,
            calibration=calibration,
            latency=times,
        )
        measured, passes = time_network(_with_ranks(network, plan), x)
        if progress is not None:
            progress(f"{measured:.0f} ms of {asked:g}", attempt + 1, ATTEMPTS)
        distance = abs(measured / asked - 1)
        if best is None or distance < best[0]:
            best = (
                distance,
                plan,
                Latency(asked, measured, dense_ms, passes, device, torch.get_num_threads()),
            )
        if distance <= TOLERANCE:
            break
        low, high = ((budget, measured), high) if measured < asked else (low, (budget, measured))
    distance, plan, found = best
    if distance > 2 * TOLERANCE:
        warnings.warn(
            f"the nearest that was found to {asked:g} ms is {found.measured_ms:.1f} ms; the machine may be busy: "
            "measure again when it is not",
            stacklevel=2,
        )
    note = f"one patch takes {found.measured_ms:.1f} ms of {asked:g} asked ({device}, {found.threads} threads, fp32)"
    return replace(plan, config=config, notes=(*plan.notes, note)), found


class LayerTimes:
    """Milliseconds of each layer that may be factorised, by name and ranks."""

    def __init__(
        self, network: nn.Module, config: CompressionConfig, x: Tensor, progress: Progress | None = None
    ):
        every = replace(config, latency_ms=None, factor=1.0, only_if_cheaper=False)
        layers = {
            layer.name: layer
            for layer in convert.plan(network, every, input_shape=tuple(x.shape)).layers
            if layer.ranks is not None
        }
        if not layers:
            raise ConfigError(
                "no layer can be factorised under this configuration, so none has a time to save"
            )
        convs = convolutions(network)
        calls = trace(network, list(convs.values()), tuple(x.shape)).calls
        self._dense: dict[str, float] = {}
        self._fits: dict[str, tuple[ConvSpec, tuple[Voxels, ...], np.ndarray]] = {}
        self._least: dict[str, Ranks] = {}
        for done, (name, layer) in enumerate(layers.items()):
            if progress is not None:
                progress(f"timing {name}", done, len(layers))
            runs = calls[id(convs[name])]
            inputs = [torch.randn(run.input_shape, device=x.device) for run in runs]
            voxels = tuple(run.voxels(layer.spec.ndim) for run in runs)
            pairs = _pairs(layer, config.min_rank)
            self._least[name] = pairs[0]
            rows = [_products(layer.spec, pair, voxels) for pair in pairs]
            measured = [sum(_time_layer(layer.spec, pair, i) for i in inputs) for pair in pairs]
            self._dense[name] = sum(_time_layer(layer.spec, None, i) for i in inputs)
            self._fits[name] = (layer.spec, voxels, _fit(rows, measured))

    def __call__(self, name: str, ranks: Ranks | None) -> float:
        if ranks is None:
            return self._dense[name]
        spec, voxels, coefficients = self._fits[name]
        return float(np.dot(_products(spec, ranks, voxels), coefficients))

    def dense_total(self) -> float:
        return sum(self._dense.values())

    def least_total(self) -> float:
        return sum(min(self(name, ranks), self._dense[name]) for name, ranks in self._least.items())


def time_network(network: nn.Module, x: Tensor, seconds: float = SECONDS) -> tuple[float, int]:
    """(median milliseconds, passes) of `network(x)`, after a pass to warm up."""
    times: list[float] = []
    with torch.inference_mode():
        network(x)
        begun = time.perf_counter()
        while len(times) < 3 or (time.perf_counter() - begun < seconds and len(times) < 50):
            _synchronize(x)
            start = time.perf_counter()
            network(x)
            _synchronize(x)
            times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times), len(times)


def _synchronize(x: Tensor) -> None:
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)


def _with_ranks(network: nn.Module, plan: Plan) -> nn.Module:
    """Fused, with weights at random: how long it takes does not depend on them."""
    return fuse(
        convert.substitute(copy.deepcopy(network), plan.ranks).eval().requires_grad_(False), precision="fp32"
    )


def _pairs(layer: LayerPlan, min_rank: int) -> list[Ranks]:
    """Ranks to time a layer at, the smallest first."""
    c_in, c_out = layer.spec.in_channels, layer.spec.out_channels
    small = (min(min_rank, c_in), min(min_rank, c_out))
    half = (max(small[0], c_in // 2), max(small[1], c_out // 2))
    return list(dict.fromkeys([small, (half[0], small[1]), (small[0], half[1]), half]))


def _products(spec: ConvSpec, ranks: Ranks, voxels: Sequence[Voxels]) -> np.ndarray:
    """One, for what does not depend on the ranks, and the MACs of the three products in billions."""
    macs = np.zeros(3)
    for v in voxels:
        whole = one_pass_cost(spec, ranks, v).macs
        reduce = v.input * spec.in_channels * ranks[0]
        expand = v.output * spec.out_channels * ranks[1]
        macs += np.array([reduce, whole - reduce - expand, expand])
    return np.array([1.0, *(macs / 1e9)])


def _fit(rows: Sequence[np.ndarray], measured: Sequence[float]) -> np.ndarray:
    """Coefficients of at least 0, so that a larger rank is never expected to be faster."""
    from scipy.optimize import nnls

    scale = np.maximum(np.max(np.abs(rows), axis=0), 1e-30)
    return nnls(np.array(rows) / scale, np.array(measured))[0] / scale


def _time_layer(spec: ConvSpec, ranks: Ranks | None, x: Tensor) -> float:
    """With the norm and activation that follow in an nnU-Net, fused as there."""
    convs = {
        (2, False): nn.Conv2d,
        (3, False): nn.Conv3d,
        (2, True): nn.ConvTranspose2d,
        (3, True): nn.ConvTranspose3d,
    }
    if ranks is None:
        extra = {"output_padding": spec.output_padding} if spec.transposed else {}
        layer = convs[spec.ndim, spec.transposed](
            spec.in_channels, spec.out_channels, spec.kernel_size, spec.stride, spec.padding, dilation=spec.dilation,
            bias=spec.bias, **extra,
        )  # fmt: skip
    else:
        layer = tucker_module(spec, ranks)
    modules = [layer]
    if not spec.transposed:
        norm = nn.InstanceNorm2d if spec.ndim == 2 else nn.InstanceNorm3d
        modules += [norm(spec.out_channels, affine=True), nn.LeakyReLU(0.01)]
    block = nn.Sequential(*modules).to(x.device).eval().requires_grad_(False)
    return time_network(fuse(block, precision="fp32"), x, LAYER_SECONDS)[0]
