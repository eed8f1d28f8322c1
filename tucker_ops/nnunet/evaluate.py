"""Dice of segmentations against labels, or against the output of another model."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tucker_ops.errors import SegmentationError
from tucker_ops.nnunet.output import write_file
from tucker_ops.nnunet.segmentations import (
    Class,
    Dataset,
    check_same_grid,
    find_dataset_json,
    find_segmentations,
    read_dataset,
    read_volume,
)

if TYPE_CHECKING:
    import pandas as pd

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Evaluation:
    """Overlap of the segmentations in one folder with those in another.

    ``metrics`` has a row per (case, class) and nnU-Net's columns: Dice and IoU as fractions, FP, TP, FN, TN,
    n_pred and n_ref in voxels. A class that a case lacks in both segmentations has no Dice there (NaN) and is
    left out of every mean, as in nnU-Net's summary.json; one that only one of them lacks counts as 0.
    """

    prediction: Path
    reference: Path
    classes: Mapping[str, Class]
    metrics: pd.DataFrame

    @property
    def per_case(self) -> pd.DataFrame:
        """Dice with a row per case and a column per class."""
        return self.metrics["Dice"].unstack("class")[list(self.classes)]

    @property
    def per_class(self) -> pd.Series:
        """Mean Dice over the cases, per class; NaN for a class that no case has."""
        return self.per_case.mean()

    @property
    def mean(self) -> float:
        """Mean of ``per_class`` without NaN.

        nnU-Net's ``foreground_mean`` is the same figure, except that a class no case has makes it NaN.
        """
        return float(self.per_class.mean())

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; null where there is no Dice."""
        return {
            "prediction": str(self.prediction),
            "reference": str(self.reference),
            "cases": len(self.per_case),
            "mean_dice": _number(self.mean),
            "dice_per_class": {name: _number(value) for name, value in self.per_class.items()},
            "dice_per_case": {
                case: {name: _number(value) for name, value in row.items()}
                for case, row in self.per_case.iterrows()
            },
        }


def evaluate_folder(
    prediction_dir: str | Path,
    reference_dir: str | Path,
    *,
    dataset_json: str | Path | None = None,
    allow_missing: bool = False,
    progress: Progress | None = None,
) -> Evaluation:
    """Compare every segmentation in `prediction_dir` with the one of the same name in `reference_dir`.

    The counting is nnU-Net's own (``nnunetv2.evaluation``), so the figures are those of its summary.json.
    `dataset_json` names the classes; by default it is looked for in or above `prediction_dir`, where nnU-Net
    puts it when it predicts, then `reference_dir`. `allow_missing` lets references without a prediction pass.
    `progress` is called with the case, how many are done, and how many there are.

    Raises SegmentationError for missing or unreadable files, ShapeError where a pair differs in extent or
    spacing, ModelFolderError for a bad dataset.json.
    """
    dataset = read_dataset(dataset_json or find_dataset_json(prediction_dir, reference_dir))
    predictions = find_segmentations(prediction_dir, dataset.file_ending)
    references = find_segmentations(reference_dir, dataset.file_ending)
    _check_pairs(predictions, references, Path(prediction_dir), Path(reference_dir), allow_missing)

    rows = {}
    for done, (case, path) in enumerate(predictions.items()):
        if progress is not None:
            progress(case, done, len(predictions))
        for name, values in _compare(path, references[case], dataset).items():
            rows[case, name] = values
    if progress is not None:
        progress("", len(predictions), len(predictions))
    return Evaluation(Path(prediction_dir), Path(reference_dir), dataset.classes, _table(rows))


class _Loaded:
    """Stands in for nnU-Net's reader, so that files are read once and checked before they are compared."""

    def __init__(self, volumes: Mapping[str, np.ndarray]):
        self._volumes = volumes

    def read_seg(self, path: str) -> tuple[np.ndarray, dict]:
        return self._volumes[path], {}


def _compare(prediction: Path, reference: Path, dataset: Dataset) -> dict[str, dict[str, float]]:
    from nnunetv2.evaluation.evaluate_predictions import compute_metrics

    reader = dataset.reader()
    pair = read_volume(reader, prediction), read_volume(reader, reference)
    check_same_grid(*pair, (prediction, reference))
    loaded = _Loaded({"prediction": pair[0][0], "reference": pair[1][0]})
    classes = list(dataset.classes.values())
    result = compute_metrics("reference", "prediction", loaded, classes, dataset.ignore_label)
    return {name: result["metrics"][key] for name, key in dataset.classes.items()}


def _table(rows: Mapping[tuple[str, str], Mapping[str, float]]) -> pd.DataFrame:
    import pandas as pd

    index = pd.MultiIndex.from_tuples(list(rows), names=["case", "class"])
    return pd.DataFrame(list(rows.values()), index=index)


def _check_pairs(
    predictions: Mapping[str, Path],
    references: Mapping[str, Path],
    prediction_dir: Path,
    reference_dir: Path,
    allow_missing: bool,
) -> None:
    without_reference = sorted(predictions.keys() - references.keys())
    if without_reference:
        raise SegmentationError(
            f"{_some(without_reference)} in {prediction_dir} have no file of the same name in "
            f"{reference_dir}; add those, or remove the predictions"
        )
    without_prediction = sorted(references.keys() - predictions.keys())
    if without_prediction and not allow_missing:
        raise SegmentationError(
            f"{_some(without_prediction)} in {reference_dir} have no prediction in {prediction_dir}, and a "
            "mean over the rest may flatter; predict them, or pass --allow-missing (allow_missing=True)"
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def write_json(evaluations: Mapping[str, Evaluation], path: str | Path, *, force: bool = False) -> None:
    """Write evaluations by name (``labels``, ``dense``) to a JSON file. Raises as `write_file`."""
    content = {name: evaluation.to_dict() for name, evaluation in evaluations.items()}
    write_file(path, json.dumps(content, indent=1).encode(), force=force)
