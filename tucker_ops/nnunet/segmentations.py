"""Segmentation files of a folder, and the classes that a dataset.json names."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tucker_ops.errors import SegmentationError, ShapeError
from tucker_ops.nnunet.folder import read_json

if TYPE_CHECKING:
    from nnunetv2.imageio.base_reader_writer import BaseReaderWriter

Class = int | tuple[int, ...]
Volume = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Dataset:
    """What evaluating needs of a dataset.json: foreground classes by name, label to ignore, file ending.

    A class is a label, or the tuple of labels that make up a region where the model was trained on regions.
    """

    classes: Mapping[str, Class]
    ignore_label: int | None
    file_ending: str
    content: Mapping[str, Any]

    def reader(self) -> BaseReaderWriter:
        """nnU-Net's reader for this dataset's files."""
        from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json

        return determine_reader_writer_from_dataset_json(dict(self.content), verbose=False)()


def read_dataset(path: str | Path) -> Dataset:
    """Read a dataset.json with nnU-Net's own rules for labels and regions.

    Raises ModelFolderError where it is no JSON, SegmentationError where it names no classes.
    """
    from nnunetv2.utilities.label_handling.label_handling import LabelManager

    content = read_json(Path(path))
    try:
        manager = LabelManager(content["labels"], content.get("regions_class_order"))
        classes = manager.foreground_regions if manager.has_regions else manager.foreground_labels
        ending = content["file_ending"]
    except (KeyError, AttributeError, TypeError, AssertionError, RuntimeError) as error:
        raise SegmentationError(
            f"{path} is no valid nnU-Net dataset description ({error}); give the one of the model"
        ) from error
    named = {_as_class(value): name for name, value in content["labels"].items()}
    keys = [_as_class(c) for c in classes]
    return Dataset({named.get(key, str(key)): key for key in keys}, manager.ignore_label, ending, content)


def _as_class(value: Any) -> Class:
    return tuple(int(v) for v in value) if isinstance(value, list | tuple) else int(value)


def find_dataset_json(*folders: str | Path) -> Path:
    """The dataset.json in or one level above the first of `folders` that has one, else SegmentationError."""
    for folder in map(Path, folders):
        for candidate in (folder / "dataset.json", folder.resolve().parent / "dataset.json"):
            if candidate.is_file():
                return candidate
    raise SegmentationError(
        f"no dataset.json in or above {', '.join(map(str, folders))}, so classes have no names; "
        "give one with --dataset-json (dataset_json=)"
    )


def find_segmentations(folder: str | Path, file_ending: str) -> dict[str, Path]:
    """Segmentation file per case, sorted. Raises SegmentationError where there is none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise SegmentationError(f"{folder} is no folder; give the folder that holds the segmentations")
    files = sorted(p for p in folder.iterdir() if p.name.endswith(file_ending) and not p.name.startswith("."))
    if not files:
        raise SegmentationError(f"{folder} holds no file that ends in {file_ending}; give another folder")
    return {p.name.removesuffix(file_ending): p for p in files}


def read_volume(reader: BaseReaderWriter, path: Path, *, image: bool = False) -> Volume:
    """Array [C, *spatial] and spacing in mm along its spatial axes, read by nnU-Net's reader.

    Raises SegmentationError naming the file where it cannot be read.
    """
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            array, properties = reader.read_images((str(path),)) if image else reader.read_seg(str(path))
    except (RuntimeError, OSError, ValueError) as error:
        raise SegmentationError(
            f"{path} cannot be read ({str(error).splitlines()[-1]}); it is damaged or no {path.suffix} file"
        ) from error
    return array, np.asarray(properties["spacing"], dtype=float)


def check_same_grid(a: Volume, b: Volume, names: tuple[Path, Path]) -> None:
    """Raise ShapeError where two volumes differ in extent, or in spacing by more than a thousandth."""
    if a[0].shape[1:] != b[0].shape[1:]:
        raise ShapeError(
            f"{names[0]} has {_extent(a[0].shape[1:])} voxels, {names[1]} has {_extent(b[0].shape[1:])}; "
            "compare segmentations of the same image"
        )
    if not np.allclose(a[1], b[1], rtol=1e-3):
        raise ShapeError(
            f"{names[0]} has a spacing of {_extent(a[1])} mm, {names[1]} of {_extent(b[1])} mm; "
            "compare segmentations of the same image"
        )


def _extent(values: Any) -> str:
    return "×".join(f"{v:g}" for v in values)
