"""Reading model folders and checkpoints, and what is said about the broken ones."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from tiny import make_model

from tucker_ops.errors import CheckpointError, ModelFolderError, UnsupportedArchitectureError
from tucker_ops.nnunet.checkpoint import cast_weights, read_checkpoint
from tucker_ops.nnunet.compress import load_network
from tucker_ops.nnunet.folder import find_model_folders, read_model_folder
from tucker_ops.nnunet.networks import tucker_architecture


@pytest.mark.parametrize("old_format", [False, True])
@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("network", ["PlainConvUNet", "ResidualEncoderUNet"])
def test_reads_every_kind(tmp_path, network, ndim, old_format):
    folder = read_model_folder(make_model(tmp_path / "m", network=network, ndim=ndim, old_format=old_format))
    assert folder.architecture["network_class_name"].endswith(network)
    assert folder.patch_size == (16,) * ndim
    assert folder.configuration == ("3d_fullres" if ndim == 3 else "2d")
    assert (folder.input_channels, folder.num_outputs, folder.trainer_name) == (1, 3, "nnUNetTrainer")
    assert not folder.is_compressed


def test_reads_the_real_model(hippocampus):
    folder = read_model_folder(hippocampus)
    assert (folder.folds, folder.patch_size, folder.num_outputs) == ((0,), (40, 56, 40), 3)


def test_folds(tmp_path):
    path = make_model(tmp_path / "m", folds=(10, 2, "all"))
    folder = read_model_folder(path)
    assert folder.folds == (2, 10, "all")
    assert folder.select_folds() == (2, 10)
    assert folder.select_folds(["all", "2"]) == ("all", 2)
    with pytest.raises(ModelFolderError, match=r"fold 3 does not exist.*fold 10: checkpoint_final\.pth"):
        folder.select_folds([3])
    with pytest.raises(ModelFolderError, match=r"fold 2 has no checkpoint_best\.pth.*checkpoint_final\.pth"):
        folder.select_folds([2], "checkpoint_best.pth")
    with pytest.raises(ModelFolderError, match="empty list"):
        folder.select_folds([])
    only_all = read_model_folder(make_model(tmp_path / "n", folds=("all",)))
    assert only_all.select_folds() == ("all",)


def test_a_folder_that_is_no_model(tmp_path, tiny_model):
    with pytest.raises(ModelFolderError, match="does not exist"):
        read_model_folder(tmp_path / "nowhere")
    with pytest.raises(ModelFolderError, match="is a file"):
        read_model_folder(tiny_model / "plans.json")
    with pytest.raises(
        ModelFolderError, match=f"lacks dataset.json, plans.json, fold_.*did you mean {tiny_model}"
    ):
        read_model_folder(tiny_model.parent)
    (tiny_model / "plans.json").unlink()
    with pytest.raises(ModelFolderError, match=r"lacks plans\.json; give the folder"):
        read_model_folder(tiny_model)


def test_model_folders_of_a_tree(tmp_path):
    first = make_model(tmp_path / "Dataset001_A" / "tr__plans__2d", ndim=2)
    second = make_model(tmp_path / "Dataset002_B" / "tr__plans__3d_fullres")
    assert find_model_folders(tmp_path) == [first, second]
    assert find_model_folders(first) == [first]
    assert find_model_folders(first / "fold_0") == []


@pytest.mark.parametrize(("text", "message"), [("{", "not valid JSON"), ("[1]", "JSON list, not an object")])
def test_plans_that_are_not_json(tiny_model, text, message):
    (tiny_model / "plans.json").write_text(text)
    with pytest.raises(ModelFolderError, match=message):
        read_model_folder(tiny_model)


def test_plans_of_another_model(tiny_model):
    plans = json.loads((tiny_model / "plans.json").read_text())
    plans["configurations"]["3d_lowres"] = plans["configurations"].pop("3d_fullres")
    (tiny_model / "plans.json").write_text(json.dumps(plans))
    with pytest.raises(ModelFolderError, match=r"configuration '3d_fullres'.*holds other, 3d_lowres"):
        read_model_folder(tiny_model)


def test_plans_that_lack_an_entry(tiny_model):
    plans = json.loads((tiny_model / "plans.json").read_text())
    del plans["configurations"]["3d_fullres"]["patch_size"]
    (tiny_model / "plans.json").write_text(json.dumps(plans))
    with pytest.raises(ModelFolderError, match="lacks the entry 'patch_size'"):
        read_model_folder(tiny_model)


def test_unknown_architecture(tmp_path, tiny_model):
    architecture = dict(read_model_folder(tiny_model).architecture, network_class_name="my.nets.SwinUNETR")
    with pytest.raises(UnsupportedArchitectureError, match=r"my.nets.SwinUNETR.*PlainConvUNet"):
        tucker_architecture(architecture, {})
    old = make_model(tmp_path / "old", old_format=True)
    plans = json.loads((old / "plans.json").read_text())
    plans["configurations"]["3d_fullres"]["UNet_class_name"] = "MyUNet"
    (old / "plans.json").write_text(json.dumps(plans))
    with pytest.raises(UnsupportedArchitectureError, match="'MyUNet'"):
        read_model_folder(old)


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.999])
def test_truncated_checkpoint(tiny_model, keep):
    path = tiny_model / "fold_0" / "checkpoint_final.pth"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(CheckpointError, match="truncated"):
        read_model_folder(tiny_model)


def test_a_zip_that_is_no_checkpoint(tiny_model):
    path = tiny_model / "fold_0" / "checkpoint_final.pth"
    path.unlink()
    shutil.make_archive(str(path), "zip", tiny_model, "dataset.json")
    path.with_name(path.name + ".zip").rename(path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_checkpoint(path)


@pytest.mark.parametrize("key", ["network_weights", "trainer_name", "init_args"])
def test_checkpoint_without_what_prediction_needs(tiny_model, key):
    path = tiny_model / "fold_0" / "checkpoint_final.pth"
    checkpoint = read_checkpoint(path)
    del checkpoint[key]
    torch.save(checkpoint, path)
    with pytest.raises(CheckpointError, match=f"lacks {key}"):
        read_checkpoint(path)


def test_weights_that_are_not_finite(tiny_model):
    path = tiny_model / "fold_0" / "checkpoint_final.pth"
    checkpoint = read_checkpoint(path)
    checkpoint["network_weights"]["encoder.stages.0.0.convs.0.conv.weight"][0, 0, 0, 0, 0] = float("nan")
    torch.save(checkpoint, path)
    with pytest.raises(CheckpointError, match="infinite or undefined"):
        read_checkpoint(path)


class Stranger:
    """An object that is no weight."""


def test_pickle_only_when_trusted(tiny_model):
    path = tiny_model / "fold_0" / "checkpoint_final.pth"
    checkpoint = read_checkpoint(path)
    assert isinstance(checkpoint["_best_ema"], np.float64)
    torch.save({**checkpoint, "extra": Stranger()}, path)
    with pytest.raises(CheckpointError, match=r"Stranger.*--trust-checkpoint"):
        read_checkpoint(path)
    with pytest.warns(UserWarning, match="read by pickle"):
        assert isinstance(read_checkpoint(path, trust=True)["extra"], Stranger)


def test_casting_keeps_shared_tensors_shared(tiny_model):
    weights = read_checkpoint(tiny_model / "fold_0" / "checkpoint_final.pth")["network_weights"]
    cast = cast_weights(weights, torch.float16)
    assert (
        len({t.data_ptr() for t in cast.values()})
        == len({t.data_ptr() for t in weights.values()})
        < len(cast)
    )
    assert all(cast[name].dtype == torch.float16 for name in cast)


@pytest.mark.parametrize(
    "change",
    [
        {"init_args": None},
        {"init_args": {"configuration": 3}},
        {"network_weights": None},
        {"network_weights": {"a": 1.0}},
        {"trainer_name": None},
        {"trainer_name": 7},
    ],
    ids=str,
)
def test_checkpoint_with_entries_of_another_kind(tiny_model, change):
    path = tiny_model / "fold_0" / "checkpoint_final.pth"
    torch.save(read_checkpoint(path) | change, path)
    with pytest.raises(CheckpointError, match="lacks"):
        read_checkpoint(path)


def test_a_damaged_checkpoint(tiny_model):
    path = tiny_model / "fold_0" / "checkpoint_final.pth"
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 100] = bytes(b ^ 0xFF for b in content[middle : middle + 100])
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        read_model_folder(tiny_model)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda plans, _: plans.update(configurations=[]), "configurations is no object"),
        (lambda plans, _: plans.update(configurations=None), "configurations is no object"),
        (
            lambda plans, _: plans["configurations"].update({"3d_fullres": {"inherits_from": "nothing"}}),
            "plans.json",
        ),
        (lambda plans, _: plans["configurations"]["3d_fullres"].update(patch_size=None), "plans.json"),
        (lambda _, dataset: dataset.pop("file_ending"), "file_ending"),
        (lambda _, dataset: dataset.update(labels=3), "dataset.json"),
    ],
)
def test_descriptions_that_are_not_as_nnunet_writes_them(tiny_model, change, words):
    contents = [json.loads((tiny_model / name).read_text()) for name in ("plans.json", "dataset.json")]
    change(*contents)
    for name, content in zip(("plans.json", "dataset.json"), contents, strict=True):
        (tiny_model / name).write_text(json.dumps(content))
    with pytest.raises(ModelFolderError, match=words):
        read_model_folder(tiny_model)


@pytest.mark.parametrize(
    "change",
    [
        lambda kwargs: kwargs.pop("strides"),
        lambda kwargs: kwargs.update(surprise=1),
        lambda kwargs: kwargs.update(features_per_stage=[4]),
        lambda kwargs: kwargs.update(conv_op="torch.nn.Linear"),
    ],
)
def test_arch_kwargs_that_build_no_network(tiny_model, change):
    plans = json.loads((tiny_model / "plans.json").read_text())
    change(plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"])
    (tiny_model / "plans.json").write_text(json.dumps(plans))
    with pytest.raises(UnsupportedArchitectureError, match=r"cannot be built.*plans\.json"):
        load_network(read_model_folder(tiny_model), 0)


def test_numbers_of_folds(tmp_path):
    path = make_model(tmp_path / "m", folds=(1,))
    (path / "fold_1").rename(path / "fold_01")
    with pytest.raises(ModelFolderError):
        read_model_folder(path)
    folder = read_model_folder(make_model(tmp_path / "n", folds=(0, 1)))
    assert folder.select_folds([0, "0", 1]) == (0, 1)
    with pytest.raises(ModelFolderError, match="²"):
        folder.select_folds(["²"])
