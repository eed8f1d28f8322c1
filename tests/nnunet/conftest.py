"""Fixtures of the nnU-Net tests: small models made at test time, and the trained ones."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import TRAINER_FOLDER, make_model, write_image


@pytest.fixture
def tiny_model(tmp_path: Path) -> Path:
    """A 3D PlainConvUNet of three stages, patch 16x16x16, one fold."""
    return make_model(tmp_path / "results" / TRAINER_FOLDER)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Two cases; the first needs 3x3x1 tiles of 16x16x16 at half a patch's step, an odd number."""
    folder = tmp_path / "images"
    write_image(folder / "a_0000.nii.gz", (32, 30, 16), seed=1)
    write_image(folder / "b_0000.nii.gz", (14, 19, 17), seed=2)
    return folder


@pytest.fixture(scope="session")
def hippocampus(repo_root: Path) -> Path:
    """The trained hippocampus model of the repository's example, weights in fp16."""
    return repo_root / "examples" / "hippocampus" / "model" / "Dataset004_Hippocampus" / TRAINER_FOLDER
