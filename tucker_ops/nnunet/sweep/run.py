"""Compress to several budgets, predict and judge each; what is done outlives an interrupt."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tucker_ops.convert import Calibration, CompressionConfig, Plan
from tucker_ops.errors import ConfigError
from tucker_ops.fused import fuse
from tucker_ops.nnunet.calibration import CalibrationSet, calibrate_network
from tucker_ops.nnunet.checkpoint import read_checkpoint, sha256
from tucker_ops.nnunet.compare import compare
from tucker_ops.nnunet.compress import (
    compress_folder,
    input_shape,
    is_earlier_output,
    load_network,
    plan_folder,
)
from tucker_ops.nnunet.evaluate import evaluate_folder
from tucker_ops.nnunet.folder import DEFAULT_CHECKPOINT, Fold, ModelFolder, read_model_folder
from tucker_ops.nnunet.images import find_cases, fingerprint
from tucker_ops.nnunet.latency import time_network
from tucker_ops.nnunet.manifest import read_manifest
from tucker_ops.nnunet.networks import build_network
from tucker_ops.nnunet.predict import predict_folder
from tucker_ops.nnunet.refinement import Refinement
from tucker_ops.nnunet.study import Study, claim

Progress = Callable[[str, int, int], None]
STATE = "sweep.json"
COSTS = ("parameters", "macs", "milliseconds")


@dataclass(frozen=True)
class Sweep:
    """``rows`` begin with the dense model: name, parameters, macs, milliseconds (median of one patch through the fused
    network, fp32), dice, and what was lost: mean_drop, worst_class, worst_class_drop (None for the dense model).

    ``against`` says what Dice is with: labels, or the dense model's output.
    """

    folder: Path
    against: str
    rows: tuple[Mapping[str, Any], ...]

    def front(self, cost: str) -> list[str]:
        """Names of the rows that no other beats in `cost` and Dice at once, cheapest first."""
        kept: list[Mapping[str, Any]] = []
        for row in sorted(self.rows, key=lambda r: (r[cost], -r["dice"])):
            if not kept or row["dice"] > kept[-1]["dice"]:
                kept.append(row)
        return [row["name"] for row in kept]


def sweep_folder(
    model_dir: str | Path,
    output_dir: str | Path,
    images: str | Path,
    configs: Sequence[CompressionConfig],
    *,
    labels: str | Path | None = None,
    calibrate: CalibrationSet | None = None,
    refine: Refinement | None = None,
    fold: Fold | None = None,
    checkpoint: str = DEFAULT_CHECKPOINT,
    device: str = "cpu",
    trust: bool = False,
    progress: Progress | None = None,
) -> Sweep:
    """Compress one fold of a model under each of `configs`, and predict `images` with each and with the dense model.

    `calibrate` is used once, for all, and `refine` for each but those of the published rule. Models, predictions and
    figures stay in `output_dir`; the same call goes on where an interrupted one was, and further configs add to what is
    there. Times are measured anew at the end, all in one go, so that they compare.

    Raises ConfigError where a config is given twice or none is; OutputExistsError where `output_dir` holds something
    else, ResumeError where it holds the sweep of another model, calibration or refinement; and the errors of
    `compress_folder`, `predict_folder` and `evaluate_folder`.
    """
    names = [_name(config) for config in configs]
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"a sweep takes budgets that differ, got {', '.join(names) or 'none'}")
    model = read_model_folder(
        model_dir, folds=None if fold is None else (fold,), checkpoint=checkpoint, trust=trust
    )
    fold = model.select_folds(None if fold is None else (fold,), checkpoint)[0]
    find_cases(images, model.dataset_json["file_ending"], model.input_channels)
    return _Run(
        model, Path(output_dir), Path(images), labels and Path(labels), calibrate, refine, fold, checkpoint,
        device, trust, progress,
    ).run(dict(zip(names, configs, strict=True)))  # fmt: skip


def _name(config: CompressionConfig) -> str:
    value = f"{getattr(config, config.policy):.12g}"
    if config == CompressionConfig.weber2024(config.factor or 1.0):
        return f"weber2024 {value}"
    ranks = (
        "" if (config.min_rank, config.align) == (8, 8) else f", ranks {config.min_rank} by {config.align}"
    )
    if config.tap_ranks is False:
        ranks += ", no tap ranks"
    return f"{config.policy} {value}{ranks}"


def _slug(name: str) -> str:
    return name.replace(", ", "_").replace(" ", "_")


@dataclass
class _Run:
    model: ModelFolder
    folder: Path
    images: Path
    labels: Path | None
    calibrate: CalibrationSet | None
    refine: Refinement | None
    fold: Fold
    checkpoint: str
    device: str
    trust: bool
    progress: Progress | None

    def run(self, configs: Mapping[str, CompressionConfig]) -> Sweep:
        self._open()
        study = Study(self.folder)
        steps = len(configs) + 1
        self._report("dense model", 0, steps)
        # A budget that cannot be met, or a model that is compressed already, is refused before hours are spent.
        for config in configs.values():
            if config.policy != "latency_ms":
                self._plan(config)
        places = {"images": self.images, "labels": self.labels}
        arguments = {name: place and fingerprint(place) for name, place in places.items()}
        dense = study.step("dense", arguments, lambda: self._predict("dense", self.model.path))
        # The calibration of several minutes is made when the first model needs it.
        rows, needed = [self._dense_row(dense)], any(not self._is_made(n, c) for n, c in configs.items())
        calibration = self._calibration() if needed and self.calibrate is not None else None
        for done, (name, config) in enumerate(configs.items(), start=1):
            self._report(name, done, steps)
            target = self.folder / "models" / _slug(name)
            if not self._is_made(name, config):
                published = name.startswith("weber")
                compress_folder(
                    self.model.path, target, config, folds=(self.fold,), checkpoint=self.checkpoint,
                    calibrate=None if calibration is None or published else {self.fold: calibration},
                    refine=None if published else self.refine, force=target.is_dir(), trust=self.trust,
                )  # fmt: skip
            asked = arguments | {"weights": sha256(target / f"fold_{self.fold}" / self.checkpoint)}
            row = study.step(_slug(name), asked, lambda n=name, t=target: self._predict(n, t))
            rows.append(self._row(name, target, row))
        self._time(rows)
        self._report("", steps, steps)
        return Sweep(self.folder, "labels" if self.labels else "the dense model's output", tuple(rows))

    def _report(self, label: str, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress(label, done, total)

    def _open(self) -> None:
        arguments = {
            "model": sha256(self.model.checkpoint_path(self.fold, self.checkpoint)),
            "fold": self.fold,
            "calibrate": None
            if self.calibrate is None
            else self.calibrate.describe() | {"folder": self.calibrate.folder},
            "refine": self.refine and self.refine.describe() | {"folder": self.refine.data.folder},
        }
        claim(self.folder, STATE, arguments, work="a sweep", otherwise="choose another output, or remove it")

    def _is_made(self, name: str, config: CompressionConfig) -> bool:
        target = self.folder / "models" / _slug(name)
        return is_earlier_output(target) and read_manifest(target).config == config

    def _calibration(self) -> Calibration:
        path = self.folder / "calibration.pt"
        if path.is_file():
            return Calibration.from_dict(torch.load(path, weights_only=True))
        network = load_network(self.model, self.fold, self.checkpoint, trust=self.trust)
        calibration = calibrate_network(
            network, self.model, self.calibrate, self.fold, progress=self.progress
        )
        partial = path.with_suffix(".partial")
        torch.save(calibration.to_dict(), partial)
        partial.replace(path)
        return calibration

    def _predictions(self, name: str) -> Path:
        return self.folder / "predictions" / _slug(name)

    def _predict(self, name: str, model: Path) -> dict[str, Any]:
        target = self._predictions(name)
        # Segmentations of images that are no longer there would be judged as well.
        shutil.rmtree(target, ignore_errors=True)
        predict_folder(
            model, self.images, target, folds=(self.fold,), checkpoint=self.checkpoint, device=self.device,
            mirroring=False, precision="fp32", overwrite=True, trust=self.trust,
        )  # fmt: skip
        return self._judge(name)

    def _judge(self, name: str) -> dict[str, Any]:
        reference = self.labels or self._predictions("dense")
        options = {"dataset_json": self.model.path / "dataset.json", "allow_missing": True}
        evaluation = evaluate_folder(self._predictions(name), reference, **options)
        if name == "dense":
            return {"dice": evaluation.mean}
        of_dense = evaluate_folder(self._predictions("dense"), reference, **options)
        comparison = compare(of_dense, evaluation).to_dict()
        agreement = evaluate_folder(self._predictions(name), self._predictions("dense"), **options).mean
        kept = ("mean_drop", "mean_drop_interval", "worst_class", "worst_class_drop")
        return {"dice": evaluation.mean, "agreement": agreement} | {key: comparison[key] for key in kept}

    def _dense_row(self, judged: Mapping[str, Any]) -> dict[str, Any]:
        cost = self._plan(CompressionConfig(factor=1.0, only_if_cheaper=False)).dense
        nothing = {"agreement": 1.0, "mean_drop": None, "worst_class": None, "worst_class_drop": None}
        return {"name": "dense", "parameters": cost.params, "macs": cost.macs} | nothing | judged

    def _plan(self, config: CompressionConfig) -> Plan:
        options = {"folds": (self.fold,), "checkpoint": self.checkpoint, "trust": self.trust}
        return plan_folder(self.model.path, config, **options)

    def _row(self, name: str, model: Path, judged: Mapping[str, Any]) -> dict[str, Any]:
        totals = read_manifest(model).tucker
        return {"name": name, "parameters": totals.parameters, "macs": totals.macs, **judged}

    def _time(self, rows: list[dict[str, Any]]) -> None:
        """Adds milliseconds: the least of three medians, taken in turns, as others use the machine too."""
        networks = {row["name"]: self._network(row["name"]) for row in rows}
        x = torch.randn(input_shape(self.model), device=self.device)
        times = dict.fromkeys(networks, math.inf)
        for _ in range(3):
            for name, network in networks.items():
                times[name] = min(times[name], time_network(network, x, seconds=0.5)[0])
        for row in rows:
            row["milliseconds"] = times[row["name"]]

    def _network(self, name: str) -> torch.nn.Module:
        folder = self.model
        if name != "dense":
            folder = read_model_folder(self.folder / "models" / _slug(name), checkpoint=self.checkpoint)
        network = build_network(folder.architecture, folder.input_channels, folder.num_outputs)
        path = folder.checkpoint_path(self.fold, self.checkpoint)
        network.load_state_dict(read_checkpoint(path, trust=self.trust)["network_weights"])
        return fuse(network.to(self.device).eval().requires_grad_(False), precision="fp32")
