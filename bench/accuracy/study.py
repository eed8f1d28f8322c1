"""The steps of the study. Each is kept, so that an interrupted run goes on where it was."""

from __future__ import annotations

import copy
import json
import re
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.accuracy.sources import Sources, calibration_cases, linked
from tucker_ops.convert import Calibration, CompressionConfig, substitute
from tucker_ops.errors import ResumeError
from tucker_ops.fused import fuse
from tucker_ops.nnunet.calibration import CalibrationSet, calibrate_network
from tucker_ops.nnunet.compare import compare_tables
from tucker_ops.nnunet.compress import compress_folder, input_shape, load_network, plan_folder
from tucker_ops.nnunet.evaluate import evaluate_folder
from tucker_ops.nnunet.folder import Fold, read_model_folder
from tucker_ops.nnunet.latency import plan_for_latency, time_network
from tucker_ops.nnunet.manifest import read_manifest
from tucker_ops.nnunet.output import write_file
from tucker_ops.nnunet.predict import predict_folder
from tucker_ops.nnunet.refinement import Refinement
from tucker_ops.nnunet.study import Study
from tucker_ops.nnunet.training import FinetuneSettings, TrainingSet, finetune_folder

FACTORS = (0.5, 0.3, 0.2, 0.1)
CT_FACTORS = (0.5, 0.3, 0.2)
TUNED_FACTORS = (0.3, 0.2, 0.1)
# mm; the Medical Segmentation Decathlon's for the hippocampus, one voxel of the CT.
TOLERANCES = {"hippocampus": 1.0, "ct": 3.0}
# Voxels from which on the Dice of a class does not hang on a few of them.
SIZEABLE = 100

Log = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """Everything that a figure depends on besides code and data."""

    calibration_cases: int = 9
    calibration_patches: int = 18
    ct_patches: int = 1
    ct_labels: int = 24
    refine_steps: int = 100
    ct_refine_steps: int = 60
    finetune_steps: int = 200
    ct_steps: int = 100
    ct_below: float = 0.9
    latency_shares: tuple[float, ...] = (0.8, 0.6, 0.45)


def run(sources: Sources, folder: Path, options: Options, log: Log) -> list[dict[str, Any]]:
    """All rows: what was compressed, how, to how many parameters, and what it lost."""
    study = Study(folder)
    rows = _Hippocampus(sources, folder, options, study, log).rows()
    rows += _CT(sources, folder, options, study, log).rows()
    return rows + latency_rows(sources.hippocampus, options, log)


def latency_rows(model: Path, options: Options, log: Log) -> list[dict[str, Any]]:
    """Budgets of milliseconds, and what the networks planned for them take when timed again afterwards, in turns."""
    source = read_model_folder(model)
    network, shape = load_network(source, 0).requires_grad_(False), input_shape(source)
    x = torch.randn(shape)
    dense_ms, _ = time_network(fuse(copy.deepcopy(network), precision="fp32"), x)
    rows, networks = [], []
    for share in options.latency_shares:
        log(f"latency: {share:g} of {dense_ms:.1f} ms")
        plan, found = plan_for_latency(network, CompressionConfig(latency_ms=share * dense_ms), shape)
        networks.append(fuse(substitute(copy.deepcopy(network), plan.ranks).eval(), precision="fp32"))
        rows.append(
            {
                "data": "latency",
                "name": f"latency-{share:g}",
                "asked_ms": found.asked_ms,
                "planned_ms": found.measured_ms,
                "dense_ms": found.dense_ms,
                "of_dense": plan.compressed.params / plan.dense.params,
                "macs_of_dense": plan.compressed.macs / plan.dense.macs,
            }
        )
    times = [[time_network(n, x)[0] for n in networks] for _ in range(3)]
    for index, row in enumerate(rows):
        row["again_ms"] = statistics.median(turn[index] for turn in times)
    return rows


@dataclass(frozen=True)
class Variant:
    """A policy of the tables: whether it sees unlabelled images when it chooses, and is refined on them."""

    name: str
    config: CompressionConfig
    calibrated: bool = True
    refined: bool = False

    @property
    def slug(self) -> str:
        return re.sub("[^a-z0-9]+", "-", self.name.lower())


def variants(model: Path, factor: float) -> tuple[Variant, ...]:
    """The published policy, and ours with as many parameters or as many multiply-accumulates as that leaves."""
    published = CompressionConfig.weber2024(factor)
    cost = plan_folder(model, published).compressed
    params, macs = CompressionConfig(params=cost.params), CompressionConfig(macs=cost.macs)
    return (
        Variant("weber2024", published, calibrated=False),
        Variant("weber2024, refined", published, calibrated=False, refined=True),
        Variant("budget", params, calibrated=False),
        Variant("calibrated", params),
        Variant("calibrated, ranks by 4", CompressionConfig(params=cost.params, min_rank=4, align=4)),
        Variant("calibrated, refined", params, refined=True),
        Variant("calibrated, same MACs", macs),
        Variant("calibrated, same MACs, refined", macs, refined=True),
    )


@dataclass
class _Part:
    sources: Sources
    folder: Path
    options: Options
    study: Study
    log: Log

    def calibrate(
        self, name: str, model: Path, fold: Fold, data: CalibrationSet
    ) -> tuple[Calibration, float]:
        """The calibration and the seconds it took; kept as a file."""
        path = self.folder / "calibrations" / f"{name}.pt"
        arguments = {"model": model.parent.name, **data.describe()}
        if path.is_file():
            kept = torch.load(path, weights_only=True)
            if kept["arguments"] == arguments:
                return Calibration.from_dict(kept["calibration"]), kept["seconds"]
        self.log(f"{name}: calibrating")
        start = time.perf_counter()
        source = read_model_folder(model, folds=(fold,))
        calibration = calibrate_network(load_network(source, fold), source, data)
        seconds = time.perf_counter() - start
        content = {"arguments": arguments, "calibration": calibration.to_dict(), "seconds": seconds}
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        torch.save(content, partial)
        partial.replace(path)
        return calibration, seconds

    def compressed(
        self,
        name: str,
        model: Path,
        variant: Variant,
        fold: Fold,
        calibration: Calibration,
        refine: Refinement,
    ) -> tuple[Path, dict[str, Any]]:
        """The model folder, made unless it is there, and what it depends on."""
        target = self.folder / "models" / name
        digest = calibration.digest if variant.calibrated else None
        known = {"config": variant.config.to_dict(), "calibration": digest}
        known["refine"] = refine.describe() if variant.refined else None
        kept = target.with_name(f"{name}.json")
        if (
            target.is_dir()
            and kept.is_file()
            and json.loads(kept.read_text()) == json.loads(json.dumps(known))
        ):
            return target, known
        self.log(f"{name}: compressing")
        kept.unlink(missing_ok=True)
        compress_folder(
            model,
            target,
            variant.config,
            folds=(fold,),
            calibrate={fold: calibration} if variant.calibrated else None,
            refine=refine if variant.refined else None,
            force=target.is_dir(),
        )
        write_file(kept, json.dumps(known).encode(), force=True)
        return target, known

    def predicted(self, name: str, model: Path, images: Path, fold: Fold) -> Path:
        target = self.folder / "predictions" / name
        predict_folder(
            model, images, target, folds=(fold,), mirroring=False, precision="fp32", overwrite=True
        )
        return target

    def finetune(self, *arguments: Any, **options: Any) -> None:
        """Goes on from what an interrupted run left, unless that was of another model or other settings."""
        try:
            finetune_folder(*arguments, **options, force=True)
        except ResumeError:
            finetune_folder(*arguments, **options, force=True, restart=True)

    def size(self, model: Path) -> dict[str, Any]:
        manifest = read_manifest(model)
        return {
            "parameters": manifest.tucker.parameters,
            "of_dense": manifest.tucker.parameters / manifest.dense.parameters,
            "macs": manifest.tucker.macs,
            "macs_of_dense": manifest.tucker.macs / manifest.dense.macs,
        }


class _Hippocampus(_Part):
    """39 validation cases of fold 0; calibration and fine-tuning see training cases of fold 0 alone."""

    def rows(self) -> list[dict[str, Any]]:
        model, cases = self.sources.hippocampus, self.sources.cases("val")
        self.images = linked(
            {f"{c}_0000.nii.gz": self.sources.images / f"{c}_0000.nii.gz" for c in cases},
            self.folder / "validation",
        )
        self.dense = self._dense()
        names = calibration_cases(self.sources, self.options.calibration_cases)
        data = CalibrationSet(
            self.sources.images, cases=tuple(names), patches=self.options.calibration_patches
        )
        calibration, seconds = self.calibrate("hippocampus", model, 0, data)
        self.log(f"hippocampus: calibrated in {seconds:.0f} s on {calibration.source}")
        rows, models = [self.dense], {}
        refine = Refinement(data, self.options.refine_steps)
        for factor in FACTORS:
            for variant in variants(model, factor):
                rows.append(self._row(factor, variant, calibration, refine))
                models[factor, variant.name] = self.folder / "models" / rows[-1]["name"]
        tuned = [(factor, policy) for factor in TUNED_FACTORS for policy in ("weber2024", "calibrated")]
        rows += [self._tuned(factor, policy, models[factor, policy]) for factor, policy in tuned]
        return [*rows, self._tuned(1.0, "dense", model)]

    def _dense(self) -> dict[str, Any]:
        def make():
            self.log("hippocampus: dense")
            folder = self.predicted("hippocampus-dense", self.sources.hippocampus, self.images, 0)
            return self._judge(folder)

        row = self.study.step("hippocampus-dense", {"cases": self.sources.cases("val")}, make)
        cost = plan_folder(self.sources.hippocampus, CompressionConfig(factor=0.5)).dense
        size = {"parameters": cost.params, "of_dense": 1.0, "macs": cost.macs, "macs_of_dense": 1.0}
        about = {
            "data": "hippocampus",
            "name": "hippocampus-dense",
            "factor": 1.0,
            "policy": "dense",
            "steps": 0,
        }
        return about | size | row

    def _judge(self, folder: Path) -> dict[str, Any]:
        evaluation = evaluate_folder(
            folder, self.sources.labels, allow_missing=True, nsd_tolerance=TOLERANCES["hippocampus"]
        )
        dice = evaluation.per_case
        return {
            "dice": evaluation.mean,
            "nsd": float(evaluation.nsd_per_case.mean().mean()),
            "dice_per_class": evaluation.per_class.to_dict(),
            "dice_per_case": {case: values.to_dict() for case, values in dice.iterrows()},
        }

    def _against_dense(self, row: Mapping[str, Any]) -> dict[str, Any]:
        import pandas as pd

        tables = [pd.DataFrame.from_dict(r["dice_per_case"], orient="index") for r in (self.dense, row)]
        return compare_tables(*tables).to_dict()

    def _row(
        self, factor: float, variant: Variant, calibration: Calibration, refine: Refinement
    ) -> dict[str, Any]:
        name = f"hippocampus-{factor}-{variant.slug}"
        model, known = self.compressed(name, self.sources.hippocampus, variant, 0, calibration, refine)

        def make():
            self.log(name)
            return self._judge(self.predicted(name, model, self.images, 0))

        row = self.study.step(name, known, make)
        about = {"data": "hippocampus", "name": name, "factor": factor, "policy": variant.name, "steps": 0}
        return about | self.size(model) | row | self._against_dense(row)

    def _tuned(self, factor: float, policy: str, model: Path) -> dict[str, Any]:
        name = f"hippocampus-{factor}-{policy}-tuned"
        settings = FinetuneSettings(steps=self.options.finetune_steps, batch_size=2)
        data = TrainingSet(images=self.sources.images, labels=self.sources.labels, splits=self.sources.splits)
        target = self.folder / "models" / name

        def make():
            self.log(f"{name}: {settings.steps} steps")
            start = time.perf_counter()
            every = 25

            def progress(label, done, total):
                if label == "training" and done % every == 0:
                    self.log(f"{name}: step {done} of {total}, {time.perf_counter() - start:.0f} s")

            self.finetune(model, target, data, settings, teacher=self.sources.hippocampus, progress=progress)
            seconds = time.perf_counter() - start
            return {"seconds": seconds} | self._judge(self.predicted(name, target, self.images, 0))

        resolved = settings.resolved(has_labels=True)
        arguments = {"settings": resolved.to_dict(), "from": policy, "factor": factor}
        if policy != "dense":
            manifest = read_manifest(model)
            arguments |= {"config": manifest.config.to_dict(), "calibration": manifest.plan.calibration}
        row = self.study.step(name, arguments, make)
        size = {key: self.dense[key] for key in ("parameters", "of_dense", "macs", "macs_of_dense")}
        if policy != "dense":
            size = self.size(model)
        about = {
            "data": "hippocampus",
            "name": name,
            "factor": factor,
            "policy": policy,
            "steps": settings.steps,
        }
        return about | size | row | self._against_dense(row)


class _CT(_Part):
    """One CT: calibrated on one half of it, judged against the dense output on the other half and on the whole.

    The halves are left and right: those of any other cut lack some organs altogether.
    """

    AXIS = 0

    def rows(self) -> list[dict[str, Any]]:
        model = self.sources.ct_model
        self.images = linked({"ct_0000.nii.gz": self.sources.ct}, self.folder / "ct")
        half = self._half(self.sources.ct, "ct_0000.nii.gz", self.folder / "ct-half", first=True)
        self.dense = self.folder / "predictions" / "ct-dense"
        self.study.step("ct-dense", {}, self._predict_dense)
        data = CalibrationSet(half, patches=self.options.ct_patches, labels=self.options.ct_labels)
        calibration, seconds = self.calibrate("ct", model, "all", data)
        self.log(f"ct: calibrated in {seconds:.0f} s on {calibration.source}")
        rows, refine = [], Refinement(data, self.options.ct_refine_steps)
        for factor in CT_FACTORS:
            for variant in variants(model, factor):
                # Minutes each; below, the published policy is distilled where it has most left to build on.
                if variant.name != "weber2024, refined":
                    rows.append(self._row(factor, variant, calibration, refine))
        # Ten minutes each: ours where they need it, and the published policy where it has most left to build on.
        tuned = [
            row
            for row in rows
            if row["agreement"] < self.options.ct_below
            and (
                row["policy"] == "calibrated"
                or (row["policy"], row["factor"]) == ("weber2024", CT_FACTORS[0])
            )
        ]
        return rows + [self._tuned(row, half) for row in tuned]

    def _predict_dense(self) -> dict[str, Any]:
        self.log("ct: dense")
        self.predicted("ct-dense", self.sources.ct_model, self.images, "all")
        return {}

    def _half(self, image: Path, name: str, folder: Path, *, first: bool) -> Path:
        import SimpleITK

        target = folder / name
        if not target.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            volume = SimpleITK.ReadImage(str(image))
            middle = volume.GetSize()[self.AXIS] // 2
            cut = [slice(None)] * 3
            cut[self.AXIS] = slice(0, middle) if first else slice(middle, None)
            partial = folder / f".{name}"
            SimpleITK.WriteImage(volume[tuple(cut)], str(partial))
            partial.replace(target)
        return folder

    def _judge(self, name: str) -> dict[str, Any]:
        """Agreement with the dense output on the whole, and on the half that calibration did not see."""
        described = {
            "dataset_json": self.sources.ct_model / "dataset.json",
            "nsd_tolerance": TOLERANCES["ct"],
        }
        folder = self.folder / "predictions" / name
        whole = evaluate_folder(folder, self.dense, **described)
        halves = []
        for part in (folder, self.dense):
            target = self.folder / "halves" / part.name
            (target / "ct.nii.gz").unlink(missing_ok=True)
            halves.append(self._half(part / "ct.nii.gz", "ct.nii.gz", target, first=False))
        other = evaluate_folder(*halves, **described)
        voxels = other.metrics["n_ref"].unstack("class").iloc[0]
        sizeable = other.per_class[voxels[other.per_class.index] >= SIZEABLE]
        return {
            "agreement": whole.mean,
            "worst_class": whole.worst_class[0],
            "worst": whole.worst_class[1],
            "nsd": float(whole.nsd_per_case.mean().mean()),
            "other_half": other.mean,
            "other_half_worst_class": other.worst_class[0],
            "other_half_worst": other.worst_class[1],
            "other_half_worst_voxels": int(voxels[other.worst_class[0]]),
            "other_half_worst_sizeable": float(sizeable.min()),
            "dice_per_class": whole.to_dict()["dice_per_class"],
        }

    def _row(
        self, factor: float, variant: Variant, calibration: Calibration, refine: Refinement
    ) -> dict[str, Any]:
        name = f"ct-{factor}-{variant.slug}"
        model, known = self.compressed(name, self.sources.ct_model, variant, "all", calibration, refine)

        def make():
            self.log(name)
            self.predicted(name, model, self.images, "all")
            return self._judge(name)

        row = self.study.step(name, known, make)
        about = {"data": "ct", "name": name, "factor": factor, "policy": variant.name, "steps": 0}
        return about | self.size(model) | row

    def _tuned(self, before: Mapping[str, Any], half: Path) -> dict[str, Any]:
        """Label-free distillation on the half that calibration saw."""
        name = f"{before['name']}-tuned"
        model, target = self.folder / "models" / before["name"], self.folder / "models" / name
        settings = FinetuneSettings(steps=self.options.ct_steps, batch_size=1, patch_size=(64, 64, 64))

        def make():
            self.log(f"{name}: {settings.steps} steps")
            start = time.perf_counter()
            data = TrainingSet(images=half)
            self.finetune(model, target, data, settings, teacher=self.sources.ct_model, folds=("all",))
            seconds = time.perf_counter() - start
            self.predicted(name, target, self.images, "all")
            return {"seconds": seconds} | self._judge(name)

        manifest = read_manifest(model)
        resolved = settings.resolved(has_labels=False)
        arguments = {"settings": resolved.to_dict(), "config": manifest.config.to_dict()}
        row = self.study.step(name, arguments | {"calibration": manifest.plan.calibration}, make)
        return {**before, "name": name, "steps": settings.steps} | row


def write_rows(rows: list[dict[str, Any]], path: Path) -> None:
    """Rows as JSON, one a line, without the values of every case."""
    from bench.folders import as_json

    kept = [{key: value for key, value in row.items() if key != "dice_per_case"} for row in rows]
    write_file(path, as_json(kept).encode(), force=True)
