"""Prediction through nnU-Net's predictor."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import nnunetv2.inference.predict_from_raw_data
import numpy
import pytest
import SimpleITK
import torch
from tiny import make_model, write_image

from tucker_ops.backends import native
from tucker_ops.backends.cpu import CPU
from tucker_ops.convert import CompressionConfig
from tucker_ops.errors import (
    CheckpointError,
    ConfigError,
    DeviceError,
    ImageError,
    ModelFolderError,
    OutputExistsError,
    OutputWriteError,
    ShapeError,
)
from tucker_ops.nnunet.compress import compress_folder
from tucker_ops.nnunet.manifest import read_manifest
from tucker_ops.nnunet.predict import load_predictor, predict_folder

HALF = CompressionConfig(factor=0.5, min_rank=4, align=4)
TILES = {"a": 9, "b": 4}


@pytest.fixture
def compressed(tmp_path, tiny_model) -> Path:
    compress_folder(tiny_model, tmp_path / "compressed", HALF)
    return tmp_path / "compressed"


def segmentation(path: Path):
    return torch.from_numpy(SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path))).astype("int64"))


@pytest.fixture
def blocks(monkeypatch):
    """Sets what runs in place of the CPU kernel's blocks; skips where there is no such kernel."""
    if not native.load():
        pytest.skip(native.load().reason)
    select = sys.modules["tucker_ops.backends.select"]

    def replace(run):
        kernels = dataclasses.replace(CPU, run_block=run)
        monkeypatch.setattr(select, "ORDER", (kernels, *(b for b in select.ORDER if b is not CPU)))

    return replace


@pytest.fixture
def calls(blocks):
    """How often each core ran, counted over all networks of the process."""
    ran: dict[int, int] = {}

    def count(*args):
        core = args[7]
        ran[core.data_ptr()] = ran.get(core.data_ptr(), 0) + 1
        return CPU.run_block(*args)

    blocks(count)
    return ran


def test_predicts_every_tile_with_the_factorised_layers(tmp_path, compressed, images, calls):
    # "auto" would run the first tile twice on a processor that multiplies bf16.
    summary = predict_folder(compressed, images, tmp_path / "out", mirroring=False, precision="fp32")
    assert summary.cases == ("a", "b")
    assert summary.seconds > 0 and summary.peak_rss_bytes > 1e8
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "a.nii.gz",
        "b.nii.gz",
        "dataset.json",
        "plans.json",
        "predict_from_raw_data_args.json",
    ]
    assert segmentation(tmp_path / "out" / "a.nii.gz").shape == (32, 30, 16)
    assert len(segmentation(tmp_path / "out" / "b.nii.gz").unique()) > 1
    forward = [n for n, r in read_manifest(compressed).plan.ranks.items() if "transpconvs" not in n]
    # Beside the factorised layers, the first convolution and the head.
    assert list(calls.values()) == [sum(TILES.values())] * (len(forward) + 2)


def test_every_voxel_has_logits(compressed):
    predictor = load_predictor(compressed, mirroring=False)
    logits = predictor.predict_logits_from_preprocessed_data(torch.randn(1, 33, 31, 17))
    assert logits.shape == (3, 33, 31, 17)
    assert torch.isfinite(logits).all()


def test_mirroring_and_folds(tmp_path, images, calls):
    source = make_model(tmp_path / "src", folds=(0, 1))
    compress_folder(source, tmp_path / "dst", HALF)
    calls.clear()
    summary = predict_folder(tmp_path / "dst", images, tmp_path / "out", cases=["b"], precision="fp32")
    assert (summary.cases, summary.folds) == (("b",), (0, 1))
    assert set(calls.values()) == {TILES["b"] * 8 * 2}


def test_two_dimensional(tmp_path, images):
    source = make_model(tmp_path / "src", ndim=2)
    compress_folder(source, tmp_path / "dst", HALF)
    predict_folder(tmp_path / "dst", images, tmp_path / "out", mirroring=False)
    assert segmentation(tmp_path / "out" / "b.nii.gz").shape == (14, 19, 17)


def test_full_rank_segments_as_the_dense_model(tmp_path, tiny_model, images):
    compress_folder(tiny_model, tmp_path / "full", CompressionConfig(factor=1.0, only_if_cheaper=False))
    for name, model in (("dense", tiny_model), ("tucker", tmp_path / "full")):
        predict_folder(model, images, tmp_path / name, mirroring=False, precision="fp32")
    for case in ("a", "b"):
        dense, tucker = (segmentation(tmp_path / n / f"{case}.nii.gz") for n in ("dense", "tucker"))
        assert (dense == tucker).float().mean() > 0.999


def test_decomposes_nothing(tmp_path, tiny_model, compressed, images, monkeypatch):
    """The reference code of the paper decomposed the model again for every case."""

    class DecompositionRan(Exception):
        pass

    def refuse(*_, **__):
        raise DecompositionRan

    for library in (numpy.linalg, torch.linalg):
        for function in ("svd", "eigh"):
            monkeypatch.setattr(library, function, refuse)
    with pytest.raises(DecompositionRan):
        compress_folder(tiny_model, tmp_path / "again", HALF)
    predict_folder(compressed, images, tmp_path / "out", mirroring=False)


def functions_of_nnunet() -> dict[tuple[str, str], int]:
    """Every function and method in nnunetv2's loaded modules, by identity."""
    result = {}
    for module_name, module in list(sys.modules.items()):
        if module_name.split(".")[0] not in ("nnunetv2", "dynamic_network_architectures"):
            continue
        for name, value in vars(module).items():
            if isinstance(value, types.FunctionType):
                result[module_name, name] = id(value)
            elif isinstance(value, type) and value.__module__ == module_name:
                members = vars(value).items()
                result |= {(f"{module_name}.{name}", k): id(v) for k, v in members if callable(v)}
    return result


def test_replaces_no_function_of_nnunet(tmp_path, tiny_model, images):
    before = functions_of_nnunet()
    predictor = nnunetv2.inference.predict_from_raw_data.nnUNetPredictor
    assert (f"{predictor.__module__}.nnUNetPredictor", "predict_from_files") in before
    compress_folder(tiny_model, tmp_path / "dst", HALF)
    predict_folder(tmp_path / "dst", images, tmp_path / "out", mirroring=False)
    after = functions_of_nnunet()
    assert {key: after[key] for key in before} == before


def test_out_of_memory_passes_unchanged(tmp_path, compressed, images, blocks):
    problem = torch.OutOfMemoryError("CUDA out of memory")

    def fail(*_):
        raise problem

    blocks(fail)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        predict_folder(compressed, images, tmp_path / "out")
    assert caught.value is problem
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("kind", ["SimpleITK", "system"])
def test_full_disk(tmp_path, compressed, images, monkeypatch, kind):
    write = SimpleITK.WriteImage

    def refuse(image, path, *rest):
        if kind == "SimpleITK":
            return write(image, str(tmp_path / "no such folder" / "a.nii.gz"), *rest)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SimpleITK, "WriteImage", refuse)
    with pytest.raises(OutputWriteError, match=r"b\.nii\.gz cannot be written .*choose another output"):
        predict_folder(compressed, images, tmp_path / "out", cases=["b"], mirroring=False)
    assert list((tmp_path / "out").iterdir()) == []


def test_an_image_that_cannot_be_read(tmp_path, compressed, images):
    (images / "b_0000.nii.gz").write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"case b cannot be read .*b_0000\.nii\.gz"):
        predict_folder(compressed, images, tmp_path / "out", cases=["b"])
    assert list((tmp_path / "out").iterdir()) == []


def test_a_trainer_that_nnunet_does_not_know(tmp_path, images):
    model = make_model(tmp_path / "src", trainer="nnUNetTrainerOfSomebodyElse")
    with pytest.raises(ModelFolderError, match=r"nnUNetTrainerOfSomebodyElse.*nnUNet_extTrainer"):
        predict_folder(model, images, tmp_path / "out")


def test_truncated_checkpoint_of_a_later_fold(tmp_path, images):
    model = make_model(tmp_path / "src", folds=(0, 1))
    path = model / "fold_1" / "checkpoint_final.pth"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"fold_1.*truncated"):
        predict_folder(model, images, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_no_images(tmp_path, compressed):
    with pytest.raises(ModelFolderError, match="is no folder"):
        predict_folder(compressed, tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelFolderError, match="it is empty"):
        predict_folder(compressed, tmp_path / "empty", tmp_path / "out")
    write_image(tmp_path / "odd" / "patient.nii.gz", (8, 8, 8))
    with pytest.raises(ModelFolderError, match=r"CASE_0000\.nii\.gz.*it holds patient\.nii\.gz"):
        predict_folder(compressed, tmp_path / "odd", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_is_no_place_for_segmentations(tmp_path, compressed, images):
    """nnU-Net writes plans.json beside its segmentations, and would break a model that lies there."""
    trained = make_model(tmp_path / "trained")
    before = (trained / "plans.json").read_bytes()
    with pytest.raises(OutputExistsError, match="trained model"):
        predict_folder(compressed, images, trained, overwrite=True)
    other = tmp_path / "other"
    other.mkdir()
    (other / "plans.json").write_text("{}")
    with pytest.raises(OutputExistsError, match="another model"):
        predict_folder(compressed, images, other)
    assert (trained / "plans.json").read_bytes() == before and (other / "plans.json").read_text() == "{}"


def test_wrong_channels(tmp_path, images):
    model = make_model(tmp_path / "two_channels", channels=2)
    with pytest.raises(ShapeError, match=r"case a .* channels 0000; .* trained on 2 \(0000, 0001\)"):
        predict_folder(model, images, tmp_path / "out")
    write_image(images / "a_0001.nii.gz", (32, 30, 16))
    with pytest.raises(ShapeError, match="case b"):
        predict_folder(model, images, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_existing_segmentation(tmp_path, compressed, images):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "b.nii.gz").write_text("precious")
    with pytest.raises(OutputExistsError, match=r"b\.nii\.gz exists"):
        predict_folder(compressed, images, tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["b.nii.gz"]
    predict_folder(compressed, images, tmp_path / "out", cases=["b"], mirroring=False, overwrite=True)
    assert segmentation(tmp_path / "out" / "b.nii.gz").shape == (14, 19, 17)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"device": "warp"}, DeviceError, "warp"),
        ({"device": "xpu"}, DeviceError, "can use cpu"),
        ({"cases": ["c"]}, ConfigError, "no case c; it holds a, b"),
        ({"step_size": 0}, ConfigError, "step_size 0"),
        ({"folds": [4]}, ModelFolderError, "fold 4"),
    ],
)
def test_bad_options(tmp_path, compressed, images, options, error, message):
    with pytest.raises(error, match=message):
        predict_folder(compressed, images, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_cascade(tmp_path, tiny_model, images):
    plans = json.loads((tiny_model / "plans.json").read_text())
    plans["configurations"]["3d_fullres"]["previous_stage"] = "3d_lowres"
    (tiny_model / "plans.json").write_text(json.dumps(plans))
    with pytest.raises(ConfigError, match="cascade"):
        predict_folder(tiny_model, images, tmp_path / "out")


def stock_prediction(model: Path, images: Path, output: Path, repo_root: Path) -> None:
    """nnU-Net's own command in a fresh process, which meets tucker_ops through plans.json only."""
    command = Path(sys.executable).with_name("nnUNetv2_predict_from_modelfolder")
    arguments = "-f 0 -device cpu -npp 1 -nps 1 --disable_tta --disable_progress_bar".split()
    done = subprocess.run(
        [str(command), "-i", str(images), "-o", str(output), "-m", str(model), *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(repo_root)},
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "config", [HALF, CompressionConfig(params=0.15, min_rank=4, align=4)], ids=["channels", "taps"]
)
def test_stock_nnunet_predicts_the_same(tmp_path, tiny_model, config, images, repo_root):
    compressed = tmp_path / "compressed"
    manifest = compress_folder(tiny_model, compressed, config)
    assert any(len(ranks) == 3 for ranks in manifest.plan.ranks.values()) == (config is not HALF)
    stock_prediction(compressed, images, tmp_path / "stock", repo_root)
    predict_folder(compressed, images, tmp_path / "ours", mirroring=False)
    for case in ("a", "b"):
        stock, ours = (segmentation(tmp_path / n / f"{case}.nii.gz") for n in ("stock", "ours"))
        assert len(ours.unique()) > 1
        # The weights of this network are random, and stock nnU-Net sums tiles up in float16.
        assert (stock == ours).float().mean() > 0.99


def test_stock_nnunet_at_full_rank_segments_as_the_trained_dense_model(tmp_path, hippocampus, repo_root):
    """A real trained model, every eligible layer factorised, both predicted by nnU-Net's own command."""
    images = tmp_path / "images"
    images.mkdir()
    example = repo_root / "examples" / "hippocampus" / "images" / "hippocampus_011_0000.nii.gz"
    (images / example.name).symlink_to(example)
    full_rank = CompressionConfig(factor=1.0, only_if_cheaper=False)
    manifest = compress_folder(hippocampus, tmp_path / "full", full_rank, dtype=torch.float32)
    assert len(manifest.plan.ranks) > 15
    found = {}
    for name, model in {"dense": hippocampus, "full": tmp_path / "full"}.items():
        stock_prediction(model, images, tmp_path / name, repo_root)
        found[name] = segmentation(tmp_path / name / "hippocampus_011.nii.gz")
    assert len(found["dense"].unique()) == 3
    assert (found["dense"] == found["full"]).float().mean() > 0.9999


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_predicts_as_the_cpu(tmp_path, compressed, images):
    for device in ("cpu", "cuda"):
        summary = predict_folder(compressed, images, tmp_path / device, mirroring=False, device=device)
    assert summary.peak_cuda_bytes > 0
    for case in ("a", "b"):
        cpu, cuda = (segmentation(tmp_path / n / f"{case}.nii.gz") for n in ("cpu", "cuda"))
        assert (cpu == cuda).float().mean() > 0.98
