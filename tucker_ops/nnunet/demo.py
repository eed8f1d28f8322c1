"""The whole job on the example that comes with the source: compress, predict, evaluate, report."""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

import tucker_ops
from tucker_ops.convert import CompressionConfig
from tucker_ops.errors import ConfigError, ModelFolderError, OutputExistsError
from tucker_ops.nnunet.compress import compress_folder
from tucker_ops.nnunet.output import write_file
from tucker_ops.nnunet.predict import PredictionSummary, predict_folder
from tucker_ops.nnunet.report import Inputs, Report, write_report
from tucker_ops.nnunet.report.content import DENSE
from tucker_ops.nnunet.staging import write_error

FACTORS = (0.5, 0.3)
EXAMPLE = Path(tucker_ops.__file__).resolve().parents[1] / "examples" / "hippocampus"
MODEL = "model/Dataset004_Hippocampus/nnUNetTrainer__nnUNetPlans__3d_fullres"
MARKER = ".tucker_ops_demo"
PARTS = ("models", "predictions", "report")

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Demo:
    """What the demo made: compressed models and predictions by name, and the report with the table."""

    models: dict[str, Path]
    predictions: dict[str, PredictionSummary]
    report: Report


def demo(
    output: str | Path = "demo_out",
    *,
    example: str | Path | None = None,
    cases: int | None = None,
    factors: Sequence[float] = FACTORS,
    force: bool = False,
    progress: Progress | None = None,
) -> Demo:
    """Compress the hippocampus example at each of `factors`, predict with all models, and report.

    `example` is the folder ``examples/hippocampus`` of a checkout, found by itself in an editable install.
    The first `cases` of it are predicted, by default all ten. Each model predicts in a fresh process of its
    own, so that its time and its peak memory are its own; mirroring is off. The output of an earlier demo is
    replaced; another folder that is not empty only with `force`, and then only what the demo itself writes.
    `progress` is called with a label, the steps done, and their number. Because it starts processes, a script
    must call it under ``if __name__ == "__main__"``.

    Raises ModelFolderError where the example is absent, ConfigError for `cases` out of range,
    OutputExistsError, OutputWriteError.
    """
    example = Path(example) if example is not None else EXAMPLE
    chosen = _choose_cases(example, cases)
    output = Path(output)
    _prepare(output, force)
    say = progress or (lambda label, done, total: None)
    total = 2 * len(factors) + 2
    dense = example / MODEL

    models: dict[str, Path] = {}
    for factor in factors:
        name = f"factor {factor:g}"
        say(f"compressing to {name}", len(models), total)
        models[name] = output / "models" / name.replace(" ", "_") / dense.name
        compress_folder(dense, models[name], CompressionConfig(factor=factor))

    predictions: dict[str, PredictionSummary] = {}
    for name, model in {DENSE: dense, **models}.items():
        say(f"predicting, {name}", len(factors) + len(predictions), total)
        folder = output / "predictions" / name.replace(" ", "_")
        # The dense model as nnU-Net itself predicts.
        predictions[name] = _predict_apart(model, example / "images", folder, chosen, fused=name != DENSE)

    say("evaluating and timing", total - 1, total)
    inputs = Inputs(
        models=list(models.values()),
        source=dense,
        images=example / "images",
        labels=example / "labels",
        dense_prediction=predictions[DENSE].output,
        predictions=[predictions[name].output for name in models],
        title=f"Hippocampus, {len(chosen)} cases, no mirroring, CPU, {torch.get_num_threads()} threads",
        prediction_seconds={name: s.seconds / len(s.cases) for name, s in predictions.items()},
        network_seconds={name: s.network_seconds / len(s.cases) for name, s in predictions.items()},
        peak_memory_bytes={name: s.peak_rss_bytes for name, s in predictions.items()},
    )
    report = write_report(inputs, output / "report")
    say("", total, total)
    return Demo(models, predictions, report)


def _choose_cases(example: Path, count: int | None) -> list[str]:
    needed = ("cases.json", "images", "labels", MODEL)
    absent = [name for name in needed if not (example / name).exists()]
    if absent:
        raise ModelFolderError(
            f"{example} is not the hippocampus example: it lacks {', '.join(absent)}; the example comes with "
            "the source, not with the wheel: give its folder in a checkout with --example (example=)"
        )
    cases = json.loads((example / "cases.json").read_text())["cases"]
    if count is not None and not 1 <= count <= len(cases):
        raise ConfigError(f"{count} cases asked for; the example has 1 to {len(cases)}")
    return cases[:count]


def _prepare(output: Path, force: bool) -> None:
    if output.exists() and not output.is_dir():
        raise OutputExistsError(f"{output} is a file; choose another output folder")
    if output.is_dir() and any(output.iterdir()) and not (output / MARKER).exists() and not force:
        raise OutputExistsError(
            f"{output} is not empty and not the output of an earlier demo; choose another folder, or let its "
            f"{', '.join(PARTS)} be replaced with --force (force=True)"
        )
    write_file(
        output / MARKER, b"Made by tucker-ops demo, which replaces it when it runs again.\n", force=True
    )
    for part in PARTS:
        try:
            if (output / part).exists():
                shutil.rmtree(output / part)
        except OSError as error:
            raise write_error(output / part, error) from error


def _predict_apart(
    model: Path, images: Path, output: Path, cases: Sequence[str], *, fused: bool
) -> PredictionSummary:
    """Predict in a process that has done nothing before, so that it holds no memory of earlier work."""
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_predict_quietly, model, images, output, cases, fused).result()


def _predict_quietly(
    model: Path, images: Path, output: Path, cases: Sequence[str], fused: bool
) -> PredictionSummary:
    with contextlib.redirect_stdout(io.StringIO()):
        return predict_folder(model, images, output, cases=cases, mirroring=False, fused=fused)
