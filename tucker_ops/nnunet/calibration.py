"""Calibration of a trained nnU-Net on unlabelled images, through nnU-Net's own reading and preprocessing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tucker_ops import convert
from tucker_ops.convert import Calibration
from tucker_ops.errors import CalibrationError, ConfigError, ImageError
from tucker_ops.nnunet.folder import Fold, ModelFolder
from tucker_ops.nnunet.images import find_cases
from tucker_ops.nnunet.patches import random_patch
from tucker_ops.nnunet.preprocess import Preprocessor
from tucker_ops.nnunet.splits import found_beside, read_split

Progress = Callable[[str, int, int], None]

# A limit for memory's sake. Small patches calibrate worse, because norms see other statistics than in prediction.
LARGEST_PATCH = 96**3
# Every case must be read and preprocessed, and refining keeps its patches in memory, at most 3.5 MB a channel each.
MOST_CASES = 64


@dataclass(frozen=True)
class CalibrationSet:
    """Which images to calibrate on, and how much of them.

    Args:
        folder: images named CASE_0000 as for prediction, or cases that nnU-Net preprocessed for this configuration.
        cases: names of those to use [default: all, of more than 64 as many as there are patches, but no fewer than
            64, evenly among them].
        splits: a splits_final.json: of each fold its training cases are used, and of `cases` none may be a validation
            case of it [default: the one that nnU-Net left beside preprocessed cases, else none].
        patches: random patches, dealt out evenly among the cases, at least one each.
        labels: draws of labels per patch.
        seed: of patches and labels.

    Raises ConfigError for numbers out of range.
    """

    folder: Path
    cases: tuple[str, ...] | None = None
    patches: int = 16
    labels: int = 2
    seed: int = 0
    splits: Path | None = None

    def __post_init__(self):
        for name in ("patches", "labels"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} must be a whole number of at least 1, got {value!r}")

    def describe(self) -> dict[str, Any]:
        """JSON-ready, without the folder's path."""
        return {key: value for key, value in asdict(self).items() if key not in ("folder", "splits")}


def calibrate_network(
    network: nn.Module,
    source: ModelFolder,
    data: CalibrationSet,
    fold: Fold = "all",
    *,
    progress: Progress | None = None,
) -> Calibration:
    """`tucker_ops.calibrate` on random patches of `data`, preprocessed as nnU-Net does for this model.

    `fold` is that of the network: its validation cases are left out where `data` has splits to tell which they are.
    Patches have the extents of `patch_extents`, and what one takes in memory grows with them: 3.3 GB at 112×112×64 for
    a U-Net of 32 features at full resolution. Raises CalibrationError for images that hold one value only, or
    that the model learns nothing from; ConfigError for the second stage of a cascade or a case that is not
    there; ImageError for images that are unreadable or hold NaN, ShapeError and ModelFolderError for those of
    other channels or names.
    """
    patches = CalibrationPatches(source, data, fold)
    calibration = convert.calibrate(
        network,
        patches.read(lambda *done: progress is not None and progress(*done)),
        labels_per_input=data.labels,
        likelihood=patches.likelihood,
        seed=data.seed,
    )
    return replace(
        calibration, source=f"{patches.describe()}, {data.labels} draws of labels each, seed {data.seed}"
    )


class CalibrationPatches:
    """The random patches of a calibration set, preprocessed as nnU-Net does for this model.

    Raises as `calibrate_network` does for images.
    """

    def __init__(self, source: ModelFolder, data: CalibrationSet, fold: Fold):
        if source.previous_stage is not None:
            raise ConfigError(
                f"{source.path} is the second stage of a cascade, which also reads segmentations of "
                f"{source.previous_stage}; calibrate the stages before, and compress this one without calibration"
            )
        self._source, self._seed = source, data.seed
        self._volumes = _Volumes(source, data, fold)
        names = list(self._volumes)
        count = len(names) if data.cases is not None else min(len(names), max(MOST_CASES, data.patches))
        self._available = len(names)
        self._names = [names[number * len(names) // count] for number in range(count)]
        self._share = math.ceil(max(data.patches, count) / count)
        self._sizes: set[tuple[int, ...]] = set()

    @property
    def likelihood(self) -> str:
        """As `tucker_ops.calibrate` takes it."""
        return "sigmoid" if self._volumes.has_regions else "softmax"

    def read(self, progress: Progress) -> Iterator[Tensor]:
        """Tensors [1, C, *patch], the same on every call."""
        generator = torch.Generator().manual_seed(self._seed)
        done, total = 0, self._share * len(self._names)
        for name in self._names:
            volume = self._volumes.read(name)
            size = patch_extents(self._source, volume.shape[1:])
            self._sizes.add(size)
            for _ in range(self._share):
                yield random_patch(volume, size, generator)[None]
                done += 1
                progress(f"calibrating on {name}", done, total)

    def describe(self) -> str:
        """What was read so far, in words."""
        extents = " or ".join("×".join(map(str, size)) for size in sorted(self._sizes))
        cases = len(self._names)
        of = f" of {self._available}" if cases < self._available else ""
        return f"{self._share * cases} patches of {extents} from {cases}{of} cases"


def patch_extents(source: ModelFolder, volume: Sequence[int]) -> tuple[int, ...]:
    """The patch of the plans, shortened by whole steps of the network to `LARGEST_PATCH` voxels.

    First where it would only be padded around a volume of these extents, then along its longest axis.
    """
    strides = source.architecture["arch_kwargs"]["strides"]
    steps = [math.prod(per_axis) for per_axis in zip(*strides, strict=True)]
    size = list(source.patch_size)
    covered = list(volume)[-len(size) :]
    while math.prod(size) > LARGEST_PATCH:
        able = [axis for axis, (n, step) in enumerate(zip(size, steps, strict=True)) if n > 2 * step]
        if not able:
            break
        padded = [axis for axis in able if size[axis] - steps[axis] >= covered[axis]]
        longest = max(padded or able, key=lambda axis: size[axis])
        size[longest] -= steps[longest]
    return tuple(size)


class _Volumes:
    """Preprocessed volumes [C, *spatial] of a folder, by case."""

    def __init__(self, source: ModelFolder, data: CalibrationSet, fold: Fold):
        self._source, self._data = source, data
        self._preprocessor = Preprocessor(source)
        folder = Path(data.folder)
        self._preprocessed = folder.is_dir() and any(folder.glob("*.pkl"))
        if self._preprocessed:
            self._files: Mapping[str, list[Path]] = {p.stem: [p] for p in sorted(folder.glob("*.pkl"))}
        else:
            self._files = find_cases(folder, source.dataset_json["file_ending"], source.input_channels)
        splits = data.splits
        if splits is None and self._preprocessed:
            splits = found_beside(folder.resolve().parent)
        train, validation = read_split(splits, fold, list(self._files))
        names = [n for n in self._files if n in set(train)] if data.cases is None else list(data.cases)
        absent = [name for name in names if name not in self._files]
        if absent or not names:
            wanted, there = absent[0] if absent else "to use", ", ".join(list(self._files)[:5])
            raise ConfigError(f"{folder} has no case {wanted}; it holds {there}")
        seen = sorted(set(names) & set(validation))
        if seen:
            raise ConfigError(f"{seen[0]} is a validation case of fold {fold}; calibrate on others")
        self._files = {name: self._files[name] for name in names}

    @property
    def has_regions(self) -> bool:
        return self._preprocessor.labels.has_regions

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def read(self, name: str) -> Tensor:
        files = self._files[name]
        data = self._load(name) if self._preprocessed else self._preprocessor.run(name, files)[0]
        volume = torch.from_numpy(np.ascontiguousarray(data)).float()
        if len(volume) != self._source.input_channels:
            raise CalibrationError(
                f"calibration case {name} has {len(volume)} channels, the model takes {self._source.input_channels}; "
                "calibrate with images of the channels that it was trained on"
            )
        bad = int((~torch.isfinite(volume)).sum())
        if bad:
            raise CalibrationError(
                f"calibration case {name} holds {bad} NaN or infinite values of {volume.numel()} after preprocessing; "
                "repair the image or leave it out"
            )
        if volume.numel() == 0 or bool((volume == volume.flatten()[0]).all()):
            raise CalibrationError(
                f"calibration case {name} ({'×'.join(map(str, volume.shape[1:]))} voxels after preprocessing) holds a "
                "single value, from which nothing can be learnt; leave it out"
            )
        return volume

    def _load(self, name: str) -> np.ndarray:
        from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

        folder = str(self._data.folder)
        try:
            return infer_dataset_class(folder)(folder, identifiers=[name]).load_case(name)[0][:]
        except (AssertionError, KeyError, OSError, RuntimeError, ValueError) as error:
            raise ImageError(
                f"calibration case {name} of {folder} is not as nnU-Net preprocesses them ({error}); preprocess it anew"
            ) from error
