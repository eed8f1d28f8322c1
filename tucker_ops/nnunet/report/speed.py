"""Time of a forward pass of one patch, models taking turns so that a busy machine slows them alike."""

from __future__ import annotations

import contextlib
import io
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

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


def measure_forward(
    models: Mapping[str, Path],
    *,
    device: str = "cpu",
    repeats: int = 5,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, ForwardTime]:
    """Forward times of model folders, by the names given, on one random patch as nnU-Net runs them.

    On a CPU that is fp32, on a GPU fp16 autocast. Each round runs every model once; a first round is not
    counted.
    """
    from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels

    networks = {}
    for name, path in models.items():
        with contextlib.redirect_stdout(io.StringIO()):
            predictor = load_predictor(path, device=device)
        networks[name] = predictor.network.to(predictor.device).eval()
    shape = predictor.configuration_manager.patch_size
    channels = determine_num_input_channels(
        predictor.plans_manager, predictor.configuration_manager, predictor.dataset_json
    )
    patch = torch.randn((1, channels, *shape), generator=torch.Generator().manual_seed(0)).to(device)

    milliseconds: dict[str, list[float]] = {name: [] for name in networks}
    rounds = repeats + 1
    for index in range(rounds):
        for name, network in networks.items():
            if progress is not None:
                progress(name, index, rounds)
            elapsed = _forward_milliseconds(network, patch)
            if index > 0:
                milliseconds[name].append(elapsed)
    if progress is not None:
        progress("", rounds, rounds)
    return {name: ForwardTime.of(values) for name, values in milliseconds.items()}


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
