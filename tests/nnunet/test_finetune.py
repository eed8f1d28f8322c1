"""Fine-tuning of small models: what is learnt, what is kept, and what survives a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import SimpleITK
import torch
from test_cli_compress import shell  # noqa: F401
from tiny import make_model, write_image
from torch.nn import functional as F

from tucker_ops.convert import CompressionConfig
from tucker_ops.errors import (
    AccuracyError,
    ConfigError,
    DeviceError,
    ModelFolderError,
    OutputExistsError,
    ResumeError,
    SegmentationError,
)
from tucker_ops.nnunet.checkpoint import read_checkpoint
from tucker_ops.nnunet.compress import compress_folder
from tucker_ops.nnunet.folder import read_model_folder
from tucker_ops.nnunet.networks import build_network
from tucker_ops.nnunet.predict import predict_folder
from tucker_ops.nnunet.training import FinetuneSettings, TrainingSet, finetune_folder
from tucker_ops.nnunet.training.distillation import distillation_loss, feature_loss

SMALL = CompressionConfig(params=0.4, min_rank=4, align=4)
# Few enough parameters for ranks of the taps.
TAPS = CompressionConfig(params=0.15, min_rank=4, align=4)
QUICK = FinetuneSettings(steps=4, steps_per_epoch=2, batch_size=2, precision="fp32")


@pytest.fixture(autouse=True)
def _augment_in_process(monkeypatch):
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    monkeypatch.delenv("nnUNet_results", raising=False)
    monkeypatch.delenv("nnUNet_preprocessed", raising=False)


@pytest.fixture
def labels(tmp_path, images):
    """Of both images: thresholds of the volume itself, so that there is something to learn."""
    folder = tmp_path / "labels"
    folder.mkdir()
    for case in "ab":
        volume = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(images / f"{case}_0000.nii.gz")))
        label = (volume > 0.2).astype(np.uint8) + (volume > 0.8)
        SimpleITK.WriteImage(
            SimpleITK.GetImageFromArray(label.astype(np.uint8)), str(folder / f"{case}.nii.gz")
        )
    return folder


@pytest.fixture
def compressed(tmp_path, tiny_model):
    compress_folder(tiny_model, tmp_path / "small", SMALL)
    return tmp_path / "small"


def weights(folder, fold=0):
    return read_checkpoint(folder / f"fold_{fold}" / "checkpoint_final.pth")["network_weights"]


def network(folder):
    model = read_model_folder(folder)
    built = build_network(model.architecture, model.input_channels, model.num_outputs)
    built.load_state_dict(weights(folder))
    return built.eval()


@pytest.mark.parametrize(
    ("kind", "ndim", "config"),
    [(kind, ndim, SMALL) for kind in ("PlainConvUNet", "ResidualEncoderUNet") for ndim in (2, 3)]
    + [(kind, 3, TAPS) for kind in ("PlainConvUNet", "ResidualEncoderUNet")],
)
def test_both_networks_in_2d_and_3d(tmp_path, images, labels, kind, ndim, config):
    dense = make_model(tmp_path / "dense", network=kind, ndim=ndim)
    compress_folder(dense, tmp_path / "small", config)
    before = weights(tmp_path / "small")
    summary = finetune_folder(
        tmp_path / "small",
        tmp_path / "tuned",
        TrainingSet(images=images, labels=labels),
        QUICK,
        teacher=dense,
    )
    assert summary.steps == 4 and summary.cases == {0: ("a", "b")} and summary.resumed_at == {}
    after = weights(tmp_path / "tuned")
    changed = [name for name in after if not torch.equal(after[name], before[name])]
    assert {name: w.dtype for name, w in after.items()} == {name: w.dtype for name, w in before.items()}
    # Heads are trained on from where they were, as everything else.
    for part in ("u_in", "core", "u_out", "norm", "seg_layers", *(["u_taps"] if config is TAPS else [])):
        assert any(part in name for name in changed), part
    heads = [name for name in after if "seg_layers" in name and name.endswith("weight")]
    assert all(F.cosine_similarity(after[n].flatten(), before[n].flatten(), dim=0) > 0.99 for n in heads)
    assert not (tmp_path / "tuned.training").exists()
    predict_folder(tmp_path / "tuned", images, tmp_path / "pred", mirroring=False)


def test_distillation_comes_nearer_to_the_dense_model(tmp_path, images, tiny_model, compressed):
    settings = FinetuneSettings(
        steps=30, learning_rate=3e-3, steps_per_epoch=10, batch_size=2, supervise=0.0, precision="fp32"
    )
    summary = finetune_folder(
        compressed, tmp_path / "tuned", TrainingSet(images=images), settings, teacher=tiny_model
    )
    before, after = summary.distances[0]
    assert 0 < after < 0.7 * before
    # As smooth as the images.
    x = F.interpolate(torch.randn(4, 1, 3, 3, 3), size=(16, 16, 16), mode="trilinear")
    with torch.no_grad():
        taught = network(tiny_model)(x)
        distances = [
            float(distillation_loss(network(folder)(x), taught, temperature=1, regions=False))
            for folder in (compressed, tmp_path / "tuned")
        ]
    assert distances[1] < 0.7 * distances[0], distances


def test_without_labels_only_the_dense_model_teaches(tmp_path, images, labels, tiny_model, compressed):
    """Its segmentations stand in for labels where patches are drawn, but are no second, harder target."""
    unlabelled, labelled = TrainingSet(images=images), TrainingSet(images=images, labels=labels)
    for name, data, weight in (("a", unlabelled, 0.0), ("b", labelled, 1.0)):
        summary = finetune_folder(compressed, tmp_path / name, data, QUICK, teacher=tiny_model)
        manifest = json.loads((tmp_path / name / "tucker_ops_manifest.json").read_text())["finetuning"]
        assert manifest["settings"]["supervise"] == weight
        assert manifest["distances"] == {"0": list(summary.distances[0])}
    asked = FinetuneSettings(steps=1, steps_per_epoch=1, supervise=0.5)
    assert asked.resolved(has_labels=False).supervise == 0.5
    nothing = FinetuneSettings(steps=1, steps_per_epoch=1, distill=0.0)
    with pytest.raises(ConfigError, match="nothing to learn from"):
        finetune_folder(compressed, tmp_path / "c", unlabelled, nothing, teacher=tiny_model)


def test_training_away_from_the_dense_model_is_refused(tmp_path, images, labels, tiny_model, compressed):
    wild = FinetuneSettings(steps=3, steps_per_epoch=3, learning_rate=1.0, batch_size=2, precision="fp32")
    with pytest.raises(AccuracyError, match=r"away from the dense model.*--learning-rate.*--restart"):
        finetune_folder(compressed, tmp_path / "a", TrainingSet(images=images), wild, teacher=tiny_model)
    assert not (tmp_path / "a").exists()
    # The same run, asked again, is judged again; a gentler one begins anew.
    with pytest.raises(AccuracyError, match="away from the dense model"):
        finetune_folder(compressed, tmp_path / "a", TrainingSet(images=images), wild, teacher=tiny_model)
    finetune_folder(
        compressed, tmp_path / "a", TrainingSet(images=images), QUICK, teacher=tiny_model, restart=True
    )
    # With labels there is more to learn than the dense model, and the distance is only told.
    data = TrainingSet(images=images, labels=labels)
    summary = finetune_folder(compressed, tmp_path / "b", data, wild, teacher=tiny_model)
    assert summary.distances[0][1] > summary.distances[0][0]


def test_features_without_labels_and_a_dense_model_without_a_teacher(
    tmp_path, images, labels, tiny_model, compressed
):
    featured = FinetuneSettings(steps=2, steps_per_epoch=2, features=1.0, distill=0.0, supervise=0.0)
    finetune_folder(compressed, tmp_path / "a", TrainingSet(images=images), featured, teacher=tiny_model)
    alone = FinetuneSettings(steps=2, steps_per_epoch=2, distill=0.0)
    finetune_folder(tiny_model, tmp_path / "b", TrainingSet(images=images, labels=labels), alone)
    for name, source in (("a", compressed), ("b", tiny_model)):
        before, after = weights(source), weights(tmp_path / name)
        assert any(not torch.equal(after[key], before[key]) for key in before)
    with pytest.raises(OutputExistsError, match="--force"):
        finetune_folder(tiny_model, tmp_path / "b", TrainingSet(images=images, labels=labels), alone)
    finetune_folder(tiny_model, tmp_path / "b", TrainingSet(images=images, labels=labels), alone, force=True)


def test_bf16_on_the_cpu(tmp_path, images, labels, tiny_model, compressed):
    settings = FinetuneSettings(steps=2, steps_per_epoch=2, precision="bf16")
    data = TrainingSet(images=images, labels=labels)
    summary = finetune_folder(compressed, tmp_path / "tuned", data, settings, teacher=tiny_model)
    assert summary.precision == "bf16: as asked"
    automatic = FinetuneSettings(steps=1, steps_per_epoch=1)
    summary = finetune_folder(compressed, tmp_path / "auto", data, automatic, teacher=tiny_model)
    assert summary.precision.split(": ")[0] in ("fp32", "bf16") and "processor" in summary.precision


def test_validation_cases_are_never_opened(tmp_path, images, labels, tiny_model, compressed):
    """What would stop the run, should it open it: the fold's validation case is no image at all."""
    splits = tmp_path / "splits_final.json"
    splits.write_text(json.dumps([{"train": ["a"], "val": ["b"]}]))
    (images / "b_0000.nii.gz").write_bytes(b"not to be opened")
    (labels / "b.nii.gz").write_bytes(b"not to be opened")
    data = TrainingSet(images=images, labels=labels, splits=splits)
    summary = finetune_folder(
        compressed, tmp_path / "tuned", data, QUICK, teacher=tiny_model, keep_training=True
    )
    assert summary.cases == {0: ("a",)}
    # The same from nnU-Net's own folder of preprocessed cases.
    folder = tmp_path / "tuned.training" / "preprocessed"
    (cases,) = [p for p in folder.iterdir() if p.is_dir()]
    (cases / "b.pkl").write_bytes(b"not to be opened")
    for name in ("b.b2nd", "b_seg.b2nd"):
        (cases / name).write_bytes(b"not to be opened")
    (folder / "splits_final.json").write_text(splits.read_text())
    summary = finetune_folder(
        compressed, tmp_path / "again", TrainingSet(preprocessed=folder), QUICK, teacher=tiny_model
    )
    assert summary.cases == {0: ("a",)}
    named = TrainingSet(images=images, labels=labels, splits=splits, cases=("b",))
    with pytest.raises(ConfigError, match="b is a validation case of fold 0; train on others"):
        finetune_folder(compressed, tmp_path / "c", named, QUICK, teacher=tiny_model)
    splits.write_text(json.dumps([{"train": ["a", "b"], "val": ["b"]}]))
    with pytest.raises(ConfigError, match="b in training and validation of fold 0"):
        finetune_folder(compressed, tmp_path / "c", data, QUICK, teacher=tiny_model)


RUN = """
import sys
from pathlib import Path
from tucker_ops.nnunet.training import FinetuneSettings, TrainingSet, finetune_folder
model, output, images, labels, teacher = map(Path, sys.argv[1:])
if __name__ == "__main__":
    settings = FinetuneSettings(steps=400, steps_per_epoch=2, batch_size=2, precision="fp32")
    data = TrainingSet(images=images, labels=labels)
    print(finetune_folder(model, output, data, settings, teacher=teacher))
"""


def test_killed_and_resumed(tmp_path, images, labels, tiny_model, compressed):
    output = tmp_path / "tuned"
    command = [sys.executable, "-c", RUN, *map(str, (compressed, output, images, labels, tiny_model))]
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"})
    latest = tmp_path / "tuned.training" / "fold_0" / "checkpoint_latest.pth"
    deadline = time.monotonic() + 120
    while not latest.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not output.exists()
    step = read_checkpoint(latest)["step"]
    assert 0 < step < 400
    data = TrainingSet(images=images, labels=labels)
    # Other arguments are not mixed into it.
    other = FinetuneSettings(steps=step + 2, steps_per_epoch=2, batch_size=2, precision="fp32")
    with pytest.raises(ResumeError, match=r"interrupted fine-tuning with another settings.*--restart"):
        finetune_folder(compressed, output, data, other, teacher=tiny_model)
    # As if the run had been asked for a few steps more than it did: the schedule's end is near.
    state = tmp_path / "tuned.training" / "finetuning.json"
    content = json.loads(state.read_text())
    content["settings"] = other.to_dict()
    state.write_text(json.dumps(content))
    summary = finetune_folder(compressed, output, data, other, teacher=tiny_model)
    assert summary.resumed_at == {0: step}
    assert output.is_dir() and not (tmp_path / "tuned.training").exists()


def test_a_resumed_run_goes_on_with_weights_and_optimizer(tmp_path, images, labels, tiny_model, compressed):
    """The checkpoint of a finished epoch, put back, ends where the uninterrupted run did but for its random draws."""
    from tucker_ops.nnunet.training import trainer as module

    data = TrainingSet(images=images, labels=labels)
    kept = {}
    save = module.FinetuneTrainer.save_checkpoint

    def keep(self, filename):
        save(self, filename)
        if self.step == 2 and filename.endswith(module.LATEST):
            kept["latest"] = open(filename, "rb").read()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.FinetuneTrainer, "save_checkpoint", keep)
        finetune_folder(compressed, tmp_path / "a", data, QUICK, teacher=tiny_model, keep_training=True)
    training = tmp_path / "a.training"
    (training / "fold_0" / "checkpoint_final.pth").unlink()
    (training / "fold_0" / "checkpoint_latest.pth").write_bytes(kept["latest"])
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        original = module.FinetuneTrainer.resume

        def resume(self, checkpoint):
            original(self, checkpoint)
            seen.append((self.step, self.current_epoch, len(self.optimizer.state)))

        patch.setattr(module.FinetuneTrainer, "resume", resume)
        summary = finetune_folder(compressed, tmp_path / "a", data, QUICK, teacher=tiny_model, force=True)
    assert summary.resumed_at == {0: 2}
    assert seen[0][:2] == (2, 1) and seen[0][2] > 20


def test_another_teacher_or_split_does_not_resume(tmp_path, images, labels, tiny_model, compressed):
    data = TrainingSet(images=images, labels=labels)
    finetune_folder(compressed, tmp_path / "a", data, QUICK, teacher=tiny_model, keep_training=True)
    other = make_model(tmp_path / "elsewhere" / tiny_model.name)
    with pytest.raises(ResumeError, match="another teacher"):
        finetune_folder(compressed, tmp_path / "a", data, QUICK, teacher=other, force=True)
    write_image(images / "a_0000.nii.gz", (32, 30, 16), seed=9)
    with pytest.raises(ResumeError, match="another data"):
        finetune_folder(compressed, tmp_path / "a", data, QUICK, teacher=tiny_model, force=True)
    # What is not ours is not thrown away for a restart.
    mine = tmp_path / "b.training" / "thesis.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    with pytest.raises(OutputExistsError, match="does not hold an interrupted fine-tuning"):
        finetune_folder(compressed, tmp_path / "b", data, QUICK, teacher=tiny_model, restart=True)
    assert mine.exists()


@pytest.mark.parametrize("axes", [None, (0, 1), (0, 1, 2)])
def test_mirroring_stays_what_the_model_was_trained_with(tmp_path, images, labels, tiny_model, axes):
    """A model that tells left from right must not be shown mirrored anatomy."""
    from tucker_ops.nnunet.training import trainer as module

    path = tiny_model / "fold_0" / "checkpoint_final.pth"
    content = torch.load(path, weights_only=False) | {"inference_allowed_mirroring_axes": axes}
    torch.save(content, path)
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        original = module.FinetuneTrainer.get_training_transforms

        def transforms(patch_size, rotation, scales, mirror_axes, *args, **kwargs):
            seen.append(mirror_axes)
            return original(patch_size, rotation, scales, mirror_axes, *args, **kwargs)

        patch.setattr(module.FinetuneTrainer, "get_training_transforms", staticmethod(transforms))
        settings = FinetuneSettings(steps=1, steps_per_epoch=1, distill=0.0)
        finetune_folder(tiny_model, tmp_path / "o", TrainingSet(images=images, labels=labels), settings)
    assert seen == [axes or ()]
    after = read_checkpoint(tmp_path / "o" / "fold_0" / "checkpoint_final.pth")
    assert after["inference_allowed_mirroring_axes"] == axes


def test_a_label_to_ignore_without_labels(tmp_path, images, tiny_model):
    """The dense model never says "ignore", but nnU-Net's loader looks for where it could draw patches."""
    dataset = json.loads((tiny_model / "dataset.json").read_text())
    dataset["labels"]["ignore"] = 3
    (tiny_model / "dataset.json").write_text(json.dumps(dataset))
    compress_folder(tiny_model, tmp_path / "small", SMALL)
    settings = FinetuneSettings(steps=1, steps_per_epoch=1)
    finetune_folder(
        tmp_path / "small", tmp_path / "o", TrainingSet(images=images), settings, teacher=tiny_model
    )


def test_two_processes_on_gloo(tmp_path, images, labels, tiny_model, compressed):
    data = TrainingSet(images=images, labels=labels)
    summary = finetune_folder(compressed, tmp_path / "tuned", data, QUICK, teacher=tiny_model, processes=2)
    assert summary.steps == 4
    before, after = weights(compressed), weights(tmp_path / "tuned")
    assert any(not torch.equal(after[name], before[name]) for name in after)
    assert all(torch.isfinite(w).all() for w in after.values())
    predict_folder(tmp_path / "tuned", images, tmp_path / "pred", mirroring=False)


def test_nnunets_own_trainer_takes_the_compressed_model(
    tmp_path, images, labels, tiny_model, compressed, monkeypatch
):
    """What `nnUNetv2_train -p … -pretrained_weights …` does: its trainer on our plans, its transfer of weights."""
    from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    from tucker_ops.nnunet.training.data import prepare_cases

    model = read_model_folder(compressed)
    dataset = tmp_path / "pre" / model.plans["dataset_name"]
    prepare_cases(model, TrainingSet(images=images, labels=labels), 0, dataset, None)
    (dataset / "splits_final.json").write_text(json.dumps([{"train": ["a", "b"], "val": ["b"]}]))
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "pre"))
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "res"))
    plans = json.loads((compressed / "plans.json").read_text()) | {"continue_training": False}
    trainer = nnUNetTrainer(plans, "3d_fullres", 0, dict(model.dataset_json), torch.device("cpu"))
    trainer.initialize()
    assert type(trainer.network).__name__ == "TuckerPlainConvUNet"
    load_pretrained_weights(trainer.network, str(compressed / "fold_0" / "checkpoint_final.pth"))
    transferred = weights(compressed)
    same = {n for n, w in trainer.network.state_dict().items() if torch.equal(w, transferred[n])}
    assert {n for n in transferred if "seg_layers" not in n} <= same
    trainer.num_iterations_per_epoch = trainer.num_val_iterations_per_epoch = trainer.num_epochs = 1
    trainer.run_training()
    after = torch.load(next((tmp_path / "res").rglob("checkpoint_final.pth")), weights_only=False)
    assert any(not torch.equal(w, transferred[n]) for n, w in after["network_weights"].items())


def test_losses_by_their_definitions():
    student, teacher = torch.randn(2, 3, 4, 4, 4), torch.randn(2, 3, 4, 4, 4)
    p, q = (teacher / 2).softmax(1), (student / 2).softmax(1)
    expected = (p * (p.log() - q.log())).sum(1).mean() * 4
    assert torch.allclose(
        distillation_loss(student, teacher, temperature=2, regions=False), expected, rtol=1e-5
    )
    p, q = teacher.sigmoid(), student.sigmoid()
    expected = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum(1).mean()
    assert torch.allclose(
        distillation_loss(student, teacher, temperature=1, regions=True), expected, rtol=1e-4
    )
    assert distillation_loss(teacher, teacher, temperature=1, regions=False).abs() < 1e-6
    # Each channel counts alike, whatever its scale.
    scale = torch.tensor([1e-2, 1.0, 1e2]).reshape(1, 3, 1, 1, 1)
    even = feature_loss([student], [teacher])
    assert torch.allclose(feature_loss([student * scale], [teacher * scale]), even, rtol=0.2)
    assert feature_loss([teacher], [teacher]) == 0


def test_schedule():
    settings = FinetuneSettings(steps=100, learning_rate=1.0)
    rates = [settings.learning_rate_at(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == 1 and max(rates) == 1
    assert rates[10:] == sorted(rates[10:], reverse=True) and 0.01 <= rates[-1] < 0.02
    assert FinetuneSettings(steps=1).learning_rate_at(0) > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps must be a whole number"),
        ({"learning_rate": float("nan")}, "learning_rate must be a number above 0"),
        ({"distill": 0, "supervise": 0}, "nothing to learn from"),
        ({"precision": "fp8"}, "precision must be one of"),
        ({"patch_size": (16, 0, 16)}, "patch_size"),
    ],
)
def test_settings_out_of_range(change, message):
    with pytest.raises(ConfigError, match=message):
        FinetuneSettings(**change)


def test_refusals(tmp_path, images, labels, tiny_model, compressed):
    data = TrainingSet(images=images, labels=labels)
    with pytest.raises(ConfigError, match="one of them only"):
        TrainingSet()
    with pytest.raises(ConfigError, match="distillation needs the dense model"):
        finetune_folder(compressed, tmp_path / "o", data, QUICK)
    alone = FinetuneSettings(steps=1, distill=0.0)
    with pytest.raises(ConfigError, match="the dense model must segment"):
        finetune_folder(compressed, tmp_path / "o", TrainingSet(images=images), alone)
    with pytest.raises(OutputExistsError, match="overlap"):
        finetune_folder(compressed, compressed / "o", data, QUICK, teacher=tiny_model)
    with pytest.raises(ConfigError, match="the model takes 3 extents"):
        finetune_folder(
            compressed, tmp_path / "o", data, FinetuneSettings(patch_size=(16, 16)), teacher=tiny_model
        )
    other = make_model(tmp_path / "other", channels=2)
    with pytest.raises(ModelFolderError, match="maps 2 channels to 3 outputs"):
        finetune_folder(compressed, tmp_path / "o", data, QUICK, teacher=other)
    for options, error, message in (
        ({"device": "gpu"}, DeviceError, "use cpu, cuda or mps"),
        ({"processes": 0}, ConfigError, "from 1 to the batch size of 2"),
        ({"processes": 3}, ConfigError, "from 1 to the batch size of 2"),
    ):
        with pytest.raises(error, match=message):
            finetune_folder(compressed, tmp_path / "o", data, QUICK, teacher=tiny_model, **options)
    with pytest.raises(ConfigError, match=r"ask for multiples of \(4, 4, 4\)"):
        uneven = FinetuneSettings(patch_size=(16, 18, 16))
        finetune_folder(compressed, tmp_path / "o", data, uneven, teacher=tiny_model)
    write_image(images / "c_0000.nii.gz", (16, 16, 16))
    with pytest.raises(SegmentationError, match=r"case c of .* has no label"):
        finetune_folder(compressed, tmp_path / "o", data, QUICK, teacher=tiny_model)
    with pytest.raises(ConfigError, match="lacks the training case z"):
        finetune_folder(
            compressed, tmp_path / "p", TrainingSet(images=images, cases=("z",)), QUICK, teacher=tiny_model
        )
    with pytest.raises(ConfigError, match="holds no preprocessed cases"):
        finetune_folder(
            compressed, tmp_path / "q", TrainingSet(preprocessed=images), QUICK, teacher=tiny_model
        )
    assert not any((tmp_path / name).exists() for name in "opq")


def test_command_line(tmp_path, images, labels, tiny_model, compressed, shell):  # noqa: F811
    code, out, err = shell(
        "finetune", compressed, "-o", tmp_path / "tuned", "--teacher", tiny_model,
        "--images", images, "--labels", labels, "--case", "a", "--steps", 2, "--precision", "fp32",
        "--patch", "16,16,16",
    )  # fmt: skip
    assert code == 0, err
    assert "fold 0: 2 steps on 1 cases" in out and "Precision fp32: as asked" in out
    code, _, err = shell("finetune", compressed, "-o", tmp_path / "x", "--images", images, "--patch", "wide")
    assert code == 2 and "whole numbers" in err
