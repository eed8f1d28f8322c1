"""Prediction with the network fused, on a trained model and real volumes: same output, and in which precision."""

from __future__ import annotations

import copy
import json

import pytest

pytest.importorskip("nnunetv2")
import numpy as np
import SimpleITK
import torch
from nnunetv2.inference.sliding_window_prediction import compute_gaussian
from tiny import TRAINER_FOLDER, make_model
from torch.nn import functional as F

from tests.ops.problems import relative_rms
from tucker_ops.backends import native
from tucker_ops.convert import CompressionConfig
from tucker_ops.errors import ConfigError
from tucker_ops.fused import FusedForward
from tucker_ops.nnunet import predictor as predictor_module
from tucker_ops.nnunet.compress import compress_folder
from tucker_ops.nnunet.demo import EXAMPLE, MODEL
from tucker_ops.nnunet.predict import load_predictor, predict_folder
from tucker_ops.nnunet.predictor import nnUNetPredictor

HALF = CompressionConfig(factor=0.5)


@pytest.fixture(scope="module")
def hippocampus(tmp_path_factory):
    if not (EXAMPLE / MODEL).is_dir():
        pytest.skip("needs the hippocampus example, which comes with the source")
    if not native.load():
        pytest.skip(native.load().reason)
    folder = tmp_path_factory.mktemp("hippocampus") / "half"
    compress_folder(EXAMPLE / MODEL, folder, HALF)
    return folder


def check_logits(model, x: torch.Tensor) -> None:
    """Fused, in fp32 and in bf16, against the same network in float64."""
    network = load_predictor(model, mirroring=False, precision="fp32").network.eval()
    assert isinstance(network, FusedForward)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        fused = network(x)
        network.precision = "bf16"
        low = network(x)
        patch.setenv("TUCKER_FUSE", "0")
        plain = network(x)
        exact = copy.deepcopy(network).double()(x.double())
    print({name: f"{relative_rms(y, exact):.1e}" for name, y in (("fp32", fused), ("bf16", low))})
    assert not torch.equal(fused, plain)
    assert relative_rms(fused, exact) <= 1e-4
    assert 1e-4 < relative_rms(low, exact) <= 2.5e-2
    assert (fused.argmax(1) == exact.argmax(1)).double().mean() >= 0.99999


def real_patch(path, size, center=0.5) -> torch.Tensor:
    """A patch from the middle of a volume, normalised, padded where the volume is smaller."""
    volume = torch.from_numpy(SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path))).astype("float32"))
    volume = (volume - volume.mean()) / volume.std()
    for axis, extent in enumerate(size):
        start = max(0, int((volume.shape[axis] - extent) * center))
        volume = volume.narrow(axis, start, min(extent, volume.shape[axis]))
    missing = [(0, n - m) for n, m in zip(size, volume.shape, strict=True)]
    return F.pad(volume, [p for pair in reversed(missing) for p in pair])[None, None]


@pytest.mark.parametrize("case", ["hippocampus_011", "hippocampus_097"])
def test_hippocampus_logits(hippocampus, case):
    check_logits(hippocampus, real_patch(EXAMPLE / "images" / f"{case}_0000.nii.gz", (40, 56, 40)))


@pytest.mark.slow
def test_ct_logits(tmp_path, shared_dir):
    model = shared_dir / "models" / "Dataset297_CTOrgans" / TRAINER_FOLDER
    patch = real_patch(shared_dir / "data" / "ct" / "example_ct_sm.nii.gz", (64, 64, 64))
    for name, config in (("half", HALF), ("full", CompressionConfig(factor=1.0, only_if_cheaper=False))):
        compress_folder(model, tmp_path / name, config)
        check_logits(tmp_path / name, patch)


def check_segmentations(model, images, tmp_path, cases=None) -> int:
    """Of the network fused in fp32 and in bf16 against the one not fused; returns the number of cases."""
    summaries = {
        name: predict_folder(model, images, tmp_path / name, mirroring=False, precision=name, cases=cases)
        for name in ("fp32", "bf16")
    }
    assert "fused; blocks run on cpu; fp32" in summaries["fp32"].inference
    assert "bf16, as asked for" in summaries["bf16"].inference
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUCKER_FUSE", "0")
        plain = predict_folder(model, images, tmp_path / "plain", mirroring=False, cases=cases)
    assert plain.inference == "runs as it was: TUCKER_FUSE=0"
    same = {name: [] for name in summaries}
    for path in sorted((tmp_path / "plain").glob("*.nii.gz")):
        expected = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path)))
        for name, equal in same.items():
            other = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(tmp_path / name / path.name)))
            equal.append((other == expected).ravel())
    share = {name: np.concatenate(equal).mean() for name, equal in same.items()}
    print({name: f"{value:.6%} of voxels as not fused" for name, value in share.items()})
    assert share["fp32"] >= 0.99999 and share["bf16"] >= 0.999
    return len(same["fp32"])


@pytest.mark.slow
def test_segmentations_of_all_example_cases(hippocampus, tmp_path):
    assert check_segmentations(hippocampus, EXAMPLE / "images", tmp_path) == 10


@pytest.mark.slow
def test_segmentations_of_all_validation_cases(hippocampus, tmp_path, shared_dir):
    data = shared_dir / "data" / "Dataset004_Hippocampus"
    cases = json.loads((data / "splits_final.json").read_text())[0]["val"]
    assert check_segmentations(hippocampus, data / "imagesTr", tmp_path, cases) == 39


@pytest.mark.parametrize("ndim", [2, 3])
def test_sums_over_tiles(tmp_path, ndim):
    """As in float64; nnU-Net's float16 loses the far ends of its gaussian, so it only comes near."""
    predictor = load_predictor(make_model(tmp_path / "src", ndim=ndim), mirroring=False, precision="fp32")
    predictor.network.load_state_dict(predictor.list_of_parameters[0])
    data = torch.randn(1, 33, 31, 17)
    tiles = predictor._internal_get_sliding_window_slicers(data.shape[1:])
    ours = predictor._internal_predict_sliding_window_return_logits(data, tiles)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predictor_module, "LARGEST_SHARE", 0)
        stock = predictor._internal_predict_sliding_window_return_logits(data, tiles)
    patch_size = tuple(predictor.configuration_manager.patch_size)
    gaussian = compute_gaussian(patch_size, sigma_scale=1 / 8, value_scaling_factor=10, device="cpu").double()
    total, weights = torch.zeros(3, 33, 31, 17).double(), torch.zeros(33, 31, 17).double()
    with torch.no_grad():
        for tile in tiles:
            total[tile] += predictor.network(data[tile][None])[0].double() * gaussian
            weights[tile[1:]] += gaussian
    expected = total / weights
    assert (ours.dtype, stock.dtype) == (torch.float32, torch.float16) and ours.shape == stock.shape
    assert relative_rms(ours, expected) < 1e-6
    assert torch.equal(ours.argmax(0), expected.argmax(0))
    assert 1e-5 < relative_rms(stock, expected) < 0.05


def test_dense_models_are_fused_too(tmp_path, tiny_model, images):
    if not native.load():
        pytest.skip(native.load().reason)
    summary = predict_folder(tiny_model, images, tmp_path / "out", mirroring=False, cases=["b"])
    assert "layers fused; blocks run on cpu" in summary.inference
    predictor = load_predictor(tiny_model)
    assert isinstance(predictor, nnUNetPredictor) and isinstance(predictor.network, FusedForward)


def test_an_unknown_precision_is_refused(tiny_model):
    with pytest.raises(ConfigError, match="precision 'half' given; use one of fp32, bf16, auto"):
        load_predictor(tiny_model, precision="half")
