"""Compress a trained nnU-Net model folder into one that stock nnU-Net loads and predicts with."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tucker_ops import convert
from tucker_ops.convert import Calibration, CompressionConfig, Plan
from tucker_ops.cost import Cost
from tucker_ops.errors import (
    ConfigError,
    ConversionError,
    DtypeError,
    OutputExistsError,
    UnsupportedArchitectureError,
)
from tucker_ops.nnunet.calibration import CalibrationSet, calibrate_network
from tucker_ops.nnunet.check import AccuracyCheck, check_model
from tucker_ops.nnunet.checkpoint import cast_weights, read_checkpoint, serialise, sha256, stored_dtype
from tucker_ops.nnunet.folder import (
    DEFAULT_CHECKPOINT,
    OLD_FORMAT_KEYS,
    Fold,
    ModelFolder,
    find_model_folders,
    is_model_folder,
    patch_error,
    read_model_folder,
)
from tucker_ops.nnunet.latency import plan_for_latency
from tucker_ops.nnunet.manifest import MANIFEST_NAME, Manifest, Totals, installed_versions
from tucker_ops.nnunet.networks import build_network, check_architecture, tucker_architecture
from tucker_ops.nnunet.refinement import Refinement, refine_network
from tucker_ops.nnunet.staging import Staging, check_destination, staged_folder
from tucker_ops.nnunet.verify import probe, verify_folder

Progress = Callable[[str, int, int], None]

STORAGE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MIRROR_AXES = "inference_allowed_mirroring_axes"
COPIED = ("dataset_fingerprint.json", "NOTICE*", "LICENSE*", "LICENCE*")


def load_network(
    folder: ModelFolder, fold: Fold, checkpoint: str = DEFAULT_CHECKPOINT, *, trust: bool = False
) -> nn.Module:
    """The trained network of one fold on the CPU in float32, deep supervision off, in evaluation mode.

    Raises CheckpointError, and UnsupportedArchitectureError where the weights do not fit the network of
    plans.json.
    """
    weights = read_checkpoint(folder.checkpoint_path(fold, checkpoint), trust=trust)["network_weights"]
    return _load_network(folder, weights)


def plan_folder(
    src: str | Path,
    config: CompressionConfig,
    *,
    folds: Sequence[Fold] | None = None,
    checkpoint: str = DEFAULT_CHECKPOINT,
    trust: bool = False,
    calibrate: CalibrationSet | None = None,
    progress: Progress | None = None,
) -> Plan:
    """What `compress_folder` would do, decided on the first fold and the patch size of the plans."""
    source = _read_source(src, folds, checkpoint, trust)
    first = source.select_folds(folds, checkpoint)[0]
    network = load_network(source, first, checkpoint, trust=trust)
    calibration = None
    if calibrate is not None:
        calibration = calibrate_network(network, source, calibrate, first, progress=progress)
    return _plan(source, network, config, calibration, progress)


def compress_folder(
    src: str | Path,
    dst: str | Path,
    config: CompressionConfig,
    *,
    folds: Sequence[Fold] | None = None,
    checkpoint: str = DEFAULT_CHECKPOINT,
    dtype: torch.dtype | None = None,
    calibrate: CalibrationSet | Mapping[Fold, Calibration] | None = None,
    refine: Refinement | None = None,
    check: AccuracyCheck | None = None,
    force: bool = False,
    trust: bool = False,
    progress: Progress | None = None,
) -> Manifest:
    """Factorise the convolutions of a trained model and write a folder that stock nnU-Net predicts with.

    Ranks are chosen on the first fold and used for all, since plans.json holds one architecture. `dtype` is
    that of the stored weights, by default the source's. `calibrate` are unlabelled images by which to judge what
    matters (each fold's network for itself), or calibrations made before, by fold. `refine` then trains all
    weights together to give the dense model's output on unlabelled images. `check` predicts images with both
    models first. `progress` is called with a label, the steps done, and their number. The result is loaded by
    nnU-Net and its logits compared before `dst` appears; on any error, or an interrupt, `dst` stays as it was.

    Raises ModelFolderError, CheckpointError, UnsupportedArchitectureError (also for a model that is
    compressed already), ConfigError, DtypeError, OutputExistsError (unless `force`), OutputWriteError, and
    ConversionError where the written model does not compute what the one in memory does; with `calibrate` or
    `refine` also as `calibrate_network`, with `check` AccuracyError where too much is lost.
    """
    src, dst = Path(src), Path(dst)
    check_apart(src, dst)
    check_destination(dst, replaceable=is_earlier_output, force=force)
    source = _read_source(src, folds, checkpoint, trust)
    if dtype is not None and dtype not in STORAGE_DTYPES:
        raise DtypeError(
            f"weights cannot be stored as {dtype}; choose one of {', '.join(map(str, STORAGE_DTYPES))}"
        )
    with staged_folder(dst, replaceable=is_earlier_output, force=force) as stage:
        compression = _Compression(
            source, config, checkpoint, dtype, calibrate, refine, check, trust, stage, progress
        )
        return compression.run(source.select_folds(folds, checkpoint))


def compress_tree(
    src: str | Path,
    dst: str | Path,
    config: CompressionConfig,
    *,
    force: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> dict[Path, Manifest]:
    """`compress_folder` for every model folder at or below `src`, under the same names below `dst`.

    So TotalSegmentator finds the compressed models when TOTALSEG_WEIGHTS_PATH is `dst`. All of `dst`
    appears or nothing. Takes the options of `compress_folder` and raises its errors; returns the manifests
    by path.
    """
    src, dst = Path(src), Path(dst)
    models = find_model_folders(src)
    if models in ([], [src]):
        return {dst: compress_folder(src, dst, config, force=force, progress=progress, **options)}
    check_apart(src, dst)
    manifests = {}
    with staged_folder(dst, replaceable=is_earlier_tree, force=force) as stage:
        for model in models:
            name = model.relative_to(src)
            manifests[dst / name] = compress_folder(
                model, stage.path / name, config, progress=_labelled(progress, str(name)), **options
            )
    return manifests


def _labelled(progress: Progress | None, name: str) -> Progress | None:
    return None if progress is None else lambda label, done, total: progress(f"{name} {label}", done, total)


def is_earlier_output(path: Path) -> bool:
    """Whether `compress_folder` wrote this folder: a model that carries our manifest. Not any model."""
    return is_model_folder(path) and (path / MANIFEST_NAME).is_file()


def is_earlier_tree(path: Path) -> bool:
    """Whether `compress_tree` wrote all of this folder: nothing in it but models that carry our manifest."""
    models = find_model_folders(path)
    files = [p for p in path.rglob("*") if not p.is_dir()]
    return all(map(is_earlier_output, models)) and all(any(m in f.parents for m in models) for f in files)


def check_apart(src: Path, dst: Path) -> None:
    """Raise OutputExistsError where one of the two folders is, or lies in, the other."""
    a, b = src.resolve(), dst.resolve()
    if a == b or a in b.parents or b in a.parents:
        raise OutputExistsError(
            f"the output {dst} and the source {src} overlap; choose an output outside the source"
        )


@dataclass
class _Compression:
    """State of one call of `compress_folder`."""

    source: ModelFolder
    config: CompressionConfig
    checkpoint: str
    dtype: torch.dtype | None
    calibrate: CalibrationSet | Mapping[Fold, Calibration] | None
    refine: Refinement | None
    check: AccuracyCheck | None
    trust: bool
    stage: Staging
    progress: Progress | None
    plan: Plan | None = None
    calibration: dict[str, Any] | None = None
    refinement: dict[str, Any] | None = None
    architecture: dict[str, Any] = field(default_factory=dict)
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    expected: dict[Fold, torch.Tensor] = field(default_factory=dict)

    def run(self, folds: tuple[Fold, ...]) -> Manifest:
        for number, fold in enumerate(folds):
            dense, tucker = self._compress_fold(fold, number, len(folds))
        self._write_descriptions()
        steps = len(folds) * len(self.plan.ranks)
        self._report("checking with nnU-Net", steps, steps + 1)
        verification = verify_folder(self.stage.path, self.expected, self.source, self.checkpoint)
        checked = None
        if self.check is not None:
            checked = check_model(
                self.check, self.source.path, self.stage.path, folds, self.checkpoint, trust=self.trust,
                progress=self.progress,
            )  # fmt: skip
        manifest = Manifest(
            source=self.source.path.resolve().name,
            source_sha256={
                f"fold_{fold}/{self.checkpoint}": sha256(self.source.checkpoint_path(fold, self.checkpoint))
                for fold in folds
            },
            configuration=self.source.configuration,
            trainer_name=self.source.trainer_name,
            network_class_name=self.architecture["network_class_name"],
            input_shape=input_shape(self.source),
            dtype=str(self.dtype).removeprefix("torch."),
            config=self.config,
            plan=self.plan,
            errors=self.errors,
            dense=dense,
            tucker=tucker,
            verification=verification,
            versions=installed_versions(),
            calibration=self.calibration,
            refinement=self.refinement,
            check=checked,
        )
        self.stage.write(MANIFEST_NAME, manifest.to_json())
        self._report("", steps + 1, steps + 1)
        return manifest

    def _report(self, label: str, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress(label, done, total)

    def _compress_fold(self, fold: Fold, number: int, folds: int) -> tuple[Totals, Totals]:
        path = self.source.checkpoint_path(fold, self.checkpoint)
        trained = read_checkpoint(path, trust=self.trust)
        dtype = self.dtype = self.dtype or stored_dtype(trained["network_weights"])
        network = _load_network(self.source, trained["network_weights"])
        calibration = self._calibrate(network, fold)
        if self.plan is None:
            self._report("choosing ranks", 0, 1)
            self.plan = _plan(self.source, network, self.config, calibration, self.progress)
            self.architecture = tucker_architecture(self.source.architecture, self.plan.ranks)
        layers = len(self.plan.ranks)
        network, self.errors[str(fold)] = convert.apply_with_report(
            network,
            self.plan,
            calibration=calibration,
            progress=lambda done, _, name: self._report(
                f"fold {fold} {name}", number * layers + done, folds * layers + 1
            ),
        )
        if self.refine is not None:
            network = self._refine(network, trained, fold)
        weights = cast_weights(network.state_dict(), dtype)
        if not all(torch.isfinite(w).all() for w in weights.values()):
            raise DtypeError(f"weights of fold {fold} exceed the range of {dtype}; store them as float32")
        network.load_state_dict(weights)
        self.expected[fold] = probe(network, self.source)
        name = Path(f"fold_{fold}") / self.checkpoint
        self.stage.write(name, serialise(_prediction_checkpoint(trained, fold, weights)))
        file = self.stage.path / name
        return (
            _totals(self.plan.dense, trained["network_weights"], path),
            _totals(self.plan.compressed, weights, file),
        )

    def _calibrate(self, network: nn.Module, fold: Fold) -> Calibration | None:
        if self.calibrate is None:
            return None
        if isinstance(self.calibrate, CalibrationSet):
            calibration = calibrate_network(
                network, self.source, self.calibrate, fold, progress=self.progress
            )
        elif fold in self.calibrate:
            calibration = self.calibrate[fold]
        else:
            raise ConfigError(
                f"no calibration of fold {fold} was given, only of {', '.join(map(str, self.calibrate))}"
            )
        if self.calibration is None:
            self.calibration = {"source": calibration.source, "digests": {}}
            if isinstance(self.calibrate, CalibrationSet):
                self.calibration |= self.calibrate.describe()
        self.calibration["digests"][str(fold)] = calibration.digest
        return calibration

    def _refine(self, network: nn.Module, trained: Mapping[str, Any], fold: Fold) -> nn.Module:
        """The factorised network, refined, as the class that plans.json will name: it trains faster."""
        refined = build_network(self.architecture, self.source.input_channels, self.source.num_outputs)
        refined.load_state_dict(network.state_dict())
        dense = _load_network(self.source, trained["network_weights"])
        outcome, described = refine_network(
            refined, dense, self.source, self.refine, fold, trained.get(MIRROR_AXES), progress=self.progress
        )
        if self.refinement is None:
            self.refinement = described | {"folds": {}}
        self.refinement["folds"][str(fold)] = asdict(outcome) | {"reason": outcome.reason}
        return refined.eval()

    def _write_descriptions(self) -> None:
        plans = with_architecture(self.source, self.architecture)
        self.stage.write("plans.json", json.dumps(plans, indent=1).encode())
        self.stage.write("dataset.json", json.dumps(self.source.dataset_json, indent=1).encode())
        for path in _accompanying_files(self.source.path):
            self.stage.write(path.name, path.read_bytes())


def _read_source(src: str | Path, folds: Sequence[Fold] | None, checkpoint: str, trust: bool) -> ModelFolder:
    source = read_model_folder(src, folds=folds, checkpoint=checkpoint, trust=trust)
    if source.is_compressed:
        raise UnsupportedArchitectureError(
            f"{source.path} is compressed already; compress the trained model it was made from"
        )
    check_architecture(source.architecture["network_class_name"])
    return source


def _load_network(folder: ModelFolder, weights: Mapping[str, torch.Tensor]) -> nn.Module:
    network = build_network(folder.architecture, folder.input_channels, folder.num_outputs)
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        difference = " ".join(str(error).split())[:300]
        raise UnsupportedArchitectureError(
            f"the weights in {folder.path} do not fit the network that plans.json describes ({difference}); "
            f"trainer {folder.trainer_name} may build another one, which tucker_ops does not know"
        ) from error
    return network.eval()


def _plan(
    source: ModelFolder,
    network: nn.Module,
    config: CompressionConfig,
    calibration: Calibration | None = None,
    progress: Progress | None = None,
) -> Plan:
    shape = input_shape(source)
    try:
        if config.policy == "latency_ms":
            plan, _ = plan_for_latency(network, config, shape, calibration, progress=progress)
        else:
            plan = convert.plan(network, config, input_shape=shape, calibration=calibration)
    except ConversionError as error:
        if not isinstance(error.__cause__, Exception):
            raise
        raise patch_error(source, error.__cause__) from error
    if not plan.ranks:
        reasons = "; ".join(sorted({layer.reason for layer in plan.layers}))
        raise ConfigError(
            f"no layer of {source.path} is factorised under this configuration ({reasons}); choose a smaller "
            "budget, or factorise layers that get no cheaper with --keep-expensive (only_if_cheaper=False)"
        )
    return plan


def input_shape(source: ModelFolder) -> tuple[int, ...]:
    """[1, C, *patch]: what the network sees of one tile."""
    return (1, source.input_channels, *source.patch_size)


def stored_bytes(weights: Mapping[str, torch.Tensor]) -> int:
    """Bytes of the tensors, counting once those that share storage."""
    return sum({t.untyped_storage().data_ptr(): t.nbytes for t in weights.values()}.values())


def _totals(cost: Cost, weights: Mapping[str, torch.Tensor], file: Path) -> Totals:
    return Totals(cost.params, cost.macs, stored_bytes(weights), file.stat().st_size)


def with_architecture(source: ModelFolder, architecture: Mapping[str, Any]) -> dict[str, Any]:
    """plans.json with another architecture for the configuration of this model; the others keep theirs."""
    plans = copy.deepcopy(dict(source.plans))
    configurations = plans["configurations"]
    for other in configurations.values():
        if other.get("inherits_from") == source.configuration and "architecture" not in other:
            other["architecture"] = copy.deepcopy(dict(source.architecture))
    own = configurations[source.configuration]
    for key in OLD_FORMAT_KEYS:
        own.pop(key, None)
    own["architecture"] = dict(architecture)
    return plans


def _prediction_checkpoint(
    trained: Mapping[str, Any], fold: Fold, weights: Mapping[str, torch.Tensor]
) -> dict[str, Any]:
    """What prediction needs; the optimizer's state, the log and the copy of the dense plans stay behind."""
    result = {
        "network_weights": weights,
        "trainer_name": trained["trainer_name"],
        "init_args": {"configuration": trained["init_args"]["configuration"], "fold": fold},
    }
    return result | ({MIRROR_AXES: trained[MIRROR_AXES]} if MIRROR_AXES in trained else {})


def _accompanying_files(src: Path) -> list[Path]:
    """Files beside the model that belong to it; notices may lie one level up, in nnU-Net's dataset folder."""
    folders = [src]
    if src.resolve().parent.name.startswith("Dataset"):
        folders.insert(0, src.resolve().parent)
    found = {
        p.name: p for folder in folders for pattern in COPIED for p in folder.glob(pattern) if p.is_file()
    }
    return list(found.values())
