"""Dice per class and case, against values worked out by hand and against nnU-Net's own summary."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

sitk = pytest.importorskip("SimpleITK")
pytest.importorskip("nnunetv2")

from typer.testing import CliRunner  # noqa: E402

from tucker_ops.cli import app  # noqa: E402
from tucker_ops.errors import ModelFolderError, OutputExistsError, SegmentationError, ShapeError  # noqa: E402
from tucker_ops.nnunet.evaluate import evaluate_folder, write_json  # noqa: E402

LABELS = {"background": 0, "head": 1, "tail": 2, "never there": 3}


def write(path: Path, array: np.ndarray, spacing=(1.0, 1.0, 1.0)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing)
    sitk.WriteImage(image, str(path))


def line(*labels: int, dtype=np.uint8) -> np.ndarray:
    """A volume of one row of voxels."""
    return np.array(labels, dtype=dtype).reshape(1, 1, -1)


@pytest.fixture
def folders(tmp_path):
    prediction, reference = tmp_path / "prediction", tmp_path / "reference"
    # head: 2 common voxels of 3 and 2 -> 4/5;  tail: 1 common of 1 and 2 -> 2/3
    write(prediction / "a.nii.gz", line(1, 1, 1, 2, 0, 0))
    write(reference / "a.nii.gz", line(1, 1, 0, 2, 2, 0))
    # head: in neither -> no value;  tail: in the prediction only -> 0
    write(prediction / "b.nii.gz", line(0, 2, 0, 0))
    write(reference / "b.nii.gz", line(0, 0, 0, 0, dtype=np.float32))
    dataset = {"labels": LABELS, "file_ending": ".nii.gz", "channel_names": {"0": "MRI"}}
    (prediction / "dataset.json").write_text(json.dumps(dataset))
    return prediction, reference


def test_dice_by_hand(folders):
    result = evaluate_folder(*folders)
    assert list(result.per_case.columns) == ["head", "tail", "never there"]
    assert list(result.per_case.index) == ["a", "b"]
    assert result.per_case.loc["a", "head"] == pytest.approx(4 / 5)
    assert result.per_case.loc["a", "tail"] == pytest.approx(2 / 3)
    assert math.isnan(result.per_case.loc["b", "head"])
    assert result.per_case.loc["b", "tail"] == 0
    assert result.per_class["head"] == pytest.approx(4 / 5)
    assert result.per_class["tail"] == pytest.approx(1 / 3)
    assert math.isnan(result.per_class["never there"])
    assert result.mean == pytest.approx((4 / 5 + 1 / 3) / 2)
    assert result.metrics.loc[("a", "head"), ["TP", "FP", "FN", "TN"]].tolist() == [2, 1, 0, 3]


def test_equals_nnunets_summary(folders):
    from nnunetv2.evaluation.evaluate_predictions import compute_metrics_on_folder
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

    prediction, reference = map(str, folders)
    theirs = compute_metrics_on_folder(reference, prediction, None, SimpleITKIO(), ".nii.gz", [1, 2], None, 1)
    ours = evaluate_folder(*folders)
    assert ours.per_class["head"] == theirs["mean"][1]["Dice"]
    assert ours.per_class["tail"] == theirs["mean"][2]["Dice"]
    assert ours.mean == pytest.approx(theirs["foreground_mean"]["Dice"])


def test_regions_and_ignored_voxels(folders):
    prediction, reference = folders
    dataset = {
        "labels": {"background": 0, "whole": [1, 2], "tail": 2, "ignore": 3},
        "regions_class_order": [1, 2],
        "file_ending": ".nii.gz",
    }
    (prediction / "dataset.json").write_text(json.dumps(dataset))
    write(reference / "a.nii.gz", line(3, 1, 0, 2, 2, 0))
    result = evaluate_folder(prediction, reference)
    # The first voxel is not counted: whole is 2 common voxels of 3 and 3, tail as before.
    assert result.per_case.loc["a", "whole"] == pytest.approx(4 / 6)
    assert result.per_case.loc["a", "tail"] == pytest.approx(2 / 3)


def test_reference_without_prediction(folders):
    prediction, reference = folders
    (prediction / "b.nii.gz").unlink()
    with pytest.raises(SegmentationError, match=r"^b in .*allow-missing"):
        evaluate_folder(prediction, reference)
    assert list(evaluate_folder(prediction, reference, allow_missing=True).per_case.index) == ["a"]


def test_prediction_without_reference(folders):
    prediction, reference = folders
    (reference / "b.nii.gz").unlink()
    with pytest.raises(SegmentationError, match=r"^b in .* no file of the same name"):
        evaluate_folder(prediction, reference, allow_missing=True)


@pytest.mark.parametrize("difference", ["extent", "spacing"])
def test_other_grid(folders, difference):
    prediction, reference = folders
    array = line(1, 1, 1, 2, 0) if difference == "extent" else line(1, 1, 1, 2, 0, 0)
    write(prediction / "a.nii.gz", array, (1.0, 1.0, 1.0) if difference == "extent" else (1.0, 1.0, 2.0))
    with pytest.raises(ShapeError, match=r"a\.nii\.gz"):
        evaluate_folder(prediction, reference)


def test_unreadable_segmentation(folders):
    prediction, reference = folders
    (prediction / "a.nii.gz").write_bytes(b"not a volume")
    with pytest.raises(SegmentationError, match=r"a\.nii\.gz cannot be read"):
        evaluate_folder(prediction, reference)


def test_classes_unknown(folders):
    prediction, reference = folders
    (prediction / "dataset.json").write_text('{"labels": ')
    with pytest.raises(ModelFolderError, match="not valid JSON"):
        evaluate_folder(prediction, reference)
    for labels in ('{"head": 1}', '["head"]', '{"background": 0, "head": null}'):
        (prediction / "dataset.json").write_text(f'{{"labels": {labels}, "file_ending": ".nii.gz"}}')
        with pytest.raises(SegmentationError, match="no valid nnU-Net dataset description"):
            evaluate_folder(prediction, reference)
    (prediction / "dataset.json").unlink()
    with pytest.raises(SegmentationError, match="--dataset-json"):
        evaluate_folder(prediction, reference)


def test_folder_without_segmentations(folders, tmp_path):
    with pytest.raises(SegmentationError, match="no folder"):
        evaluate_folder(folders[0], tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SegmentationError, match="holds no file"):
        evaluate_folder(folders[0], tmp_path / "empty")


def test_command_line(folders, tmp_path):
    prediction, reference = map(str, folders)
    path = tmp_path / "dice.json"
    arguments = ["evaluate", "-p", prediction, "-r", reference, "--dense", prediction, "--json", str(path)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    # Of each name the first line: a later table compares the models.
    lines = {line.split()[0]: line for line in reversed(result.stdout.splitlines()) if line.strip()}
    assert "0.8000" in lines["head"] and "1.0000" in lines["head"]
    assert "0.5667" in lines["mean"]
    assert set(json.loads(path.read_text())) == {"labels", "dense", "comparison"}


def test_command_line_refuses_before_it_compares(folders, tmp_path, monkeypatch):
    prediction, reference = map(str, folders)
    path = tmp_path / "dice.json"
    path.write_text("mine")
    monkeypatch.setattr("tucker_ops.nnunet.evaluate.evaluate_folder", lambda *a, **k: pytest.fail("compared"))
    result = CliRunner().invoke(app, ["evaluate", "-p", prediction, "-r", reference, "--json", str(path)])
    assert isinstance(result.exception, OutputExistsError)
    assert path.read_text() == "mine"


def test_command_line_without_the_dataset_json_it_names(folders):
    prediction, reference = map(str, folders)
    arguments = ["evaluate", "-p", prediction, "-r", reference, "--dataset-json", "/nowhere.json"]
    assert isinstance(CliRunner().invoke(app, arguments).exception, ModelFolderError)


def test_json_has_null_for_nan_and_is_not_overwritten(folders, tmp_path):
    path = tmp_path / "made" / "dice.json"
    write_json({"labels": evaluate_folder(*folders)}, path)
    content = json.loads(path.read_text())["labels"]
    assert content["cases"] == 2
    assert content["dice_per_class"]["never there"] is None
    assert content["dice_per_case"]["a"]["head"] == pytest.approx(4 / 5)
    with pytest.raises(OutputExistsError, match="--force"):
        write_json({"labels": evaluate_folder(*folders)}, path)
    assert [p.name for p in path.parent.iterdir()] == ["dice.json"]
