"""Fixtures shared by all tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def repo_root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The design documents, labelled volumes and trained models kept beside the repository."""
    path = ROOT.parent / "shared"
    if not (path / "models").is_dir():
        pytest.skip(f"needs the trained models in {path.name}/ beside the repository, which are absent here")
    return path


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
