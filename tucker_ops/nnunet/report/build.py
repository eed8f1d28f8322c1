"""Gathers what is known of compressed models and writes it as a page, its figures and a JSON file."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from tucker_ops.errors import ConfigError, SegmentationError
from tucker_ops.nnunet.checkpoint import sha256
from tucker_ops.nnunet.evaluate import Evaluation, evaluate_folder
from tucker_ops.nnunet.folder import read_json
from tucker_ops.nnunet.manifest import Manifest, read_manifest
from tucker_ops.nnunet.report.content import DENSE, sections, summary_table
from tucker_ops.nnunet.report.figures import accuracy_figure, cost_figure, rank_figure, speed_figure
from tucker_ops.nnunet.report.layers import layers_of, setting_name
from tucker_ops.nnunet.report.overlay import overlay_figure
from tucker_ops.nnunet.report.page import Section, render_page
from tucker_ops.nnunet.report.speed import Forward, measure_forward
from tucker_ops.nnunet.report.tables import TextTable
from tucker_ops.nnunet.segmentations import Dataset, find_segmentations, read_dataset
from tucker_ops.nnunet.staging import staged_folder

PAGE_NAME = "index.html"
DATA_NAME = "tucker_ops_report.json"
DOTS_PER_INCH = 130

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Report:
    """Where the report lies, what it says in one table, and which parts it lacks, with the reason.

    ``against_labels`` and ``against_dense`` hold the evaluations it shows, by model name.
    """

    page: Path
    summary: TextTable
    figures: tuple[Path, ...]
    missing: Mapping[str, str]
    against_labels: Mapping[str, Evaluation]
    against_dense: Mapping[str, Evaluation]


@dataclass(frozen=True)
class Inputs:
    """What a report is made from: ``models`` and, in the same order, ``predictions``; the rest is optional.

    ``prediction_seconds``, the part of them in ``network_seconds``, and ``peak_memory_bytes`` hold measured values of
    whole predictions by model name (``dense`` and those that `model_names` gives), where somebody has measured them.
    """

    models: Sequence[Path]
    source: Path | None = None
    images: Path | None = None
    labels: Path | None = None
    dense_prediction: Path | None = None
    predictions: Sequence[Path] = ()
    case: str | None = None
    title: str = ""
    measure_speed: bool = True
    device: str = "cpu"
    prediction_seconds: Mapping[str, float] = field(default_factory=dict)
    network_seconds: Mapping[str, float] = field(default_factory=dict)
    peak_memory_bytes: Mapping[str, int] = field(default_factory=dict)


def write_report(
    inputs: Inputs, output: str | Path, *, force: bool = False, progress: Progress | None = None
) -> Report:
    """Write the report into the folder `output`, whole or not at all.

    A part that needs something absent is left out, and the page and `Report.missing` say why. `progress` is
    called while forward passes are timed. Raises ModelFolderError for a model without manifest, ConfigError
    for models of different sources or another number of predictions, the errors of `evaluate_folder` and
    `overlay_figure`, OutputExistsError for an existing `output` unless `force` and it is an earlier report.
    """
    with staged_folder(output, replaceable=is_report, force=force) as staging:
        content = _gather(inputs, progress)
        names = []
        for name, figure in content.figures.items():
            staging.write(name, _png(figure))
            names.append(name)
        staging.write(PAGE_NAME, render_page(content.title, content.sections).encode())
        staging.write(DATA_NAME, (json.dumps(content.data, indent=1) + "\n").encode())
    folder = Path(output)
    return Report(
        page=folder / PAGE_NAME,
        summary=content.summary,
        figures=tuple(folder / name for name in names),
        missing=content.missing,
        against_labels=content.against_labels,
        against_dense=content.against_dense,
    )


def is_report(folder: Path) -> bool:
    """Whether a folder is an earlier report."""
    return all((folder / name).is_file() for name in (PAGE_NAME, DATA_NAME))


def model_names(manifests: Sequence[Manifest]) -> list[str]:
    """A short, distinct name for each: its setting, with a number where two are alike."""
    names = [setting_name(m) for m in manifests]
    return [n if names.count(n) == 1 else f"{n} ({i + 1})" for i, n in enumerate(names)]


@dataclass
class _Content:
    title: str
    summary: TextTable
    sections: list[Section]
    figures: dict[str, Figure]
    missing: dict[str, str]
    against_labels: dict[str, Evaluation]
    against_dense: dict[str, Evaluation]
    data: dict[str, Any]


def _gather(inputs: Inputs, progress: Progress | None) -> _Content:
    manifests = [read_manifest(path) for path in inputs.models]
    _check_consistent(inputs, manifests)
    names = model_names(manifests)
    layers = {name: layers_of(m) for name, m in zip(names, manifests, strict=True)}
    predictions = dict(zip(names, inputs.predictions, strict=False))
    if inputs.dense_prediction is not None:
        predictions = {DENSE: inputs.dense_prediction, **predictions}
    dataset_json = inputs.models[0] / "dataset.json"
    if inputs.source is not None:
        _check_source(inputs.source, manifests[0])
    if predictions:
        _check_same_cases(predictions, read_dataset(dataset_json).file_ending)

    missing: dict[str, str] = {}
    against_labels = _against_labels(inputs, predictions, dataset_json, missing)
    against_dense = _against_dense(predictions, dataset_json, missing)
    forward = _forward(inputs, names, progress, missing)
    figures = {"cost_per_layer.png": cost_figure(layers), "ranks_and_errors.png": rank_figure(layers)}
    if against_labels:
        figures["accuracy.png"] = accuracy_figure(_tables(against_labels), "the labels")
    elif against_dense:
        figures["accuracy.png"] = accuracy_figure(_tables(against_dense), "the dense model's output")
    per_case = {n: s for n, s in inputs.prediction_seconds.items() if n in (DENSE, *names)}
    if forward or per_case:
        figures["speed.png"] = speed_figure({name: f.stock for name, f in forward.items()}, per_case)
    overlay = _overlay(inputs, predictions, read_dataset(dataset_json), against_labels, names, missing)
    if overlay is not None:
        figures["overlay.png"] = overlay

    title = (
        inputs.title or f"{read_json(inputs.models[0] / 'plans.json')['dataset_name']}, dense and compressed"
    )
    summary = summary_table(
        title,
        names,
        manifests,
        against_labels,
        against_dense,
        forward,
        inputs.prediction_seconds,
        inputs.network_seconds,
        inputs.peak_memory_bytes,
    )
    data = {
        "models": {n: str(p) for n, p in zip(names, inputs.models, strict=True)},
        "source_sha256": dict(manifests[0].source_sha256),
        "versions": {n: dict(m.versions) for n, m in zip(names, manifests, strict=True)},
        "totals": {
            DENSE: asdict(manifests[0].dense),
            **{n: asdict(m.tucker) for n, m in zip(names, manifests, strict=True)},
        },
        "forward_milliseconds": {n: asdict(t) for n, t in forward.items()},
        "prediction_seconds": dict(inputs.prediction_seconds),
        "network_seconds": dict(inputs.network_seconds),
        "peak_memory_bytes": dict(inputs.peak_memory_bytes),
        "dice_against_labels": {n: e.to_dict() for n, e in against_labels.items()},
        "dice_against_dense": {n: e.to_dict() for n, e in against_dense.items()},
        "missing": missing,
    }
    overlay_text = "" if overlay is None else "The plane with the largest labelled area"
    if overlay is not None and inputs.case is None and against_labels:
        overlay_text += ", of the case in the middle by Dice"
    parts = sections(
        summary, manifests, names, layers, against_labels, against_dense, figures, missing, overlay_text
    )
    return _Content(title, summary, parts, figures, missing, against_labels, against_dense, data)


def _check_consistent(inputs: Inputs, manifests: Sequence[Manifest]) -> None:
    if not manifests:
        raise ConfigError("no compressed model was given; name at least one folder")
    for path, manifest in zip(inputs.models[1:], manifests[1:], strict=True):
        if dict(manifest.source_sha256) != dict(manifests[0].source_sha256):
            raise ConfigError(
                f"{path} and {inputs.models[0]} were compressed from different models or folds; "
                "report on them separately"
            )
    if inputs.predictions and len(inputs.predictions) != len(inputs.models):
        raise ConfigError(
            f"{len(inputs.predictions)} folders of predictions were given for {len(inputs.models)} "
            "compressed models; give one for each, in the same order"
        )


def _check_source(source: Path, manifest: Manifest) -> None:
    """Raise ConfigError unless `source` holds the very checkpoints the model was compressed from."""
    for name, expected in manifest.source_sha256.items():
        path = source / name
        if not path.is_file() or sha256(path) != expected:
            raise ConfigError(
                f"{source} is not what was compressed: {name} is {'another file' if path.exists() else 'absent'}; "
                f"give the dense model {manifest.source} the compressed one came from"
            )


def _check_same_cases(predictions: Mapping[str, Path], ending: str) -> None:
    """Raise ConfigError where models were run on different cases: their means would not compare."""
    cases = {path: set(find_segmentations(path, ending)) for path in predictions.values()}
    first, *others = cases
    for other in others:
        different = sorted(cases[first] ^ cases[other])
        if different:
            raise ConfigError(
                f"{first} and {other} hold different cases ({', '.join(different[:3])}"
                f"{' and more' if len(different) > 3 else ''}); predict the same ones with every model"
            )


def _against_labels(
    inputs: Inputs, predictions: Mapping[str, Path], dataset_json: Path, missing: dict[str, str]
) -> dict[str, Evaluation]:
    if inputs.labels is None:
        missing["accuracy against the labels"] = "no labels were given (--labels)"
        return {}
    if not predictions:
        missing["accuracy against the labels"] = "no predictions were given (--pred, --dense-pred)"
        return {}
    return {
        name: evaluate_folder(path, inputs.labels, dataset_json=dataset_json, allow_missing=True)
        for name, path in predictions.items()
    }


def _against_dense(
    predictions: Mapping[str, Path], dataset_json: Path, missing: dict[str, str]
) -> dict[str, Evaluation]:
    if DENSE not in predictions or len(predictions) == 1:
        missing["agreement with the dense model"] = "it needs predictions of both (--dense-pred, --pred)"
        return {}
    dense = predictions[DENSE]
    return {
        name: evaluate_folder(path, dense, dataset_json=dataset_json, allow_missing=True)
        for name, path in predictions.items()
        if name != DENSE
    }


def _forward(
    inputs: Inputs, names: Sequence[str], progress: Progress | None, missing: dict[str, str]
) -> dict[str, Forward]:
    if not inputs.measure_speed:
        missing["forward time"] = "not measured, as asked (--no-speed)"
        return {}
    if inputs.source is None:
        missing["forward time"] = "the dense model to compare with was not given (--source)"
        return {}
    models = {DENSE: inputs.source, **dict(zip(names, inputs.models, strict=True))}
    return measure_forward(models, device=inputs.device, progress=progress)


def _overlay(
    inputs: Inputs,
    predictions: Mapping[str, Path],
    dataset: Dataset,
    against_labels: Mapping[str, Evaluation],
    names: Sequence[str],
    missing: dict[str, str],
) -> Figure | None:
    if inputs.images is None:
        missing["overlay"] = "no images were given (--images)"
        return None
    folders = {"label": inputs.labels, **predictions} if inputs.labels is not None else dict(predictions)
    if not folders:
        missing["overlay"] = "neither labels nor predictions were given to draw over the image"
        return None
    files = {name: find_segmentations(path, dataset.file_ending) for name, path in folders.items()}
    common = sorted(set.intersection(*(set(f) for f in files.values())))
    case = inputs.case or _typical_case(against_labels.get(names[0])) or (common[0] if common else None)
    if case not in common:
        raise SegmentationError(
            f"case {case} has no segmentation in every folder given; those that have are "
            f"{', '.join(common) or 'none'}"
        )
    image = inputs.images / f"{case}_0000{dataset.file_ending}"
    if not image.is_file():
        missing["overlay"] = f"{image} does not exist"
        return None
    return overlay_figure(dataset, image, {name: f[case] for name, f in files.items()}, case)


def _typical_case(evaluation: Evaluation | None) -> str | None:
    """The case in the middle by mean Dice, neither the best nor the worst."""
    if evaluation is None:
        return None
    ordered = evaluation.per_case.mean(axis=1).dropna().sort_values(kind="stable")
    return str(ordered.index[len(ordered) // 2]) if len(ordered) else None


def _tables(evaluations: Mapping[str, Evaluation]) -> dict[str, Any]:
    return {name: evaluation.per_case for name, evaluation in evaluations.items()}


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_figure(buffer, dpi=DOTS_PER_INCH, format="png")
    return buffer.getvalue()
