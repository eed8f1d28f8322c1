"""Fine-tune a compressed model folder; an interrupted run resumes, and the result appears whole."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tucker_ops.convert.precision import processor_multiplies_bf16
from tucker_ops.errors import AccuracyError, ConfigError, DtypeError, ModelFolderError
from tucker_ops.nnunet.checkpoint import cast_weights, read_checkpoint, serialise, sha256, stored_dtype
from tucker_ops.nnunet.compress import check_apart, is_earlier_output, load_network
from tucker_ops.nnunet.folder import DEFAULT_CHECKPOINT, Fold, ModelFolder, read_model_folder
from tucker_ops.nnunet.manifest import MANIFEST_NAME
from tucker_ops.nnunet.networks import build_network
from tucker_ops.nnunet.predict import load_predictor, usable_device
from tucker_ops.nnunet.preprocess import Preprocessor
from tucker_ops.nnunet.staging import check_destination, staged_folder
from tucker_ops.nnunet.study import claim
from tucker_ops.nnunet.training.data import TrainingSet, cases_in, prepare_cases
from tucker_ops.nnunet.training.outcome import distances_to_dense
from tucker_ops.nnunet.training.settings import FinetuneSettings
from tucker_ops.nnunet.verify import probe, verify_folder

Progress = Callable[[str, int, int], None]
STATE = "finetuning.json"


@dataclass(frozen=True)
class FinetuneSummary:
    """``precision`` says in which one steps ran, and why; ``resumed_at`` the step that each fold went on from.

    ``distances`` to the dense model, before and after, of each fold (see `distances_to_dense`); with a teacher.
    """

    output: Path
    steps: int
    precision: str
    cases: Mapping[Fold, tuple[str, ...]]
    resumed_at: Mapping[Fold, int] = field(default_factory=dict)
    distances: Mapping[Fold, tuple[float, float]] = field(default_factory=dict)


def finetune_folder(
    model_dir: str | Path,
    output_dir: str | Path,
    data: TrainingSet,
    settings: FinetuneSettings | None = None,
    *,
    teacher: str | Path | None = None,
    folds: Sequence[Fold] | None = None,
    checkpoint: str = DEFAULT_CHECKPOINT,
    device: str = "cpu",
    processes: int = 1,
    force: bool = False,
    restart: bool = False,
    keep_training: bool = False,
    trust: bool = False,
    progress: Progress | None = None,
) -> FinetuneSummary:
    """Train a model on from its weights with nnU-Net's trainer, taught by the dense model it was made from.

    Args:
        model_dir: a model folder, compressed or dense.
        output_dir: the same model with new weights.
        data: the training cases; those of a fold's validation are never opened.
        teacher: folder of the dense model, with the same folds; left out, there is no distillation.
        processes: of DDP; on the CPU they talk through gloo, on GPUs (one each) through NCCL.
        force: replace an earlier output.
        restart: forget what an interrupted run left, instead of resuming it.
        keep_training: leave checkpoints, log and preprocessed cases in OUTPUT.training.
        progress: called with a label, the steps done, and their number.

    State lives in OUTPUT.training, after each epoch, until the result is written. A run with the same arguments goes on
    from there. Raises AccuracyError where, without labels, training ended farther from the dense model than it began;
    ResumeError for an interrupted run with other arguments, ConfigError for options that do not fit;
    and the errors of `read_model_folder`, `prepare_cases`, OutputExistsError and OutputWriteError.
    """
    settings = settings or FinetuneSettings()
    model_dir, output_dir = Path(model_dir), Path(output_dir)
    check_apart(model_dir, output_dir)
    check_destination(output_dir, replaceable=_is_replaceable, force=force)
    model = read_model_folder(model_dir, folds=folds, checkpoint=checkpoint, trust=trust)
    if model.previous_stage is not None:
        raise ConfigError(
            f"{model_dir} is the second stage of a cascade, which finetune cannot train; use nnUNetv2_train"
        )
    chosen = model.select_folds(folds, checkpoint)
    _check_options(model, settings, usable_device(device), processes)
    for fold in chosen:
        load_network(model, fold, checkpoint, trust=trust)
    dense = None if teacher is None else _read_teacher(Path(teacher), model, chosen, checkpoint, trust)
    if dense is None:
        _check_without_teacher(settings, data)
    settings.resolved(has_labels=data.has_labels)
    precision, why = _precision(settings.precision, device)
    training = output_dir.with_name(f"{output_dir.name}.training")
    run = _Run(
        model,
        dense,
        data,
        settings,
        chosen,
        checkpoint,
        device,
        precision,
        processes,
        training,
        trust,
        progress,
    )
    run.open(restart)
    try:
        for fold in chosen:
            run.train(fold)
        _write(model, chosen, checkpoint, run, output_dir, force)
    except BaseException:
        run.forget_if_empty()
        raise
    if not keep_training:
        shutil.rmtree(training, ignore_errors=True)
    return FinetuneSummary(
        output_dir, settings.steps, f"{precision}: {why}", run.cases, run.resumed_at, run.distances
    )


def _is_replaceable(path: Path) -> bool:
    return is_earlier_output(path) or (path / STATE).is_file()


def _check_options(
    model: ModelFolder, settings: FinetuneSettings, device: torch.device, processes: int
) -> None:
    """Raise ConfigError for what would stop the training, or nnU-Net, later and with less to say."""
    patch = settings.patch_size
    if patch is not None:
        strides = model.architecture["arch_kwargs"]["strides"]
        steps = [math.prod(per_axis) for per_axis in zip(*strides, strict=True)]
        if len(patch) != len(steps):
            raise ConfigError(f"patch_size {patch} given; the model takes {len(steps)} extents")
        if any(n % step for n, step in zip(patch, steps, strict=True)):
            raise ConfigError(
                f"patch_size {patch} given; the network's strides ask for multiples of {tuple(steps)}"
            )
    configuration = model.plans["configurations"][model.configuration]
    batch = settings.batch_size or configuration.get("batch_size", processes)
    if isinstance(processes, bool) or not isinstance(processes, int) or not 1 <= processes <= batch:
        raise ConfigError(
            f"processes must be a whole number from 1 to the batch size of {batch}, got {processes!r}"
        )
    if device.type == "cuda" and processes > torch.cuda.device_count():
        raise ConfigError(
            f"{processes} processes asked for, one a GPU; this machine has {torch.cuda.device_count()}"
        )


def _read_teacher(
    path: Path, model: ModelFolder, folds: Sequence[Fold], checkpoint: str, trust: bool
) -> ModelFolder:
    teacher = read_model_folder(path, folds=folds, checkpoint=checkpoint, trust=trust)
    if (teacher.input_channels, teacher.num_outputs) != (model.input_channels, model.num_outputs):
        raise ModelFolderError(
            f"the teacher {path} maps {teacher.input_channels} channels to {teacher.num_outputs} outputs, {model.path} "
            f"{model.input_channels} to {model.num_outputs}; give the dense model that it was compressed from"
        )
    return teacher


def _check_without_teacher(settings: FinetuneSettings, data: TrainingSet) -> None:
    if settings.distill or settings.features:
        raise ConfigError(
            "distillation needs the dense model; give it with --teacher (teacher=), or set distill and features to 0"
        )
    if data.images is not None and data.labels is None:
        raise ConfigError(
            "without labels the dense model must segment the images; give it with --teacher (teacher=)"
        )


def _precision(asked: str, device: str) -> tuple[str, str]:
    if torch.device(device).type == "cuda":
        return "fp16", "nnU-Net's mixed precision on the GPU"
    if asked != "auto":
        return asked, "as asked"
    if processor_multiplies_bf16():
        return "bf16", "the processor multiplies bf16"
    return "fp32", "the processor does not multiply bf16"


@dataclass
class _Run:
    """One call of `finetune_folder`, and its folder of state."""

    model: ModelFolder
    teacher: ModelFolder | None
    data: TrainingSet
    settings: FinetuneSettings
    folds: Sequence[Fold]
    checkpoint: str
    device: str
    precision: str
    processes: int
    folder: Path
    trust: bool
    progress: Progress | None
    cases: dict[Fold, tuple[str, ...]] = field(default_factory=dict)
    resumed_at: dict[Fold, int] = field(default_factory=dict)
    distances: dict[Fold, tuple[float, float]] = field(default_factory=dict)

    def open(self, restart: bool) -> None:
        """Make the folder of state, or make sure that the one that is there belongs to this run."""
        if restart and (self.folder / STATE).is_file():
            shutil.rmtree(self.folder)
        claim(
            self.folder, STATE, self._arguments(), work="an interrupted fine-tuning",
            otherwise="give the same arguments to resume it, or begin anew with --restart (restart=True)",
        )  # fmt: skip

    def forget_if_empty(self) -> None:
        """Refused before anything was made, a run leaves nothing that a corrected one would stumble over."""
        if [path.name for path in self.folder.iterdir()] == [STATE]:
            shutil.rmtree(self.folder)

    def _arguments(self) -> dict[str, Any]:
        models = {"weights": self.model, "teacher": self.teacher}
        return {
            "settings": self.settings.to_dict(),
            **{
                name: model
                and {str(f): sha256(model.checkpoint_path(f, self.checkpoint)) for f in self.folds}
                for name, model in models.items()
            },
            "data": self.data.fingerprint(),
            "processes": self.processes,
        }

    def describe(self) -> dict[str, Any]:
        """For the manifest: what was done, without paths."""
        cases = {str(fold): list(names) for fold, names in self.cases.items()}
        known = {key: value for key, value in self._arguments().items() if key != "data"}
        return known | {
            "settings": self._resolved().to_dict(),
            "precision": self.precision,
            "cases": cases,
            "labels": self.data.has_labels,
            "distances": {str(fold): list(pair) for fold, pair in self.distances.items()},
        }

    def _resolved(self) -> FinetuneSettings:
        return self.settings.resolved(has_labels=self.data.has_labels)

    def result(self, fold: Fold) -> Path:
        return self.folder / f"fold_{fold}" / "checkpoint_final.pth"

    def train(self, fold: Fold) -> None:
        preprocessed, names = self._prepare(fold)
        self.cases[fold] = tuple(names)
        if self.result(fold).is_file():
            self.resumed_at[fold] = self.settings.steps
        else:
            self._train(fold, preprocessed, names)
        if self.teacher is not None:
            self._judge(fold, preprocessed, names)

    def _train(self, fold: Fold, preprocessed: Path, names: Sequence[str]) -> None:
        latest = self.result(fold).with_name("checkpoint_latest.pth")
        if latest.is_file():
            self.resumed_at[fold] = read_checkpoint(latest, trust=self.trust)["step"]
        job = _Job(
            self.model, self.teacher, fold, self.checkpoint, self._resolved(), preprocessed, tuple(names),
            self.result(fold).parent, self.device, self.precision, self.trust,
        )  # fmt: skip
        if self.processes == 1:
            _work(job, self._steps)
        else:
            self._distribute(job)

    def _judge(self, fold: Fold, preprocessed: Path, names: Sequence[str]) -> None:
        """Measure both distances. Without labels all there is to learn is the dense model: farther from it is worse."""
        nnunet = Preprocessor(self.model)
        networks = [load_network(self.model, fold, self.checkpoint, trust=self.trust) for _ in range(2)]
        networks[1].load_state_dict(read_checkpoint(self.result(fold), trust=self.trust)["network_weights"])
        before, after = self.distances[fold] = distances_to_dense(
            load_network(self.teacher, fold, self.checkpoint, trust=self.trust),
            networks,
            preprocessed / nnunet.configuration.data_identifier,
            names,
            self.model.patch_size,
            regions=nnunet.labels.has_regions,
        )
        if not self.data.has_labels and not after < before:
            raise AccuracyError(
                f"fine-tuning took fold {fold} away from the dense model, on whole patches of the images it was "
                f"trained on ({before:.3g} nats a voxel before, {after:.3g} after), and nothing was written; lower "
                "--learning-rate (learning_rate=), enlarge --patch (patch_size=) to the plans', or give labels, each "
                "with --restart (restart=True); or compress anew with --refine, which learns without augmentation"
            )

    def _distribute(self, job: _Job) -> None:
        step = torch.multiprocessing.get_context("spawn").Value("i", 0)
        arguments = (job, self.processes, _free_port(), step)
        context = torch.multiprocessing.start_processes(
            _distributed, arguments, self.processes, join=False, start_method="spawn"
        )
        try:
            while not context.join(timeout=0.5):
                self._steps(step.value)
        finally:
            # Where this process is told to stop, they would train on to their end.
            for process in context.processes:
                if process.is_alive():
                    process.terminate()

    def _steps(self, step: int) -> None:
        if self.progress is not None:
            self.progress("training", step, self.settings.steps)

    def _prepare(self, fold: Fold) -> tuple[Path, list[str]]:
        if self.data.preprocessed is not None:
            configuration = Preprocessor(self.model).configuration
            folder = Path(self.data.preprocessed)
            return folder, self.data.chosen(cases_in(folder / configuration.data_identifier), fold)
        # Segmentations in place of labels are those of the fold's own teacher.
        destination = self.folder / (
            "preprocessed" if self.data.labels is not None else f"preprocessed_{fold}"
        )

        def load():
            return load_predictor(
                self.teacher.path, folds=(fold,), checkpoint=self.checkpoint, device=self.device, mirroring=False,
                trust=self.trust,
            )  # fmt: skip

        with _silenced():
            names = prepare_cases(self.model, self.data, fold, destination, load, self.progress)
        return destination, names


@dataclass(frozen=True)
class _Job:
    """What one training process needs; goes to spawned processes by pickle."""

    model: ModelFolder
    teacher: ModelFolder | None
    fold: Fold
    checkpoint: str
    settings: FinetuneSettings
    preprocessed: Path
    cases: tuple[str, ...]
    output: Path
    device: str
    precision: str
    trust: bool


def _work(job: _Job, progress: Callable[[int], None] | None = None, rank: int = 0) -> None:
    from tucker_ops.nnunet.training.trainer import KEEP, LATEST, FinetuneTrainer

    path = job.model.checkpoint_path(job.fold, job.checkpoint)
    trained = read_checkpoint(path, trust=job.trust)
    weights = trained["network_weights"]
    latest = job.output / LATEST
    begun = read_checkpoint(latest, trust=job.trust) if latest.is_file() else None
    # A resumed run must not draw what it drew first once more.
    seed = job.settings.seed + 1000 * rank + 100_003 * (0 if begun is None else begun["step"])
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    with _silenced():
        trainer = FinetuneTrainer.of(
            job.model,
            job.fold,
            {name: w.float() if w.is_floating_point() else w for name, w in weights.items()},
            _teacher(job),
            job.settings,
            preprocessed=job.preprocessed,
            cases=job.cases,
            output=job.output,
            device=torch.device(job.device),
            precision=job.precision,
            mirror_axes=trained.get("inference_allowed_mirroring_axes", KEEP),
            progress=progress,
        )
        if begun is not None:
            trainer.resume(begun)
        trainer.run_training()


def _teacher(job: _Job) -> torch.nn.Module | None:
    if job.teacher is None or not (job.settings.distill or job.settings.features):
        return None
    from tucker_ops.fused import fuse

    network = load_network(job.teacher, job.fold, job.checkpoint, trust=job.trust)
    # Features are read by hooks, which the fused network does not run.
    return network if job.settings.features else fuse(network.requires_grad_(False), precision="fp32")


def _distributed(rank: int, job: _Job, processes: int, port: int, step: Any) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    gpu = torch.device(job.device).type == "cuda"
    if gpu:
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(max(1, torch.get_num_threads() // processes))
    torch.distributed.init_process_group("nccl" if gpu else "gloo", rank=rank, world_size=processes)

    def report(done: int) -> None:
        if rank == 0:
            step.value = done

    try:
        _work(job, report, rank)
    finally:
        torch.distributed.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    """nnU-Net tells on standard output what it does; its log file says it as well."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def _write(
    model: ModelFolder, folds: Sequence[Fold], checkpoint: str, run: _Run, output_dir: Path, force: bool
) -> None:
    """The model's folder with the new weights, in the dtype that the old ones had."""
    with staged_folder(output_dir, replaceable=_is_replaceable, force=force) as stage:
        expected = {}
        for fold in folds:
            old = read_checkpoint(model.checkpoint_path(fold, checkpoint), trust=run.trust)
            new = read_checkpoint(run.result(fold), trust=run.trust)["network_weights"]
            dtype = stored_dtype(old["network_weights"])
            weights = cast_weights(new, dtype)
            if not all(torch.isfinite(w).all() for w in weights.values()):
                raise DtypeError(
                    f"trained weights of fold {fold} exceed the range of {dtype}, in which {model.path} stores them; "
                    "compress it with --dtype float32 and train that"
                )
            keep = ("trainer_name", "init_args", "inference_allowed_mirroring_axes")
            content = {key: old[key] for key in keep if key in old}
            content["network_weights"] = weights
            network = build_network(model.architecture, model.input_channels, model.num_outputs)
            network.load_state_dict(weights)
            expected[fold] = probe(network, model)
            stage.write(Path(f"fold_{fold}") / checkpoint, serialise(content))
        for path in sorted(model.path.iterdir()):
            if path.is_file():
                stage.write(path.name, path.read_bytes())
        manifest = model.path / MANIFEST_NAME
        if manifest.is_file():
            # What the weights before were checked with says nothing of these.
            text = json.loads(manifest.read_text()) | {"finetuning": run.describe(), "check": None}
            stage.write(MANIFEST_NAME, (json.dumps(text, indent=1) + "\n").encode())
        stage.write(STATE, json.dumps(run.describe(), indent=1).encode())
        verify_folder(stage.path, expected, model, checkpoint)
