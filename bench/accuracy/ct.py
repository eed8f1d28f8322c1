"""The CT model of 24 organs: agreement with the dense model's output, on images that nothing has seen."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.accuracy.part import Part, Seen, Variant, variants
from bench.accuracy.sources import linked
from tucker_ops.nnunet.calibration import CalibrationSet
from tucker_ops.nnunet.evaluate import Evaluation, evaluate_folder
from tucker_ops.nnunet.manifest import read_manifest
from tucker_ops.nnunet.refinement import Refinement
from tucker_ops.nnunet.training import FinetuneSettings, TrainingSet

FACTORS = (0.5, 0.3, 0.2)
# mm; one voxel.
TOLERANCE = 3.0
# Voxels from which on the Dice of a class does not hang on a few of them.
SIZEABLE = 100
HALVES = ("first", "second")


class CT(Part):
    """One CT: calibrated on one half of it, judged against the dense output on the other half and on the whole.

    The halves are left and right: those of any other cut lack some organs altogether. It is done both ways round, so
    that every voxel is judged once in the output of a model that did not see it ("unseen").
    """

    AXIS = 0

    def rows(self) -> list[dict[str, Any]]:
        model = self.sources.ct_model
        self.images = linked({"ct_0000.nii.gz": self.sources.ct}, self.folder / "ct")
        self.dense = self.folder / "predictions" / "ct-dense"
        self.study.step("ct-dense", {}, self._predict_dense)
        halves = {
            half: self._half(self.sources.ct, "ct_0000.nii.gz", self.folder / f"ct-{half}", half)
            for half in HALVES
        }
        seen = {half: self._seen(half, images) for half, images in halves.items()}
        # Minutes each; below, the published policy is distilled where it has most left to build on.
        rows = [
            self._row(factor, variant, seen)
            for factor in FACTORS
            for variant in variants(model, factor)
            if variant.name != "weber2024, refined"
        ]
        # Minutes each: ours where they need it, and the published policy where it has most left to build on.
        tuned = [
            row
            for row in rows
            if row["agreement"] < self.options.ct_below
            and (row["policy"] == "calibrated" or (row["policy"], row["factor"]) == ("weber2024", FACTORS[0]))
        ]
        return rows + [self._tuned(row, halves["first"]) for row in tuned]

    def _seen(self, half: str, images: Path) -> Seen:
        data = CalibrationSet(images, patches=self.options.ct_patches, labels=self.options.ct_labels)
        calibration, seconds = self.calibrate(f"ct-{half}", self.sources.ct_model, "all", data)
        self.log(f"ct: calibrated in {seconds:.0f} s on {calibration.source}")
        return Seen(calibration, Refinement(data, self.options.refine_steps))

    def _predict_dense(self) -> dict[str, Any]:
        self.log("ct: dense")
        self.predicted("ct-dense", self.sources.ct_model, self.images, "all")
        return {}

    def _half(self, image: Path, name: str, folder: Path, half: str) -> Path:
        """`folder`, with that half of `image` in it, a file called `name`."""
        import SimpleITK

        target = folder / name
        if not target.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            volume = SimpleITK.ReadImage(str(image))
            middle = volume.GetSize()[self.AXIS] // 2
            cut = [slice(None)] * 3
            cut[self.AXIS] = slice(0, middle) if half == "first" else slice(middle, None)
            partial = folder / f".{name}"
            SimpleITK.WriteImage(volume[tuple(cut)], str(partial))
            partial.replace(target)
        return folder

    def _joined(self, first: Path, second: Path) -> Path:
        """A folder whose one image has the first half from `first` and the second from `second`."""
        import SimpleITK

        joined, other = (SimpleITK.ReadImage(str(folder / "ct.nii.gz")) for folder in (first, second))
        cut = [slice(None)] * 3
        cut[self.AXIS] = slice(joined.GetSize()[self.AXIS] // 2, None)
        joined[tuple(cut)] = other[tuple(cut)]
        folder = self.folder / "halves" / f"{second.name}-joined"
        folder.mkdir(parents=True, exist_ok=True)
        SimpleITK.WriteImage(joined, str(folder / "ct.nii.gz"))
        return folder

    def _judge(self, name: str, swapped: str | None) -> dict[str, Any]:
        """Agreement with the dense output on the whole, of the model `name` and of `swapped`; on the second half, which
        `name` did not see, and on the first, which `swapped` did not (or is `name`, where that saw neither); and
        "unseen": the two together."""
        folders = {"second": self.folder / "predictions" / name, "first": None}
        whole = self._evaluation(folders["second"], self.dense)
        both = {"unseen": None, "swapped": None}
        if swapped is not None:
            folders["first"] = self.folder / "predictions" / swapped
            both["unseen"] = self._evaluation(self._joined(folders["first"], folders["second"]), self.dense)
            both["swapped"] = whole if swapped == name else self._evaluation(folders["first"], self.dense)
        found = {}
        for key, evaluation in both.items():
            found[key] = evaluation and evaluation.mean
            found[f"{key}_worst_class"], found[f"{key}_worst"] = (
                evaluation.worst_class if evaluation else (None, None)
            )
        return found | {
            "agreement": whole.mean,
            "worst_class": whole.worst_class[0],
            "worst": whole.worst_class[1],
            "nsd": float(whole.nsd_per_case.mean().mean()),
            "halves": {half: folder and self._on_half(folder, half) for half, folder in folders.items()},
            "dice_per_class": whole.to_dict()["dice_per_class"],
        }

    def _evaluation(self, predicted: Path, reference: Path) -> Evaluation:
        dataset_json = self.sources.ct_model / "dataset.json"
        return evaluate_folder(predicted, reference, dataset_json=dataset_json, nsd_tolerance=TOLERANCE)

    def _on_half(self, folder: Path, half: str) -> dict[str, Any]:
        cut = []
        for part in (folder, self.dense):
            target = self.folder / "halves" / half / part.name
            (target / "ct.nii.gz").unlink(missing_ok=True)
            cut.append(self._half(part / "ct.nii.gz", "ct.nii.gz", target, half))
        found = self._evaluation(*cut)
        voxels = found.metrics["n_ref"].unstack("class").iloc[0]
        sizeable = found.per_class[voxels[found.per_class.index] >= SIZEABLE]
        return {
            "mean": found.mean,
            "worst_class": found.worst_class[0],
            "worst": found.worst_class[1],
            "worst_voxels": int(voxels[found.worst_class[0]]),
            "worst_sizeable": float(sizeable.min()),
        }

    def _row(self, factor: float, variant: Variant, seen: Mapping[str, Seen]) -> dict[str, Any]:
        name = f"ct-{factor}-{variant.slug}"
        names = {"first": name} | ({"second": f"{name}-second"} if variant.calibrated else {})
        swapped = names.get("second", None if variant.calibrated else name)
        models, known = {}, {}
        for half, called in names.items():
            models[half], known[half] = self.compressed(
                called, self.sources.ct_model, variant, "all", seen[half]
            )

        def make():
            for half, called in names.items():
                self.log(called)
                self.predicted(called, models[half], self.images, "all")
            return self._judge(name, swapped)

        row = self.study.step(name, known, make)
        about = {"data": "ct", "name": name, "factor": factor, "policy": variant.name, "steps": 0}
        return about | self.size(models["first"]) | row

    def _tuned(self, before: Mapping[str, Any], half: Path) -> dict[str, Any]:
        """Label-free distillation on the half that calibration saw."""
        name = f"{before['name']}-tuned"
        model, target = self.folder / "models" / before["name"], self.folder / "models" / name
        settings = FinetuneSettings(steps=self.options.ct_steps, batch_size=1, patch_size=(64, 64, 64))

        def make():
            self.log(f"{name}: {settings.steps} steps")
            data = TrainingSet(images=half)
            run = self.finetune(model, target, data, settings, teacher=self.sources.ct_model, folds=("all",))
            self.predicted(name, target, self.images, "all")
            return run | self._judge(name, None)

        manifest = read_manifest(model)
        resolved = settings.resolved(has_labels=False)
        arguments = {"settings": resolved.to_dict(), "config": manifest.config.to_dict()}
        row = self.study.step(name, arguments | {"calibration": manifest.plan.calibration}, make)
        return {**before, "name": name, "steps": settings.steps} | row
