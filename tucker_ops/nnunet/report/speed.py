"""Time of a forward pass of one patch, models taking turns so that a busy machine slows them alike."""

from __future__ import annotations

import contextlib
import copy
import io
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from tucker_ops.fused import FusedForward, explain, fuse
from tucker_ops.nnunet.predict import load_predictor


@dataclass(frozen=True)
class ForwardTime:
    """Milliseconds of one patch: median and 20th and 80th percentile over ``repeats`` passes."""

    median: float
    low: float
    high: float
    repeats: int

    @classmethod
    def of(cls, milliseconds: list[float]) -> ForwardTime:
        fifths = statistics.quantiles(milliseconds, n=5, method="inclusive")
        return cls(statistics.median(milliseconds), fifths[0], fifths[-1], len(milliseconds))


@dataclass(frozen=True)
class Forward:
    """One model's times: its modules one by one, and fused where this machine can; ``compressed`` or dense."""

    not_fused: ForwardTime
    fused: ForwardTime | None
    compressed: bool

    @property
    def stock(self) -> ForwardTime:
        """As nnU-Net's own predictor runs the model folder: compressed networks fuse themselves."""
        return self.fused if self.compressed and self.fused is not None else self.not_fused


def measure_forward(
    models: Mapping[str, Path],
    *,
    device: str = "cpu",
    repeats: int = 5,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Forward]:
    """Forward times of model folders, by the names given, on one random patch, fused and not.

    On a CPU in fp32 (or what TUCKER_PRECISION says, where fused), on a GPU under fp16 autocast. Each round runs every
    model once; a first round is not counted.
    """
    from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels

    plain, fused, compressed = {}, {}, {}
    for name, path in models.items():
        with contextlib.redirect_stdout(io.StringIO()):
            predictor = load_predictor(path, device=device, fused=False)
        network = predictor.network.to(predictor.device).eval()
        plain[name], compressed[name] = network, isinstance(network, FusedForward)
        other = copy.copy(network)
        if compressed[name]:
            other.fused = True
        if explain(other).used:
            fused[name] = fuse(other)
    shape = predictor.configuration_manager.patch_size
    channels = determine_num_input_channels(
        predictor.plans_manager, predictor.configuration_manager, predictor.dataset_json
    )
    patch = torch.randn((1, channels, *shape), generator=torch.Generator().manual_seed(0)).to(device)

    samples: dict[tuple[str, bool], list[float]] = {}
    rounds = repeats + 1
    for index in range(rounds):
        for name in plain:
            if progress is not None:
                progress(name, index, rounds)
            for networks in (plain, fused):
                if name not in networks:
                    continue
                elapsed = _forward_milliseconds(networks[name], patch)
                if index > 0:
                    samples.setdefault((name, networks is fused), []).append(elapsed)
    if progress is not None:
        progress("", rounds, rounds)
    return {
        name: Forward(
            ForwardTime.of(samples[name, False]),
            ForwardTime.of(samples[name, True]) if name in fused else None,
            compressed[name],
        )
        for name in plain
    }


def _forward_milliseconds(network: torch.nn.Module, patch: torch.Tensor) -> float:
    on_gpu = patch.device.type == "cuda"
    with torch.inference_mode(), torch.autocast(patch.device.type, enabled=on_gpu):
        if on_gpu:
            torch.cuda.synchronize(patch.device)
        start = time.perf_counter()
        network(patch)
        if on_gpu:
            torch.cuda.synchronize(patch.device)
    return (time.perf_counter() - start) * 1e3
