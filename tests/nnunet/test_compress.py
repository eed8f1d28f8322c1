"""Compressed model folders: what is in them, and that a failure leaves nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from tiny import make_model

from tucker_ops.convert import CompressionConfig
from tucker_ops.errors import (
    CheckpointError,
    ConfigError,
    ConversionError,
    DtypeError,
    ModelFolderError,
    OutputExistsError,
    OutputWriteError,
    UnsupportedArchitectureError,
)
from tucker_ops.nnunet import compress as compress_module
from tucker_ops.nnunet.checkpoint import read_checkpoint, sha256
from tucker_ops.nnunet.compress import compress_folder, compress_tree, load_network, plan_folder, stored_bytes
from tucker_ops.nnunet.folder import read_model_folder
from tucker_ops.nnunet.manifest import MANIFEST_NAME, read_manifest

HALF = CompressionConfig(factor=0.5, min_rank=4, align=4)
FULL_RANK = CompressionConfig(factor=1.0, only_if_cheaper=False)


def files(path):
    return sorted(str(p.relative_to(path)) for p in path.rglob("*"))


@pytest.mark.parametrize("old_format", [False, True])
@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("network", ["PlainConvUNet", "ResidualEncoderUNet"])
def test_every_kind_of_network(tmp_path, network, ndim, old_format):
    source = make_model(tmp_path / "src", network=network, ndim=ndim, old_format=old_format)
    manifest = compress_folder(source, tmp_path / "dst", HALF)
    folder = read_model_folder(tmp_path / "dst")
    assert folder.is_compressed
    assert folder.architecture["network_class_name"] == f"tucker_ops.nnunet.networks.Tucker{network}"
    assert manifest.verification == "nnUNetPredictor"
    assert manifest.tucker.parameters < manifest.dense.parameters
    assert manifest.tucker.macs < manifest.dense.macs
    assert manifest.tucker.file_bytes < manifest.dense.file_bytes / 2
    assert 0 < max(manifest.mean_errors().values()) < 1
    assert set(manifest.mean_errors()) == set(manifest.plan.ranks)
    dense = read_model_folder(source).architecture
    kept = {k: v for k, v in folder.architecture["arch_kwargs"].items() if k != "tucker"}
    assert kept == dense["arch_kwargs"]


def test_what_is_written(tmp_path, tiny_model):
    compress_folder(tiny_model, tmp_path / "dst", HALF)
    assert files(tmp_path / "dst") == [
        "NOTICE",
        "dataset.json",
        "dataset_fingerprint.json",
        "fold_0",
        "fold_0/checkpoint_final.pth",
        "plans.json",
        MANIFEST_NAME,
    ]
    checkpoint = torch.load(tmp_path / "dst" / "fold_0" / "checkpoint_final.pth", weights_only=True)
    assert checkpoint.pop("network_weights")
    assert checkpoint == {
        "trainer_name": "nnUNetTrainer",
        "init_args": {"configuration": "3d_fullres", "fold": 0},
        "inference_allowed_mirroring_axes": (0, 1, 2),
    }
    before, after = (json.loads((p / "plans.json").read_text()) for p in (tiny_model, tmp_path / "dst"))
    assert before["configurations"].pop("3d_fullres") != after["configurations"].pop("3d_fullres")
    assert before == after


def test_other_configurations_keep_their_network(tmp_path, tiny_model):
    plans = json.loads((tiny_model / "plans.json").read_text())
    plans["configurations"]["3d_big_batch"] = {"inherits_from": "3d_fullres", "batch_size": 8}
    (tiny_model / "plans.json").write_text(json.dumps(plans))
    compress_folder(tiny_model, tmp_path / "dst", HALF)
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    for name, tucker in (("3d_fullres", True), ("3d_big_batch", False)):
        kwargs = PlansManager(str(tmp_path / "dst" / "plans.json")).get_configuration(name)
        assert ("tucker" in kwargs.network_arch_init_kwargs) == tucker


def test_weights_are_stored_once(tmp_path, tiny_model):
    manifest = compress_folder(tiny_model, tmp_path / "dst", HALF)
    path = tmp_path / "dst" / "fold_0" / "checkpoint_final.pth"
    weights = read_checkpoint(path)["network_weights"]
    assert manifest.tucker.weight_bytes == stored_bytes(weights) == 4 * manifest.tucker.parameters
    assert path.stat().st_size == manifest.tucker.file_bytes < 4 * manifest.tucker.parameters + 100_000
    core = "encoder.stages.0.0.convs.1.conv.core"
    assert set(weights) >= {core, f"decoder.{core}"}


def test_several_folds_share_ranks(tmp_path):
    source = make_model(tmp_path / "src", folds=(0, 2, "all"))
    manifest = compress_folder(source, tmp_path / "dst", HALF, folds=[0, 2, "all"])
    assert list(manifest.errors) == ["0", "2", "all"]
    assert manifest.errors["0"] != manifest.errors["2"]
    assert len(set(manifest.source_sha256.values())) == 3
    assert read_model_folder(tmp_path / "dst").folds == (0, 2, "all")
    one = compress_folder(source, tmp_path / "one", HALF, folds=["2"])
    assert list(one.errors) == ["2"]
    assert one.plan.ranks == manifest.plan.ranks


def test_manifest_survives_the_file(tmp_path, tiny_model):
    manifest = compress_folder(tiny_model, tmp_path / "dst", HALF)
    read = read_manifest(tmp_path / "dst")
    assert read.to_dict() == manifest.to_dict()
    assert read.config == HALF and read.plan.ranks == manifest.plan.ranks
    assert read.source_sha256 == {
        "fold_0/checkpoint_final.pth": sha256(tiny_model / "fold_0" / "checkpoint_final.pth")
    }
    assert read.versions["torch"] == torch.__version__
    text = (tmp_path / "dst" / MANIFEST_NAME).read_text()
    assert str(tmp_path) not in text, "the manifest must not give away where the user keeps models"
    with pytest.raises(ModelFolderError, match="tucker-ops compress"):
        read_manifest(tiny_model)


@pytest.mark.parametrize(
    ("stored", "asked", "expected"),
    [
        (torch.float16, None, torch.float16),
        (torch.float32, torch.float16, torch.float16),
        (torch.float16, torch.float32, torch.float32),
    ],
)
def test_dtype(tmp_path, stored, asked, expected):
    source = make_model(tmp_path / "src", dtype=stored)
    manifest = compress_folder(source, tmp_path / "dst", HALF, dtype=asked)
    weights = read_checkpoint(tmp_path / "dst" / "fold_0" / "checkpoint_final.pth")["network_weights"]
    assert {w.dtype for w in weights.values()} == {expected}
    assert manifest.dtype == str(expected).removeprefix("torch.")


def test_full_rank_computes_the_same(tmp_path, tiny_model):
    manifest = compress_folder(tiny_model, tmp_path / "dst", FULL_RANK)
    assert max(manifest.mean_errors().values()) < 1e-5
    x = torch.randn(1, 1, 16, 16, 16)
    with torch.inference_mode():
        dense = load_network(read_model_folder(tiny_model), 0)(x)
        tucker = load_network(read_model_folder(tmp_path / "dst"), 0)(x)
    assert (tucker - dense).abs().max() <= 1e-4 * dense.abs().max()


def test_hippocampus_at_full_rank(tmp_path, hippocampus):
    """Every eligible convolution of the trained model is factorised, and the logits stay."""
    manifest = compress_folder(hippocampus, tmp_path / "dst", FULL_RANK, dtype=torch.float32)
    assert len(manifest.plan.ranks) > 15
    assert all(layer.ranks == (layer.spec.in_channels, layer.spec.out_channels) or layer.reason
               for layer in manifest.plan.layers)  # fmt: skip
    x = torch.randn(1, 1, 40, 56, 40)
    with torch.inference_mode():
        dense = load_network(read_model_folder(hippocampus), 0)(x)
        tucker = load_network(read_model_folder(tmp_path / "dst"), 0)(x)
    assert (tucker - dense).abs().max() <= 1e-4 * dense.abs().max()


def test_hippocampus_at_three_tenths(tmp_path, hippocampus):
    manifest = compress_folder(hippocampus, tmp_path / "dst", CompressionConfig(factor=0.3))
    assert manifest.tucker.parameters <= 0.13 * manifest.dense.parameters
    size = (tmp_path / "dst" / "fold_0" / "checkpoint_final.pth").stat().st_size
    assert size <= 0.13 * (hippocampus / "fold_0" / "checkpoint_final.pth").stat().st_size
    assert (tmp_path / "dst" / "NOTICE").read_text() == (hippocampus.parent / "NOTICE").read_text()


def test_plan_writes_nothing(tmp_path, tiny_model):
    before = files(tmp_path)
    plan = plan_folder(tiny_model, HALF)
    assert files(tmp_path) == before
    assert plan.ranks == compress_folder(tiny_model, tmp_path / "dst", HALF).plan.ranks


def test_progress(tmp_path, tiny_model):
    calls = []
    compress_folder(tiny_model, tmp_path / "dst", HALF, progress=lambda *call: calls.append(call))
    assert [done for _, done, _ in calls] == sorted(done for _, done, _ in calls)
    assert calls[-1][1] == calls[-1][2] and any("fold 0" in label for label, _, _ in calls)


def test_a_tree_keeps_its_names(tmp_path):
    names = [
        "Dataset297_Fast/nnUNetTrainer__nnUNetPlans__3d_fullres",
        "Dataset298_Faster/tr__nnUNetPlans__2d",
    ]
    for name, ndim in zip(names, (3, 2), strict=True):
        make_model(tmp_path / "weights" / name, ndim=ndim)
    manifests = compress_tree(tmp_path / "weights", tmp_path / "small", HALF)
    assert list(manifests) == [tmp_path / "small" / name for name in names]
    assert all(read_model_folder(path).is_compressed for path in manifests)
    with pytest.raises(OutputExistsError, match="--force"):
        compress_tree(tmp_path / "weights", tmp_path / "small", HALF)
    (tmp_path / "weights" / names[1] / "fold_0" / "checkpoint_final.pth").write_bytes(b"broken")
    with pytest.raises(CheckpointError):
        compress_tree(tmp_path / "weights", tmp_path / "other", HALF)
    assert not (tmp_path / "other").exists()


def test_a_trainer_that_nnunet_does_not_know(tmp_path):
    source = make_model(tmp_path / "src", trainer="nnUNetTrainerOfSomebodyElse")
    with pytest.warns(UserWarning, match=r"nnUNetTrainerOfSomebodyElse.*nnUNet_extTrainer"):
        manifest = compress_folder(source, tmp_path / "dst", HALF)
    assert manifest.trainer_name == "nnUNetTrainerOfSomebodyElse"
    assert manifest.verification == "get_network_from_plans"


def truncate(model):
    path = model / "fold_0" / "checkpoint_final.pth"
    path.write_bytes(path.read_bytes()[:1000])


def name_another_network(model):
    text = (model / "plans.json").read_text()
    (model / "plans.json").write_text(text.replace("unet.PlainConvUNet", "swin.SwinUNETR"))


def change_the_network(model):
    plans = json.loads((model / "plans.json").read_text())
    plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["conv_bias"] = False
    (model / "plans.json").write_text(json.dumps(plans))


BAD_SOURCES = {
    "no model": (lambda model: (model / "dataset.json").unlink(), {}, ModelFolderError, "dataset.json"),
    "fold": (lambda model: None, {"folds": [3]}, ModelFolderError, "fold 3"),
    "checkpoint": (
        lambda model: None,
        {"checkpoint": "checkpoint_best.pth"},
        ModelFolderError,
        "checkpoint_best",
    ),
    "truncated": (truncate, {}, CheckpointError, "truncated"),
    "unknown network": (name_another_network, {}, UnsupportedArchitectureError, "SwinUNETR"),
    "other weights": (change_the_network, {}, UnsupportedArchitectureError, "do not fit"),
    "dtype": (lambda model: None, {"dtype": torch.int8}, DtypeError, "int8"),
}


@pytest.mark.parametrize("case", BAD_SOURCES)
def test_bad_source_writes_nothing(tmp_path, tiny_model, case):
    spoil, options, error, message = BAD_SOURCES[case]
    spoil(tiny_model)
    before = files(tmp_path)
    with pytest.raises(error, match=message):
        compress_folder(tiny_model, tmp_path / "new" / "dst", HALF, **options)
    assert files(tmp_path) == before


def test_nothing_to_factorise(tmp_path, tiny_model):
    with pytest.raises(ConfigError, match="no layer"):
        compress_folder(tiny_model, tmp_path / "dst", CompressionConfig(factor=1.0))
    assert not (tmp_path / "dst").exists()


def test_compressed_already(tmp_path, tiny_model):
    compress_folder(tiny_model, tmp_path / "dst", HALF)
    with pytest.raises(UnsupportedArchitectureError, match="compressed already"):
        compress_folder(tmp_path / "dst", tmp_path / "twice", HALF)


def test_existing_output(tmp_path, tiny_model):
    compress_folder(tiny_model, tmp_path / "dst", HALF)
    before = (tmp_path / "dst" / "plans.json").read_text()
    with pytest.raises(OutputExistsError, match="--force"):
        compress_folder(tiny_model, tmp_path / "dst", CompressionConfig(factor=0.25, min_rank=4, align=4))
    assert (tmp_path / "dst" / "plans.json").read_text() == before
    compress_folder(
        tiny_model, tmp_path / "dst", CompressionConfig(factor=0.25, min_rank=4, align=4), force=True
    )
    assert (tmp_path / "dst" / "plans.json").read_text() != before
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_force_replaces_only_what_we_wrote(tmp_path, tiny_model):
    """A trained model, or a results folder that holds anything else, survives --force."""
    trained = make_model(tmp_path / "trained")
    before = files(trained)
    with pytest.raises(OutputExistsError, match="no earlier output"):
        compress_folder(tiny_model, trained, HALF, force=True)
    assert files(trained) == before

    weights, results = tmp_path / "weights", tmp_path / "small"
    make_model(weights / "Dataset001_A" / "nnUNetTrainer__nnUNetPlans__3d_fullres")
    compress_tree(weights, results, HALF)
    compress_tree(weights, results, HALF, force=True)
    (results / "important.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match="no earlier output"):
        compress_tree(weights, results, HALF, force=True)
    assert (results / "important.txt").read_text() == "mine"


def test_a_tree_with_totalsegmentators_names(tmp_path):
    """Its trainers' folder names, no mirroring, and what nnU-Net leaves beside models."""
    name = "Dataset297_Fast/nnUNetTrainer_4000epochs_NoMirroring__nnUNetPlans__3d_fullres"
    source = make_model(tmp_path / "weights" / name)
    path = source / "fold_0" / "checkpoint_final.pth"
    checkpoint = read_checkpoint(path) | {"inference_allowed_mirroring_axes": None}
    torch.save(checkpoint, path)
    leftovers = source / "crossval_results_folds_0"
    leftovers.mkdir()
    for part in ("plans.json", "dataset.json"):
        (leftovers / part).write_bytes((source / part).read_bytes())
    compress_tree(tmp_path / "weights", tmp_path / "small", HALF)
    written = read_checkpoint(tmp_path / "small" / name / "fold_0" / "checkpoint_final.pth")
    assert written["inference_allowed_mirroring_axes"] is None
    assert [p.name for p in (tmp_path / "small").iterdir()] == ["Dataset297_Fast"]


@pytest.mark.parametrize("signal_name", ["SIGTERM", "SIGHUP"])
def test_a_batch_system_ending_the_job_leaves_nothing(tmp_path, hippocampus, signal_name):
    command = [
        sys.executable,
        "-m",
        "tucker_ops",
        "compress",
        str(hippocampus),
        "-o",
        str(tmp_path / "a" / "dst"),
    ]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not list(tmp_path.glob("a/.dst.*")):
            time.sleep(0.02)
        process.send_signal(getattr(signal, signal_name))
        assert process.wait(60) == 128 + getattr(signal, signal_name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("where", [".", "inside", ".."])
def test_output_must_not_overlap_the_source(tmp_path, tiny_model, where):
    before = files(tmp_path)
    with pytest.raises(OutputExistsError, match="overlap"):
        compress_folder(tiny_model, tiny_model / where, HALF, force=True)
    assert files(tmp_path) == before


def test_wrong_logits_are_not_written(tmp_path, tiny_model, monkeypatch):
    """A folder from which nnU-Net computes something else than the network in memory must not appear."""
    serialise = compress_module.serialise

    def disturbed(checkpoint):
        checkpoint["network_weights"]["decoder.seg_layers.1.weight"] *= 1.01
        return serialise(checkpoint)

    monkeypatch.setattr(compress_module, "serialise", disturbed)
    before = files(tmp_path)
    with pytest.raises(ConversionError, match=r"differs from the compressed network"):
        compress_folder(tiny_model, tmp_path / "dst", HALF)
    assert files(tmp_path) == before


@pytest.mark.parametrize("step", ["serialise", "verify_folder"])
def test_interrupt_leaves_the_old_output(tmp_path, tiny_model, monkeypatch, step):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    compress_folder(tiny_model, tmp_path / "dst", HALF)
    before = files(tmp_path)
    monkeypatch.setattr(compress_module, step, interrupt)
    with pytest.raises(KeyboardInterrupt):
        compress_folder(tiny_model, tmp_path / "dst", HALF, force=True)
    with pytest.raises(KeyboardInterrupt):
        compress_folder(tiny_model, tmp_path / "new" / "dst", HALF)
    assert files(tmp_path) == before


FULL_DISK = """
import resource, sys
from tucker_ops.convert import CompressionConfig
from tucker_ops.errors import OutputWriteError
from tucker_ops.nnunet.compress import compress_folder
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    compress_folder(sys.argv[1], sys.argv[2], CompressionConfig(factor=0.5, min_rank=4, align=4))
except OutputWriteError as error:
    print(error)
"""


def test_full_disk(tmp_path, tiny_model, repo_root):
    before = files(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tiny_model), str(tmp_path / "new" / "dst")],
        capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": str(repo_root)},
    )  # fmt: skip
    assert "checkpoint_final.pth cannot be written (File too large)" in done.stdout
    assert "choose another output" in done.stdout
    assert files(tmp_path) == before


def test_place_that_cannot_be_written(tmp_path, tiny_model):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputWriteError, match="cannot be written"):
        compress_folder(tiny_model, tmp_path / "file" / "dst", HALF)
