"""Makes small nnU-Net model folders with random weights, and images for them."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import SimpleITK
import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

FEATURES = (8, 16, 32)
ARCHITECTURES = "dynamic_network_architectures.architectures.unet"
TRAINER_FOLDER = "nnUNetTrainer__nnUNetPlans__3d_fullres"


def _resampling(is_seg: bool, order: int) -> dict:
    return {"is_seg": is_seg, "order": order, "order_z": 0, "force_separate_z": None}


def _architecture(network: str, ndim: int) -> dict:
    stages = len(FEATURES)
    blocks = "n_conv_per_stage" if network == "PlainConvUNet" else "n_blocks_per_stage"
    return {
        "network_class_name": f"{ARCHITECTURES}.{network}",
        "arch_kwargs": {
            "n_stages": stages,
            "features_per_stage": list(FEATURES),
            "conv_op": f"torch.nn.modules.conv.Conv{ndim}d",
            "kernel_sizes": [[3] * ndim] * stages,
            "strides": [[1] * ndim] + [[2] * ndim] * (stages - 1),
            blocks: [2] * stages,
            "n_conv_per_stage_decoder": [2 if network == "PlainConvUNet" else 1] * (stages - 1),
            "conv_bias": True,
            "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{ndim}d",
            "norm_op_kwargs": {"eps": 1e-05, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }


def _old_format(architecture: dict, network: str) -> dict:
    """The entries that stood in plans.json before nnU-Net 2.4 in place of the architecture block."""
    kwargs = architecture["arch_kwargs"]
    blocks = kwargs.get("n_conv_per_stage") or kwargs["n_blocks_per_stage"]
    return {
        "UNet_class_name": network,
        "UNet_base_num_features": FEATURES[0],
        "unet_max_num_features": FEATURES[-1],
        "n_conv_per_stage_encoder": blocks,
        "n_conv_per_stage_decoder": kwargs["n_conv_per_stage_decoder"],
        "num_pool_per_axis": [len(FEATURES) - 1] * len(kwargs["strides"][0]),
        "pool_op_kernel_sizes": kwargs["strides"],
        "conv_kernel_sizes": kwargs["kernel_sizes"],
    }


def make_model(
    path: Path,
    *,
    network: str = "PlainConvUNet",
    ndim: int = 3,
    folds: tuple[int | str, ...] = (0,),
    old_format: bool = False,
    channels: int = 1,
    dtype: torch.dtype = torch.float32,
    trainer: str = "nnUNetTrainer",
) -> Path:
    """Write a model folder as nnU-Net does after training: optimizer state, log of numpy scalars and all."""
    configuration = "3d_fullres" if ndim == 3 else "2d"
    architecture = _architecture(network, ndim)
    common = {
        "data_identifier": f"nnUNetPlans_{configuration}",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": [16] * ndim,
        "median_image_size_in_voxels": [18.0] * ndim,
        "spacing": [1.0] * ndim,
        "normalization_schemes": ["ZScoreNormalization"] * channels,
        "use_mask_for_norm": [False] * channels,
        "batch_dice": False,
    }
    for kind, order in (("data", 3), ("seg", 1), ("probabilities", 1)):
        common[f"resampling_fn_{kind}"] = "resample_data_or_seg_to_shape"
        common[f"resampling_fn_{kind}_kwargs"] = _resampling(kind == "seg", order)
    network_entries = _old_format(architecture, network) if old_format else {"architecture": architecture}
    plans = {
        "dataset_name": "Dataset999_Tiny",
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": [1.0, 1.0, 1.0],
        "original_median_shape_after_transp": [18, 18, 18],
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {"other": {"batch_size": 9}, configuration: {**common, **network_entries}},
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {"0": {"mean": 0.0, "std": 1.0}},
    }
    dataset = {
        "channel_names": {str(c): "MRI" for c in range(channels)},
        "labels": {"background": 0, "one": 1, "two": 2},
        "numTraining": 1,
        "file_ending": ".nii.gz",
    }
    path.mkdir(parents=True)
    (path / "plans.json").write_text(json.dumps(plans))
    (path / "dataset.json").write_text(json.dumps(dataset))
    (path / "dataset_fingerprint.json").write_text("{}")
    (path / "NOTICE").write_text("Random weights, free of any licence.\n")
    for fold in folds:
        built = get_network_from_plans(
            architecture["network_class_name"],
            copy.deepcopy(architecture["arch_kwargs"]),
            architecture["_kw_requires_import"],
            channels,
            3,
            deep_supervision=True,
        ).to(dtype)
        optimizer = torch.optim.SGD(built.parameters(), lr=0.01, momentum=0.99)
        sum(p.sum() for p in built.parameters()).backward()
        optimizer.step()
        for parameter in built.parameters():
            parameter.data += 0.3 * parameter.data.std().nan_to_num(0.1) * torch.randn_like(parameter)
        (path / f"fold_{fold}").mkdir()
        torch.save(
            {
                "network_weights": built.state_dict(),
                "optimizer_state": optimizer.state_dict(),
                "grad_scaler_state": None,
                "logging": {"mean_fg_dice": [np.float64(0.5)], "train_losses": [np.float32(1.0)]},
                "_best_ema": np.float64(0.5),
                "current_epoch": 3,
                "init_args": {
                    "plans": plans,
                    "configuration": configuration,
                    "fold": fold,
                    "dataset_json": dataset,
                },
                "trainer_name": trainer,
                "inference_allowed_mirroring_axes": tuple(range(ndim)),
            },
            path / f"fold_{fold}" / "checkpoint_final.pth",
        )
    return path


def write_image(path: Path, shape: tuple[int, ...], seed: int = 0) -> None:
    """A random smooth volume, `shape` in (z, y, x)."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn((1, 1, 5, 5, 5), generator=generator)
    volume = torch.nn.functional.interpolate(coarse, size=shape, mode="trilinear")[0, 0]
    path.parent.mkdir(parents=True, exist_ok=True)
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(volume.numpy()), str(path))
