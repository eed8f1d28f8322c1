"""Which problems a model folder's layers are, timed on the card that is here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import tucker_ops
from tucker_ops.backends import autotune, cuda
from tucker_ops.errors import BackendError, ConfigError
from tucker_ops.nn import TuckerConv2d, TuckerConv3d
from tucker_ops.nnunet.explain import convolution_calls
from tucker_ops.nnunet.folder import DEFAULT_CHECKPOINT, Fold, read_model_folder
from tucker_ops.types import Problem

if TYPE_CHECKING:
    from tucker_ops.backends.triton.tuning import TritonTuning


def problems_of(
    model_dir: str | Path,
    *,
    folds: Sequence[Fold] | None = None,
    checkpoint: str = DEFAULT_CHECKPOINT,
    trust: bool = False,
    backend: str = "cuda",
) -> list[Problem]:
    """The different problems among a model's factorised layers, in float16 as nnU-Net predicts on a GPU.

    Raises BackendError where no GPU runs the kernels of `backend`, ConfigError for a model without factorised layers,
    and the errors of `read_model_folder`.
    """
    available = tucker_ops.backends()[backend]
    if not available:
        raise BackendError(f"there is nothing to tune: {available.reason}")
    folder = read_model_folder(model_dir, folds=folds, checkpoint=checkpoint, trust=trust)
    network, calls = convolution_calls(folder)
    problems = {}
    for name, shape in calls:
        module = network.get_submodule(name)
        if isinstance(module, TuckerConv2d | TuckerConv3d):
            problem = module.problem(shape)
            problems[replace(problem, device="cuda", dtype=torch.float16, layout="channels_last")] = None
    if not problems:
        raise ConfigError(f"{model_dir} has no factorised layers: compress it first (tucker-ops compress)")
    return list(problems)


def backend_to_tune() -> str:
    """Which kernels a card's calls would run: CUDA's where they are compiled for it, else Triton's."""
    return "triton" if tucker_ops.backends()["triton"] and not tucker_ops.backends()["cuda"] else "cuda"


def tune_here(problem: Problem, backend: str = "cuda") -> autotune.Tuning | TritonTuning:
    """On torch's current GPU."""
    if backend == "triton":
        from tucker_ops.backends.triton import tuning

        return tuning.tune(problem)
    return autotune.tune(problem, cuda.device_of(torch.cuda.current_device()))


def save_tunings(tunings: Sequence[autotune.Tuning | TritonTuning], backend: str = "cuda") -> str:
    """Adds them to the card's table; returns its path."""
    notes = {
        "card": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "tucker_ops": tucker_ops.__version__,
    }
    if backend == "triton":
        from tucker_ops.backends.triton import tuning

        return tuning.save(tunings, False, notes)
    return autotune.save(tunings, False, notes)
