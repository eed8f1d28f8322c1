"""`tucker-ops compress --calibrate DIR --refine STEPS`: nearer to the dense model, without labels."""

from __future__ import annotations

import json
import math
import sys

import pytest
import torch
from test_cli_compress import shell  # noqa: F401
from tiny import make_model, write_image

from tucker_ops.convert import CompressionConfig
from tucker_ops.convert.refine import distance
from tucker_ops.errors import ConfigError, ImageError, ResumeError
from tucker_ops.nnunet import calibration, refinement
from tucker_ops.nnunet.calibration import CalibrationPatches, CalibrationSet
from tucker_ops.nnunet.checkpoint import read_checkpoint
from tucker_ops.nnunet.compress import compress_folder, load_network
from tucker_ops.nnunet.folder import read_model_folder
from tucker_ops.nnunet.manifest import read_manifest
from tucker_ops.nnunet.patches import mirrorings
from tucker_ops.nnunet.predict import predict_folder
from tucker_ops.nnunet.refinement import Refinement
from tucker_ops.nnunet.sweep import sweep_folder

SMALL = CompressionConfig(params=0.4, min_rank=4, align=4)


@torch.no_grad()
def distance_to_dense(folder, dense, data, fold=0):
    """On the patches as they are, by nnU-Net's own loading."""
    source = read_model_folder(dense, folds=(fold,))
    networks = [load_network(read_model_folder(m, folds=(fold,)), fold) for m in (folder, dense)]
    patches = list(CalibrationPatches(source, data, fold).read(lambda *_: None))
    return sum(float(distance(*(network(x) for network in networks))) for x in patches) / len(patches)


@pytest.mark.parametrize(("network", "ndim"), [("PlainConvUNet", 3), ("ResidualEncoderUNet", 2)])
def test_refined_folder(tmp_path, images, network, ndim):
    model = make_model(tmp_path / "model", network=network, ndim=ndim, folds=(0, 1))
    data = CalibrationSet(images, patches=4)
    compress_folder(model, tmp_path / "plain", SMALL, calibrate=data)
    seen = []
    manifest = compress_folder(
        model, tmp_path / "out", SMALL, calibrate=data, refine=Refinement(data, 20),
        progress=lambda label, done, total: seen.append((label, done, total)),
    )  # fmt: skip
    assert manifest == read_manifest(tmp_path / "out")
    described = manifest.refinement
    assert described["steps"] == 20 and "4 patches of" in described["source"]
    assert str(images) not in json.dumps(manifest.to_dict())
    for fold in (0, 1):
        outcome = described["folds"][str(fold)]
        assert outcome["after"] < outcome["before"] and outcome["reason"] == ""
        assert (f"refining fold {fold}", 20, 20) in seen
        plain, refined = (distance_to_dense(tmp_path / name, model, data, fold) for name in ("plain", "out"))
        assert refined < 0.9 * plain
    predict_folder(tmp_path / "out", images, tmp_path / "pred", folds=(0, 1), mirroring=False)
    again = compress_folder(model, tmp_path / "again", SMALL, calibrate=data, refine=Refinement(data, 20))
    assert again.refinement == described


def test_a_trained_model_loses_far_less(tmp_path, hippocampus, repo_root):
    """At a fiftieth of the parameters, where a random network would have nothing to lose."""
    images = repo_root / "examples" / "hippocampus" / "images"
    data = CalibrationSet(images, patches=4)
    config = CompressionConfig(params=0.03)
    made = [
        compress_folder(
            hippocampus, tmp_path / name, config, dtype=torch.float32, calibrate=data, refine=refine
        )
        for name, refine in (("out", Refinement(data, 15)), ("plain", None))
    ]
    (outcome,) = made[0].refinement["folds"].values()
    assert outcome["after"] < 0.5 * outcome["before"]
    # Layers with a rank of the taps learn in that too.
    weights = [
        read_checkpoint(tmp_path / name / "fold_0" / "checkpoint_final.pth")["network_weights"]
        for name in ("out", "plain")
    ]
    taps = [name for name in weights[0] if name.endswith("u_taps")]
    assert taps and not any(torch.equal(*(w[name] for w in weights)) for name in taps)


def test_mirrorings():
    assert mirrorings(None) == mirrorings(()) == [()]
    assert mirrorings((1,)) == [(3,), ()]
    ways = mirrorings((0, 1, 2))
    assert ways.count(()) == 7 and len(set(ways)) == 8 and set(ways) >= {(2,), (2, 3, 4), (3, 4)}
    inputs = refinement._Mirrored([torch.arange(8.0).reshape(1, 1, 2, 2, 2)] * 3, ways)
    assert len(inputs) == 42
    shown = {tuple(inputs[number].flatten().tolist()) for number in range(14)}
    assert len(shown) == 8


def test_without_mirroring_axes_nothing_is_mirrored(tmp_path, images, monkeypatch):
    model = make_model(tmp_path / "model")
    checkpoint = model / "fold_0" / "checkpoint_final.pth"
    content = torch.load(checkpoint, weights_only=False)
    content["inference_allowed_mirroring_axes"] = None
    torch.save(content, checkpoint)
    counts = []
    refine = refinement.convert.refine
    monkeypatch.setattr(
        refinement.convert, "refine", lambda *a, **k: counts.append(len(a[2])) or refine(*a, **k)
    )
    manifest = compress_folder(
        model, tmp_path / "out", SMALL, refine=Refinement(CalibrationSet(images, patches=2), 2), trust=True
    )
    assert counts == [2] and manifest.refinement["mirror_axes"] == []


def test_what_came_no_nearer_is_said(tmp_path, tiny_model, images, shell, monkeypatch):  # noqa: F811
    # The package has a function of the module's name.
    monkeypatch.setattr(sys.modules["tucker_ops.convert.refine"], "RATE", 1e3)
    arguments = ("--min-rank", 4, "--align", 4, "--params", 0.4, "--calibrate", images, "--refine", 3)
    code, out, err = shell("compress", tiny_model, "-o", tmp_path / "out", *arguments)
    assert code == 0, err
    said = " ".join(out.split())
    assert "Fold 0 not refined: 3 steps at" in said and "not kept" in said
    outcome = read_manifest(tmp_path / "out").refinement["folds"]["0"]
    assert "came no nearer" in outcome["reason"] and math.isfinite(outcome["before"])
    data = CalibrationSet(images)
    compress_folder(tiny_model, tmp_path / "plain", SMALL, calibrate=data)
    weights = [
        torch.load(tmp_path / name / "fold_0" / "checkpoint_final.pth", weights_only=True)["network_weights"]
        for name in ("out", "plain")
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])


def test_command_line(tmp_path, tiny_model, images, shell):  # noqa: F811
    small = ("--min-rank", 4, "--align", 4, "--params", 0.4)
    code, out, err = shell(
        "compress", tiny_model, "-o", tmp_path / "out", *small, "--calibrate", images, "--refine", 5
    )
    assert code == 0, err
    assert "refined, fold 0" in out and "nats a voxel" in " ".join(out.split())
    outcome = read_manifest(tmp_path / "out").refinement["folds"]["0"]
    assert f"Fold 0 refined in {outcome['precision']}" in " ".join(out.split())
    arguments = ("--calibrate", images, "--refine", 5, "--refine-precision", "bf16")
    code, out, err = shell("compress", tiny_model, "-o", tmp_path / "low", *small, *arguments)
    assert code == 0, err
    assert "Fold 0 refined in bf16, as asked for" in " ".join(out.split())
    for arguments, message in (
        (("--refine", 5), "--refine learns from the images of --calibrate, which is missing"),
        (("--refine", 0, "--calibrate", images), "a whole number of steps of at least 1, got 0"),
        (("--refine-precision", "fp32"), "--refine-precision is that of --refine, which is missing"),
        (
            ("--refine", 5, "--calibrate", images, "--refine-precision", "fp16"),
            "the precision of refining is one of auto, fp32, bf16, got 'fp16'",
        ),
    ):
        code, _, err = shell("compress", tiny_model, "-o", tmp_path / "no", *small, *arguments)
        assert code == 2 and message in " ".join(err.split())
        assert not (tmp_path / "no").exists()


def test_nothing_is_left_of_what_failed(tmp_path, tiny_model, images):
    def stop(label, done, total):
        if label.startswith("refining") and done == 2:
            raise KeyboardInterrupt

    data = CalibrationSet(images, patches=2)
    there = sorted(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt):
        compress_folder(tiny_model, tmp_path / "out", SMALL, refine=Refinement(data, 5), progress=stop)
    (images / "b_0000.nii.gz").write_bytes(b"damaged")
    with pytest.raises(ImageError):
        compress_folder(tiny_model, tmp_path / "out", SMALL, refine=Refinement(data, 5))
    assert sorted(tmp_path.iterdir()) == there


def test_validation_cases_are_left_out(tmp_path, images):
    """Were it opened, each fold's validation case would stop the run."""
    model = make_model(tmp_path / "model", folds=(0,))
    splits = tmp_path / "splits_final.json"
    splits.write_text(json.dumps([{"train": ["a"], "val": ["b"]}]))
    (images / "b_0000.nii.gz").write_bytes(b"not to be opened")
    data = CalibrationSet(images, splits=splits, patches=1)
    manifest = compress_folder(model, tmp_path / "out", SMALL, refine=Refinement(data, 1))
    assert "1 patches of 16×16×16 from 1 cases" in manifest.refinement["source"]
    with pytest.raises(ConfigError, match="b is a validation case of fold 0"):
        wrong = CalibrationSet(images, splits=splits, cases=("b",))
        compress_folder(model, tmp_path / "no", SMALL, refine=Refinement(wrong, 1))


def test_of_many_cases_only_some_are_read(tmp_path, tiny_model, images, monkeypatch):
    """Evenly among all: of two, the first."""
    monkeypatch.setattr(calibration, "MOST_CASES", 1)
    (images / "b_0000.nii.gz").write_bytes(b"not to be opened")
    data = CalibrationSet(images, patches=1)
    manifest = compress_folder(
        tiny_model, tmp_path / "out", SMALL, calibrate=data, refine=Refinement(data, 1)
    )
    for told in (manifest.refinement, manifest.calibration):
        assert "1 patches of 16×16×16 from 1 of 2 cases" in told["source"]
    # Asked for more, or for a case by its name, it is read.
    for wanted in (CalibrationSet(images, patches=2), CalibrationSet(images, cases=("b",), patches=1)):
        with pytest.raises(ImageError, match="b_0000"):
            compress_folder(tiny_model, tmp_path / "other", SMALL, calibrate=wanted)


def test_sweep_refines_each_but_the_published_rule(tmp_path, tiny_model, images):
    write_image(tmp_path / "more" / "c_0000.nii.gz", (20, 20, 18), seed=3)
    data = CalibrationSet(tmp_path / "more", patches=1)
    configs = [SMALL, CompressionConfig.weber2024(0.5)]
    options = {"calibrate": data, "refine": Refinement(data, 2)}
    sweep_folder(tiny_model, tmp_path / "out", images, configs, **options)
    made = {
        path.name.split("_")[0]: read_manifest(path).refinement
        for path in (tmp_path / "out" / "models").iterdir()
    }
    assert {name[:5]: value is not None for name, value in made.items()} == {"param": True, "weber": False}
    with pytest.raises(ResumeError, match="another refine"):
        sweep_folder(
            tiny_model, tmp_path / "out", images, configs, calibrate=data, refine=Refinement(data, 3)
        )
    with pytest.raises(ResumeError, match="another refine"):
        other = Refinement(CalibrationSet(images, patches=1), 2)
        sweep_folder(tiny_model, tmp_path / "out", images, configs, calibrate=data, refine=other)
