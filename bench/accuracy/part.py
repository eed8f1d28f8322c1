"""What both parts of the study share: the policies, and steps that are kept."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.accuracy.sources import Sources
from tucker_ops.convert import Calibration, CompressionConfig
from tucker_ops.errors import ResumeError
from tucker_ops.nnunet.calibration import CalibrationSet, calibrate_network
from tucker_ops.nnunet.compress import compress_folder, load_network, plan_folder
from tucker_ops.nnunet.folder import Fold, read_model_folder
from tucker_ops.nnunet.manifest import read_manifest
from tucker_ops.nnunet.output import write_file
from tucker_ops.nnunet.predict import predict_folder
from tucker_ops.nnunet.refinement import Refinement
from tucker_ops.nnunet.study import Study
from tucker_ops.nnunet.training import finetune_folder

Log = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """Everything that a figure depends on besides code and data."""

    calibration_cases: int = 9
    calibration_patches: int = 18
    ct_patches: int = 1
    ct_labels: int = 24
    refine_steps: int = 100
    finetune_steps: int = 200
    ct_steps: int = 100
    ct_below: float = 0.9
    latency_shares: tuple[float, ...] = (0.8, 0.6, 0.45)


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


@dataclass(frozen=True)
class Seen:
    """The unlabelled images that a policy may see: what calibration found on them, and how long to refine on them."""

    calibration: Calibration
    refine: Refinement


@dataclass
class Part:
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
        seen: Seen,
    ) -> tuple[Path, dict[str, Any]]:
        """The model folder, made unless it is there, and what it depends on."""
        target = self.folder / "models" / name
        digest = seen.calibration.digest if variant.calibrated else None
        known = {"config": variant.config.to_dict(), "calibration": digest}
        known["refine"] = seen.refine.describe() if variant.refined else None
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
            calibrate={fold: seen.calibration} if variant.calibrated else None,
            refine=seen.refine if variant.refined else None,
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

    def finetune(self, *arguments: Any, **options: Any) -> dict[str, Any]:
        """How long it took and in which precision. Goes on from what an interrupted run left, unless that was of
        another model or other settings."""
        start = time.perf_counter()
        try:
            summary = finetune_folder(*arguments, **options, force=True)
        except ResumeError:
            summary = finetune_folder(*arguments, **options, force=True, restart=True)
        return {"seconds": time.perf_counter() - start, "precision": summary.precision}

    def size(self, model: Path) -> dict[str, Any]:
        manifest = read_manifest(model)
        refined = {outcome["precision"].split(":")[0] for outcome in manifest.refined_folds().values()}
        return {
            "refined_in": sorted(refined),
            "parameters": manifest.tucker.parameters,
            "of_dense": manifest.tucker.parameters / manifest.dense.parameters,
            "macs": manifest.tucker.macs,
            "macs_of_dense": manifest.tucker.macs / manifest.dense.macs,
        }
