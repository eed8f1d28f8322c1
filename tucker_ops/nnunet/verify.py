"""Loads a freshly written model the way nnU-Net does and compares what it computes."""

from __future__ import annotations

import contextlib
import io
import math
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from tucker_ops.errors import ConversionError
from tucker_ops.nnunet.checkpoint import read_checkpoint
from tucker_ops.nnunet.folder import Fold, ModelFolder, read_model_folder
from tucker_ops.nnunet.networks import build_network

TOLERANCE = 1e-4
BY_PREDICTOR = "nnUNetPredictor"
BY_NETWORK = "get_network_from_plans"


def probe(network: nn.Module, folder: ModelFolder) -> torch.Tensor:
    """Logits of the network for one fixed random patch, small enough to cost little.

    Each axis has twice the network's total stride, so that the deepest stage keeps two voxels to normalise
    over, or the patch size where that is smaller.
    """
    strides = folder.architecture["arch_kwargs"]["strides"]
    total = [math.prod(per_axis) for per_axis in zip(*strides, strict=True)]
    size = [min(n, 2 * s) for n, s in zip(folder.patch_size, total, strict=True)]
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn((1, folder.input_channels, *size), generator=generator)
    with torch.inference_mode():
        return network.eval()(sample).float()


def verify_folder(
    path: Path, expected: Mapping[Fold, torch.Tensor], source: ModelFolder, checkpoint: str
) -> str:
    """Compare the folder's logits, fold by fold, with those of the networks in memory.

    Returns how the folder was loaded: by nnUNetPredictor, or, with a warning, by nnU-Net's network builder
    where nnU-Net cannot import the trainer on this machine. Raises ConversionError where loading fails or
    the largest difference exceeds 1e-4 of the largest logit.
    """
    folds = tuple(expected)
    reason = trainer_problem(source.trainer_name)
    try:
        if reason is None:
            with contextlib.redirect_stdout(io.StringIO()):
                network, parameters = _load_by_predictor(path, folds, checkpoint)
        else:
            warnings.warn(
                f"nnU-Net cannot load the trainer {source.trainer_name} on this machine ({reason}), "
                "so it cannot "
                "predict with this model here. The compressed model was checked without the trainer; set "
                "nnUNet_extTrainer to the trainer's folder, or repair the installation, before you predict",
                stacklevel=2,
            )
            network, parameters = _load_by_network(path, folds, checkpoint)
        for fold, weights in zip(folds, parameters, strict=True):
            network.load_state_dict(weights)
            _compare(expected[fold], probe(network, source), fold)
    except (RuntimeError, ImportError, KeyError, AssertionError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ConversionError(
            f"nnU-Net cannot load the compressed model made from {source.path} "
            f"({' '.join(str(error).split())[:300]}); nothing was written"
        ) from error
    return BY_PREDICTOR if reason is None else BY_NETWORK


def _compare(expected: torch.Tensor, got: torch.Tensor, fold: Fold) -> None:
    scale = expected.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    difference = float((expected - got).abs().max() / scale)
    if not difference <= TOLERANCE:
        raise ConversionError(
            f"fold {fold} loaded by nnU-Net differs from the compressed network by {difference:.1e} "
            "of the largest "
            f"logit, more than {TOLERANCE:.0e}; nothing was written"
        )


def trainer_problem(name: str) -> str | None:
    """Why nnU-Net cannot import this trainer here, or None."""
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    try:
        with contextlib.redirect_stdout(io.StringIO()):
            recursive_find_trainer_class_by_name(name)
    except (RuntimeError, ImportError, AssertionError) as error:
        return (str(error) or type(error).__name__).splitlines()[0][:200]
    return None


def _load_by_predictor(path: Path, folds: tuple[Fold, ...], checkpoint: str):
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(path), folds, checkpoint)
    return predictor.network, predictor.list_of_parameters


def _load_by_network(path: Path, folds: tuple[Fold, ...], checkpoint: str):
    folder = read_model_folder(path, folds=folds, checkpoint=checkpoint)
    network = build_network(folder.architecture, folder.input_channels, folder.num_outputs)
    return network, [read_checkpoint(folder.checkpoint_path(f, checkpoint))["network_weights"] for f in folds]
