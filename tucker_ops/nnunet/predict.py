"""Prediction through nnU-Net's own nnUNetPredictor, dense and compressed models alike."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch._dynamo import OptimizedModule

from tucker_ops.errors import (
    ConfigError,
    ConversionError,
    DeviceError,
    ImageError,
    ModelFolderError,
    OutputExistsError,
    OutputWriteError,
)
from tucker_ops.fused import FusedForward, explain, fuse
from tucker_ops.nnunet.checkpoint import read_checkpoint
from tucker_ops.nnunet.folder import (
    DEFAULT_CHECKPOINT,
    Fold,
    ModelFolder,
    is_model_folder,
    read_json,
    read_model_folder,
)
from tucker_ops.nnunet.images import find_cases
from tucker_ops.nnunet.memory import PeakMemory
from tucker_ops.nnunet.verify import trainer_problem

if TYPE_CHECKING:
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class PredictionSummary:
    """What a prediction took. Seconds include reading, preprocessing, resampling and writing of each case.

    ``seconds`` is the total over the cases, without loading the model. ``peak_rss_bytes`` is the largest
    resident memory of the process while it predicted, ``peak_cuda_bytes`` what torch allocated on the GPU.
    ``inference`` says how the network ran: fused or as it was, in which precision, and why; ``network_seconds`` is
    the part of the total that it took.
    """

    model: Path
    output: Path
    folds: tuple[Fold, ...]
    device: str
    seconds_per_case: Mapping[str, float] = field(default_factory=dict)
    peak_rss_bytes: int = 0
    peak_cuda_bytes: int = 0
    inference: str = ""
    network_seconds: float = 0.0

    @property
    def cases(self) -> tuple[str, ...]:
        return tuple(self.seconds_per_case)

    @property
    def seconds(self) -> float:
        return sum(self.seconds_per_case.values())


def load_predictor(
    model_dir: str | Path,
    *,
    folds: Sequence[Fold] | None = None,
    checkpoint: str = DEFAULT_CHECKPOINT,
    device: str = "cpu",
    mirroring: bool = True,
    step_size: float = 0.5,
    precision: str = "auto",
    fused: bool = True,
    trust: bool = False,
) -> nnUNetPredictor:
    """nnU-Net's predictor with the model loaded, after the folder was checked, and its network fused.

    `step_size` is the distance of neighbouring tiles as a fraction of the patch, `precision` that of
    `tucker_ops.fuse`. With `fused` False it is nnU-Net's own, and the network's modules run one by one.

    Raises the errors of `read_model_folder`, ConfigError, and DeviceError.
    """
    folder = read_model_folder(model_dir, folds=folds, checkpoint=checkpoint, trust=trust)
    return _load(
        folder,
        folder.select_folds(folds, checkpoint),
        checkpoint,
        device,
        mirroring,
        step_size,
        precision,
        fused,
        trust,
    )


def predict_folder(
    model_dir: str | Path,
    input_dir: str | Path,
    output_dir: str | Path,
    *,
    folds: Sequence[Fold] | None = None,
    checkpoint: str = DEFAULT_CHECKPOINT,
    device: str = "cpu",
    mirroring: bool = True,
    step_size: float = 0.5,
    cases: Sequence[str] | None = None,
    precision: str = "auto",
    fused: bool = True,
    overwrite: bool = False,
    progress: Progress | None = None,
    trust: bool = False,
) -> PredictionSummary:
    """Segment every case of `input_dir`; `cases` names some of them.

    Cases are predicted one after the other in this process, by nnU-Net's `predict_from_files_sequential` with
    the network fused (`precision` as in `tucker_ops.fuse`) and, on the CPU, tiles summed up in float32; a
    segmentation appears in `output_dir` only once it is complete. `progress` is called with the case, how
    many are done, and how many there are. All checks come before the first prediction. Raises those errors
    of `load_predictor` and `find_cases`, OutputExistsError for segmentations that exist (unless
    `overwrite`), ImageError, and OutputWriteError; torch.OutOfMemoryError passes unchanged.
    """
    output_dir = Path(output_dir)
    folder = read_model_folder(model_dir, folds=folds, checkpoint=checkpoint, trust=trust)
    if folder.previous_stage is not None:
        raise ConfigError(
            f"{folder.path} is the second stage of a cascade and needs the segmentations of "
            f"{folder.previous_stage}; predict it with nnUNetv2_predict and -prev_stage_predictions"
        )
    ending = folder.dataset_json["file_ending"]
    images = _choose(find_cases(input_dir, ending, folder.input_channels), cases, input_dir)
    if is_model_folder(output_dir):
        raise OutputExistsError(
            f"{output_dir} is a trained model, whose plans.json nnU-Net would overwrite; choose another output folder"
        )
    if not overwrite:
        _check_absent([output_dir / f"{case}{ending}" for case in images])
        _check_same(output_dir / "plans.json", folder.plans)
        _check_same(output_dir / "dataset.json", folder.dataset_json)
    chosen = folder.select_folds(folds, checkpoint)
    predictor = _load(folder, chosen, checkpoint, device, mirroring, step_size, precision, fused, trust)

    seconds: dict[str, float] = {}
    with (
        _scratch(output_dir) as scratch,
        PeakMemory(torch.device(device)) as peak,
        _threads_kept(),
        _clock(predictor.network) as passes,
    ):
        for number, (case, files) in enumerate(images.items()):
            if progress is not None:
                progress(case, number, len(images))
            start = time.perf_counter()
            with _silenced(), _files_of(case, files, output_dir / f"{case}{ending}"):
                predictor.predict_from_files_sequential([[str(f) for f in files]], [str(scratch / case)])
                for path in scratch.iterdir():
                    os.replace(path, output_dir / path.name)
            seconds[case] = time.perf_counter() - start
        if progress is not None:
            progress("", len(images), len(images))
    return PredictionSummary(
        model=folder.path,
        output=output_dir,
        folds=chosen,
        device=device,
        seconds_per_case=seconds,
        peak_rss_bytes=peak.rss_bytes,
        peak_cuda_bytes=peak.cuda_bytes,
        inference=_describe(predictor.network, device),
        network_seconds=sum(passes),
    )


def _load(
    folder: ModelFolder,
    folds: tuple[Fold, ...],
    checkpoint: str,
    device: str,
    mirroring: bool,
    step_size: float,
    precision: str,
    fused: bool,
    trust: bool,
) -> nnUNetPredictor:
    from tucker_ops.nnunet.predictor import Predictor, nnUNetPredictor

    if not 0 < step_size <= 1:
        raise ConfigError(
            f"step_size {step_size} given; it is a fraction of the patch, above 0 and at most 1"
        )
    target = usable_device(device)
    # nnU-Net reads checkpoints by pickle; those of the other folds (the folder's description came from the
    # first) are shown to be harmless and whole before it does.
    for fold in folds[1:]:
        read_checkpoint(folder.checkpoint_path(fold, checkpoint), trust=trust)
    if problem := trainer_problem(folder.trainer_name):
        raise ModelFolderError(
            f"nnU-Net cannot load the trainer {folder.trainer_name} of {folder.path} on this machine "
            f"({problem}); "
            "set nnUNet_extTrainer to the folder of that trainer, or repair the installation"
        )
    with _silenced():
        predictor = (Predictor if fused else nnUNetPredictor)(
            tile_step_size=step_size, use_mirroring=mirroring, device=target, allow_tqdm=False
        )
        predictor.initialize_from_trained_model_folder(str(folder.path), folds, checkpoint)
    # A network that nnU-Net was told to compile, or that cannot be traced, runs as it is.
    if isinstance(predictor.network, FusedForward):
        predictor.network.fused = fused
    if fused and not isinstance(predictor.network, OptimizedModule):
        with contextlib.suppress(ConversionError):
            predictor.network = fuse(predictor.network, precision=precision)
    return predictor


@contextlib.contextmanager
def _clock(network: nn.Module):
    """A list of the seconds that each pass of the network takes."""
    begun, seconds = [], []

    def now() -> float:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return time.perf_counter()

    before = network.register_forward_pre_hook(lambda *_: begun.append(now()))
    after = network.register_forward_hook(lambda *_: seconds.append(now() - begun.pop()))
    try:
        yield seconds
    finally:
        before.remove()
        after.remove()


def _describe(network: nn.Module, device: str) -> str:
    """How the network ran, in one line."""
    if isinstance(network, OptimizedModule):
        return "as torch.compile left it"
    if not isinstance(network, FusedForward):
        return "as nnU-Net runs it"
    dtype = torch.float16 if device.startswith("cuda") else torch.float32
    return explain(network, device=torch.device(device).type, dtype=dtype).summary


def usable_device(name: str) -> torch.device:
    """The device of this name; DeviceError where there is none such here."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise DeviceError(f"device {name!r} given; use cpu, cuda or mps") from error
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available.get(device.type, False):
        usable = ", ".join(k for k, v in available.items() if v)
        raise DeviceError(f"device {name!r} given; this machine's torch can use {usable}")
    return device


def _choose(
    images: dict[str, list[Path]], cases: Sequence[str] | None, input_dir: str | Path
) -> dict[str, list[Path]]:
    if cases is None:
        return images
    missing = [c for c in cases if c not in images]
    if missing:
        raise ConfigError(f"{input_dir} has no case {', '.join(missing)}; it holds {', '.join(images)}")
    return {c: images[c] for c in cases}


def _check_absent(paths: Sequence[Path]) -> None:
    existing = [p for p in paths if p.exists()]
    if existing:
        raise OutputExistsError(
            f"{existing[0]} exists{f' and {len(existing) - 1} more' if len(existing) > 1 else ''}; "
            "choose another output folder or allow overwriting with --force (overwrite=True in Python)"
        )


def _check_same(path: Path, content: Mapping[str, Any]) -> None:
    """nnU-Net leaves a copy of the model's description beside its segmentations: it must not replace another."""
    if path.exists() and read_json(path) != content:
        raise OutputExistsError(
            f"{path} describes another model; choose another output folder or allow overwriting with --force "
            "(overwrite=True in Python)"
        )


@contextlib.contextmanager
def _scratch(output_dir: Path):
    """A folder in `output_dir` for files that nnU-Net is still writing, removed in the end."""
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".predicting-", dir=output_dir))
    except OSError as error:
        raise OutputWriteError(
            f"{output_dir} cannot be written ({error.strerror}); choose another output folder"
        ) from error
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextlib.contextmanager
def _files_of(case: str, images: Sequence[Path], output: Path):
    """Gives the troubles with files their type; SimpleITK reports them all as RuntimeError."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1]
        if "ImageFileReader" in str(error):
            raise ImageError(
                f"case {case} cannot be read ({reason}); check {', '.join(map(str, images))}"
            ) from error
        if "ImageFileWriter" not in str(error):
            raise
    else:
        return
    raise OutputWriteError(
        f"{output} cannot be written ({reason}); free some space or choose another output folder"
    )


@contextlib.contextmanager
def _silenced():
    """nnU-Net tells on standard output what it does; the progress says it better."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


@contextlib.contextmanager
def _threads_kept():
    """nnU-Net lowers torch's thread count while it predicts and leaves it so when prediction fails."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
