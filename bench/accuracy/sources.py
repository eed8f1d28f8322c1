"""The trained models and real volumes that the study needs, which are not part of the repository."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from tucker_ops.errors import ConfigError

TRAINER = "nnUNetTrainer__nnUNetPlans__3d_fullres"


@dataclass(frozen=True)
class Sources:
    """`root` holds models/ and data/ as described in bench/README.md. Raises ConfigError where a part is absent."""

    root: Path

    def __post_init__(self):
        wanted = (self.hippocampus, self.images, self.labels, self.splits, self.ct_model, self.ct)
        absent = [path for path in wanted if not path.exists()]
        if absent:
            raise ConfigError(
                f"{absent[0]} does not exist; the study needs the trained models and volumes that bench/README.md "
                "lists, in a folder given with --sources"
            )

    @property
    def hippocampus(self) -> Path:
        return self.root / "models" / "Dataset004_Hippocampus" / TRAINER

    @property
    def images(self) -> Path:
        return self.root / "data" / "Dataset004_Hippocampus" / "imagesTr"

    @property
    def labels(self) -> Path:
        return self.root / "data" / "Dataset004_Hippocampus" / "labelsTr"

    @property
    def splits(self) -> Path:
        return self.root / "data" / "Dataset004_Hippocampus" / "splits_final.json"

    @property
    def ct_model(self) -> Path:
        return self.root / "models" / "Dataset297_CTOrgans" / TRAINER

    @property
    def ct(self) -> Path:
        return self.root / "data" / "ct" / "example_ct.nii.gz"

    def cases(self, part: str, fold: int = 0) -> list[str]:
        """Names of the "train" or "val" cases of a fold."""
        return list(json.loads(self.splits.read_text())[fold][part])


def calibration_cases(sources: Sources, count: int) -> list[str]:
    """`count` training cases of fold 0, evenly from the list."""
    train = sources.cases("train")
    return [train[i * len(train) // count] for i in range(count)]


def linked(files: dict[str, Path], folder: Path) -> Path:
    """A folder of links to `files`, by name."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, file in files.items():
        link = folder / name
        if not link.is_symlink():
            link.symlink_to(file.resolve())
    return folder
