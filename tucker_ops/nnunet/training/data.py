"""Training cases in the form that nnU-Net's data loader reads, from images with or without labels."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tucker_ops.errors import ConfigError, SegmentationError
from tucker_ops.nnunet.folder import Fold, ModelFolder, read_json
from tucker_ops.nnunet.images import find_cases, fingerprint
from tucker_ops.nnunet.output import write_file
from tucker_ops.nnunet.preprocess import Preprocessor
from tucker_ops.nnunet.segmentations import find_segmentations
from tucker_ops.nnunet.splits import found_beside, read_split

if TYPE_CHECKING:
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

Progress = Callable[[str, int, int], None]
FINGERPRINT = "dataset_fingerprint.json"


@dataclass(frozen=True)
class TrainingSet:
    """Where training cases come from: `preprocessed`, nnU-Net's folder of the dataset, or `images`.

    Validation cases of the fold are never opened, where there is a split to tell which they are; images without one
    are all trained on.

    Args:
        preprocessed: nnUNet_preprocessed/DatasetNNN_Name, with the cases of the model's configuration in it.
        images: folder of images named CASE_0000.
        labels: their labels. Without, patches are drawn by the dense model's own segmentations, which are a target
            only where `FinetuneSettings.supervise` says so.
        splits: a splits_final.json, of which the training cases of the fold are used [default: the one in
            `preprocessed`, if any; else all cases].
        cases: names of the cases to use instead.

    Raises ConfigError unless exactly one of `preprocessed` and `images` is given.
    """

    preprocessed: Path | None = None
    images: Path | None = None
    labels: Path | None = None
    splits: Path | None = None
    cases: tuple[str, ...] | None = None

    def __post_init__(self):
        if (self.preprocessed is None) == (self.images is None):
            raise ConfigError(
                "give either the preprocessed dataset of nnU-Net or a folder of images, and one of them only"
            )
        if self.labels is not None and self.images is None:
            raise ConfigError("labels belong to images; a preprocessed dataset holds its own")

    def chosen(self, available: Sequence[str], fold: Fold) -> list[str]:
        """Names of the training cases of this fold, none of which is a validation case of it."""
        train, validation = read_split(self.splits_file, fold, available)
        names = train if self.cases is None else list(self.cases)
        seen = sorted(set(names) & set(validation))
        if seen:
            raise ConfigError(f"{seen[0]} is a validation case of fold {fold}; train on others")
        absent = [name for name in names if name not in available]
        if absent or not names:
            where = self.preprocessed or self.images
            what = f"lacks the training case {absent[0]}" if absent else "holds no training case"
            raise ConfigError(
                f"{where} {what}; it holds {', '.join(list(available)[:5]) or 'nothing'}. Name those to use, or give "
                "the splits_final.json that the model was trained with"
            )
        return names

    @property
    def has_labels(self) -> bool:
        return self.preprocessed is not None or self.labels is not None

    @property
    def splits_file(self) -> Path | None:
        """The file of splits that is used, given or found."""
        if self.splits is None and self.preprocessed is not None:
            return found_beside(Path(self.preprocessed))
        return self.splits

    def fingerprint(self) -> dict[str, Any]:
        """What a run that would resume another must find unchanged: where files are, their sizes and times."""
        places = {
            "preprocessed": self.preprocessed,
            "images": self.images,
            "labels": self.labels,
            "splits": self.splits_file,
        }
        content: dict[str, Any] = {name: place and fingerprint(place) for name, place in places.items()}
        return content | {"cases": None if self.cases is None else list(self.cases)}


def cases_in(folder: Path) -> list[str]:
    """Names of the cases that nnU-Net preprocessed into this folder."""
    from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

    try:
        if not folder.is_dir() or not any(folder.glob("*.pkl")):
            raise KeyError(folder.name)
        return sorted(infer_dataset_class(str(folder)).get_identifiers(str(folder)))
    except (KeyError, AssertionError) as error:
        raise ConfigError(
            f"{folder} holds no preprocessed cases, or files beside them that nnU-Net does not write; run "
            "nnUNetv2_preprocess for this configuration, or give images"
        ) from error


def prepare_cases(
    model: ModelFolder,
    data: TrainingSet,
    fold: Fold,
    destination: Path,
    load_predictor: Callable[[], nnUNetPredictor] | None,
    progress: Progress | None = None,
) -> list[str]:
    """Preprocess the images of `data` below `destination` as nnU-Net would; returns the names of the cases.

    Cases that are there already are kept, so that an interrupted run goes on. `load_predictor` loads the dense model,
    which segments what has no labels. Raises ImageError and SegmentationError for files that are missing or unreadable.
    """
    from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

    preprocessor = Preprocessor(model)
    ending = model.dataset_json["file_ending"]
    images = find_cases(data.images, ending, model.input_channels)
    labels = {} if data.labels is None else find_segmentations(data.labels, ending)
    names = data.chosen(list(images), fold)
    folder = destination / preprocessor.configuration.data_identifier
    folder.mkdir(parents=True, exist_ok=True)
    if not (destination / FINGERPRINT).exists():
        source = model.path / FINGERPRINT
        write_file(
            destination / FINGERPRINT, json.dumps(read_json(source) if source.is_file() else {}).encode()
        )
    predictor = None
    for done, name in enumerate(names):
        if progress is not None:
            progress(f"preparing {name}", done, len(names))
        target = folder / name
        if target.with_name(f"{name}.pkl").exists():
            continue
        if data.labels is not None and name not in labels:
            raise SegmentationError(f"case {name} of {data.images} has no label in {data.labels}; add it")
        volume, segmentation, properties = preprocessor.run(name, images[name], labels.get(name))
        if not labels:
            predictor = predictor or load_predictor()
            # -1, outside of what nnU-Net crops to, is kept: it masks normalisation and augmentation.
            segmentation = np.where(segmentation < 0, segmentation, _segment(predictor, volume))
            properties["class_locations"] = preprocessor.foreground(segmentation)
        blocks = _blocks(volume, segmentation, preprocessor.configuration.patch_size)
        with tempfile.TemporaryDirectory(prefix=".case-", dir=destination) as partial:
            nnUNetDatasetBlosc2.save_case(
                volume.astype(np.float32),
                segmentation.astype(np.int16),
                properties,
                f"{partial}/{name}",
                **blocks,
            )
            # The properties last: a case without them is not whole, and is made again.
            for suffix in (".b2nd", "_seg.b2nd", ".pkl"):
                os.replace(f"{partial}/{name}{suffix}", f"{target}{suffix}")
    if progress is not None:
        progress("", len(names), len(names))
    return names


def _segment(predictor: nnUNetPredictor, volume: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        logits = predictor.predict_sliding_window_return_logits(
            torch.from_numpy(np.ascontiguousarray(volume)).float()
        )
    labels = predictor.label_manager.convert_logits_to_segmentation(logits)
    return np.asarray(labels)[None]


def _blocks(volume: np.ndarray, segmentation: np.ndarray, patch: Sequence[int]) -> dict:
    from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params

    blocks, chunks = comp_blosc2_params(volume.shape, tuple(patch), 4)
    blocks_seg, chunks_seg = comp_blosc2_params(segmentation.shape, tuple(patch), 2)
    return {"blocks": blocks, "chunks": chunks, "blocks_seg": blocks_seg, "chunks_seg": chunks_seg}
