"""Thirty steps of nnU-Net's loss on real hippocampus batches: our training path against three torch convolutions."""

from __future__ import annotations

import contextlib
import copy
import itertools

import numpy as np
import pytest
import SimpleITK
import torch
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from torch import nn

import tucker_ops
from bench.network_cases import as_convolutions
from tests.ops.test_gradient import saved_bytes
from tucker_ops.fused import executor
from tucker_ops.nnunet.checkpoint import read_checkpoint
from tucker_ops.nnunet.folder import read_model_folder
from tucker_ops.nnunet.networks import build_network

STEPS, PATCH = 30, (32, 40, 32)


@pytest.fixture(scope="module")
def network(repo_root) -> nn.Module:
    """The example's trained network at half the ranks, as its class in plans.json is: with deep supervision."""
    model = "examples/hippocampus/model/Dataset004_Hippocampus/nnUNetTrainer__nnUNetPlans__3d_fullres"
    folder = read_model_folder(repo_root / model)
    dense = build_network(
        folder.architecture, folder.input_channels, folder.num_outputs, deep_supervision=True
    )
    checkpoint = read_checkpoint(folder.checkpoint_path(folder.folds[0]))
    dense.load_state_dict(checkpoint["network_weights"])
    return tucker_ops.fuse(tucker_ops.compress(dense, tucker_ops.CompressionConfig(factor=0.5))).train()


@pytest.fixture(scope="module")
def batches(repo_root) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Pairs of the example's volumes, the middle of each, and their labels."""
    folder = repo_root / "examples" / "hippocampus"
    volumes = []
    for path in sorted((folder / "labels").glob("*.nii.gz")):
        image = SimpleITK.ReadImage(str(folder / "images" / path.name.replace(".nii.gz", "_0000.nii.gz")))
        values = SimpleITK.GetArrayFromImage(image).astype(np.float32)
        labels = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path))).astype(np.int64)
        values = (values - values.mean()) / values.std()
        volumes.append([torch.from_numpy(middle(array))[None] for array in (values, labels)])
    return [
        tuple(torch.stack(tensors) for tensors in zip(*pair, strict=True))
        for pair in zip(volumes[::2], volumes[1::2], strict=True)
    ]


def middle(array: np.ndarray) -> np.ndarray:
    short = [max(0, p - n) for n, p in zip(array.shape, PATCH, strict=True)]
    array = np.pad(array, [(s // 2, s - s // 2) for s in short])
    begins = [(n - p) // 2 for n, p in zip(array.shape, PATCH, strict=True)]
    return array[tuple(slice(b, b + p) for b, p in zip(begins, PATCH, strict=True))].copy()


def loss_curve(network: nn.Module, batches, *, autocast: bool = False) -> list[float]:
    """nnU-Net's loss, its weights of resolutions and its optimiser, at a hundredth of its first learning rate."""
    loss = DC_and_CE_loss(
        {"batch_dice": False, "smooth": 1e-5, "do_bg": False, "ddp": False},
        {},
        dice_class=MemoryEfficientSoftDiceLoss,
    )
    resolutions = len(network(batches[0][0]))
    weights = np.array([0.5**i for i in range(resolutions)])
    weights[-1] = 0
    loss = DeepSupervisionWrapper(loss, weights / weights.sum())
    optimiser = torch.optim.SGD(network.parameters(), 1e-4, momentum=0.99, nesterov=True, weight_decay=3e-5)
    curve = []
    for values, labels in itertools.islice(itertools.cycle(batches), STEPS):
        context = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
        optimiser.zero_grad()
        with context:
            outputs = network(values)
            targets = [nn.functional.interpolate(labels.float(), out.shape[2:]) for out in outputs]
            value = loss([out.float() for out in outputs], targets)
        value.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 12)
        optimiser.step()
        curve.append(value.item())
    return curve


@pytest.fixture(scope="module")
def reference_curve(network, batches) -> list[float]:
    return loss_curve(as_convolutions(copy.deepcopy(network)).train(), batches)


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "limit"), [("fp32", 1e-4), ("bf16", 2e-2)])
def test_the_same_loss_curve(network, batches, reference_curve, precision, limit):
    """The reference's is of fp32: torch's convolutions take a hundred times as long in bf16 on most processors."""
    ours = copy.deepcopy(network)
    curve = loss_curve(ours, batches, autocast=precision == "bf16")
    assert executor._TRAINING in ours.__dict__
    errors = [abs(a - b) / abs(b) for a, b in zip(curve, reference_curve, strict=True)]
    assert max(errors) <= limit, max(errors)
    assert curve[-1] < curve[0]


def test_what_the_network_keeps_for_backward(network, batches):
    values = batches[0][0]
    three = as_convolutions(copy.deepcopy(network)).train()
    ours, theirs = (saved_bytes(lambda n=n: sum(o.sum() for o in n(values))) for n in (network, three))
    assert ours <= 0.7 * theirs, ours / theirs
