"""Dice and surface Dice of segmentations against labels, or against the output of another model."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tucker_ops.errors import ConfigError, SegmentationError
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

    from tucker_ops.nnunet.compare import Comparison

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Evaluation:
    """Overlap of the segmentations in one folder with those in another.

    ``metrics`` has a row per (case, class) and nnU-Net's columns: Dice and IoU as fractions, FP, TP, FN, TN,
    n_pred and n_ref in voxels; with a tolerance also NSD. A class that a case lacks in both segmentations has no
    Dice there (NaN) and is left out of every mean, as in nnU-Net's summary.json; one that only one of them lacks
    counts as 0.
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
    def nsd_per_case(self) -> pd.DataFrame | None:
        """As ``per_case``, normalised surface Dice; None where no tolerance was given."""
        return self.metrics["NSD"].unstack("class")[list(self.classes)] if "NSD" in self.metrics else None

    @property
    def worst_class(self) -> tuple[str, float]:
        """The class of the least mean Dice, and that; ("", NaN) where no class has one."""
        values = self.per_class.dropna()
        return (str(values.idxmin()), float(values.min())) if len(values) else ("", float("nan"))

    @property
    def mean(self) -> float:
        """Mean of ``per_class`` without NaN.

        nnU-Net's ``foreground_mean`` is the same figure, except that a class no case has makes it NaN.
        """
        return float(self.per_class.mean())

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; null where there is no Dice."""
        content = {
            "prediction": str(self.prediction),
            "reference": str(self.reference),
            "cases": len(self.per_case),
            "mean_dice": _number(self.mean),
            "worst_class": self.worst_class[0],
            "dice_per_class": {name: _number(value) for name, value in self.per_class.items()},
            "dice_per_case": _by_case(self.per_case),
        }
        if self.nsd_per_case is not None:
            nsd = self.nsd_per_case
            content["nsd_per_class"] = {name: _number(value) for name, value in nsd.mean().items()}
            content["nsd_per_case"] = _by_case(nsd)
        return content


def evaluate_folder(
    prediction_dir: str | Path,
    reference_dir: str | Path,
    *,
    dataset_json: str | Path | None = None,
    allow_missing: bool = False,
    nsd_tolerance: float | str | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Compare every segmentation in `prediction_dir` with the one of the same name in `reference_dir`.

    The counting is nnU-Net's own (``nnunetv2.evaluation``), so the figures are those of its summary.json.
    `dataset_json` names the classes; by default it is looked for in or above `prediction_dir`, where nnU-Net
    puts it when it predicts, then `reference_dir`. `allow_missing` lets references without a prediction pass.
    `nsd_tolerance` in mm, or "voxel" for each volume's largest spacing, asks for the normalised surface Dice too: the
    share of both surfaces that lies within that distance of the other (Nikolov et al. 2018, counted by MONAI).
    `progress` is called with the case, how many are done, and how many there are.

    Raises SegmentationError for missing or unreadable files, ShapeError where a pair differs in extent or
    spacing, ModelFolderError for a bad dataset.json, ConfigError for a tolerance that is not above 0.
    """
    if nsd_tolerance not in (None, "voxel") and (isinstance(nsd_tolerance, str) or not nsd_tolerance > 0):
        raise ConfigError(f"nsd_tolerance must be millimetres above 0, or 'voxel', got {nsd_tolerance!r}")
    dataset = read_dataset(dataset_json or find_dataset_json(prediction_dir, reference_dir))
    predictions = find_segmentations(prediction_dir, dataset.file_ending)
    references = find_segmentations(reference_dir, dataset.file_ending)
    _check_pairs(predictions, references, Path(prediction_dir), Path(reference_dir), allow_missing)

    rows = {}
    for done, (case, path) in enumerate(predictions.items()):
        if progress is not None:
            progress(case, done, len(predictions))
        for name, values in _compare(path, references[case], dataset, nsd_tolerance).items():
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


def _compare(
    prediction: Path, reference: Path, dataset: Dataset, nsd_tolerance: float | str | None
) -> dict[str, dict[str, float]]:
    from nnunetv2.evaluation.evaluate_predictions import compute_metrics

    reader = dataset.reader()
    pair = read_volume(reader, prediction), read_volume(reader, reference)
    check_same_grid(*pair, (prediction, reference))
    loaded = _Loaded({"prediction": pair[0][0], "reference": pair[1][0]})
    classes = list(dataset.classes.values())
    result = compute_metrics("reference", "prediction", loaded, classes, dataset.ignore_label)
    metrics = {name: dict(result["metrics"][key]) for name, key in dataset.classes.items()}
    if nsd_tolerance is not None:
        # A slice has no surface along its own axis, whose spacing nnU-Net's readers of 2D images make up.
        real = [axis for axis, n in enumerate(pair[0][0].shape[1:]) if n > 1] or [0]
        spacing = [pair[0][1][axis] for axis in real]
        tolerance = float(max(spacing)) if nsd_tolerance == "voxel" else float(nsd_tolerance)
        extents = [pair[0][0].shape[1 + axis] for axis in real]
        a, b = (volume[0][0].reshape(extents) for volume in pair)
        if dataset.ignore_label is not None:
            a = np.where(b == dataset.ignore_label, 0, a)
        for name, key in dataset.classes.items():
            labels = key if isinstance(key, tuple) else (key,)
            metrics[name]["NSD"] = surface_dice(np.isin(a, labels), np.isin(b, labels), spacing, tolerance)
    return metrics


def surface_dice(a: np.ndarray, b: np.ndarray, spacing: Sequence[float], tolerance: float) -> float:
    """Normalised surface Dice of two masks [*spatial], 1 to 3 axes, at `tolerance`, in the unit of `spacing`.

    NaN where both are empty, 0 where one is.
    """
    import torch
    from monai.metrics import compute_surface_dice

    if a.ndim == 1:
        a, b, spacing = a[:, None], b[:, None], (*spacing, spacing[0])
    occupied = np.argwhere(a | b)
    if not len(occupied):
        return float("nan")
    if not a.any() or not b.any():
        return 0.0
    # Nothing outside the box of both matters, and a whole CT costs a distance transform a class.
    low, high = np.maximum(occupied.min(0) - 1, 0), occupied.max(0) + 2
    box = tuple(slice(lo, hi) for lo, hi in zip(low, high, strict=True))
    masks = [torch.from_numpy(np.pad(mask[box], 1))[None, None] for mask in (a, b)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        score = compute_surface_dice(
            *masks,
            [tolerance],
            include_background=True,
            spacing=list(map(float, spacing)),
            use_subvoxels=a.ndim == 3,
        )
    return float(score)


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


def _by_case(table: pd.DataFrame) -> dict[str, dict[str, float | None]]:
    return {case: {name: _number(value) for name, value in row.items()} for case, row in table.iterrows()}


def write_json(
    evaluations: Mapping[str, Evaluation | Comparison], path: str | Path, *, force: bool = False
) -> None:
    """Write evaluations by name (``labels``, ``dense``, ``comparison``) to a JSON file. Raises as `write_file`."""
    content = {name: evaluation.to_dict() for name, evaluation in evaluations.items()}
    write_file(path, json.dumps(content, indent=1).encode(), force=force)
