"""nnU-Net's splits_final.json: which cases a fold was trained on, and which it is validated on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tucker_ops.errors import ConfigError
from tucker_ops.nnunet.folder import Fold

SPLITS = "splits_final.json"


def found_beside(preprocessed: Path) -> Path | None:
    """The splits of a folder nnUNet_preprocessed/DatasetNNN_Name, if it has any."""
    path = preprocessed / SPLITS
    return path if path.is_file() else None


def read_split(path: Path | None, fold: Fold, available: Sequence[str]) -> tuple[list[str], list[str]]:
    """Training and validation cases of a fold. Without a file, or for fold "all", all of `available` are the former.

    Raises ConfigError where the file holds no such fold, or a case on both sides.
    """
    if path is None or fold == "all":
        return list(available), []
    try:
        split = json.loads(Path(path).read_text())[int(fold)]
        train, validation = list(split["train"]), list(split["val"])
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise ConfigError(
            f"{path} holds no split of fold {fold} ({error}); give nnU-Net's {SPLITS}"
        ) from error
    both = sorted(set(train) & set(validation))
    if both:
        raise ConfigError(
            f"{path} has {both[0]} in training and validation of fold {fold}; correct the split"
        )
    return train, validation
