"""The hippocampus model: Dice on labelled cases that nothing has seen."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.accuracy.part import Part, Seen, Variant, variants
from bench.accuracy.sources import calibration_cases, linked
from tucker_ops.convert import CompressionConfig
from tucker_ops.nnunet.calibration import CalibrationSet
from tucker_ops.nnunet.compare import compare_tables
from tucker_ops.nnunet.compress import plan_folder
from tucker_ops.nnunet.evaluate import evaluate_folder
from tucker_ops.nnunet.manifest import read_manifest
from tucker_ops.nnunet.refinement import Refinement
from tucker_ops.nnunet.training import FinetuneSettings, TrainingSet

FACTORS = (0.5, 0.3, 0.2, 0.1)
TUNED_FACTORS = (0.3, 0.2, 0.1)
# mm; the Medical Segmentation Decathlon's.
TOLERANCE = 1.0


class Hippocampus(Part):
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
        seen = Seen(calibration, Refinement(data, self.options.refine_steps))
        for factor in FACTORS:
            for variant in variants(model, factor):
                rows.append(self._row(factor, variant, seen))
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
        evaluation = evaluate_folder(folder, self.sources.labels, allow_missing=True, nsd_tolerance=TOLERANCE)
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

    def _row(self, factor: float, variant: Variant, seen: Seen) -> dict[str, Any]:
        name = f"hippocampus-{factor}-{variant.slug}"
        model, known = self.compressed(name, self.sources.hippocampus, variant, 0, seen)

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

            teacher = self.sources.hippocampus
            run = self.finetune(model, target, data, settings, teacher=teacher, progress=progress)
            return run | self._judge(self.predicted(name, target, self.images, 0))

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
