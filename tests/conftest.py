"""Fixtures shared by all tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tucker_ops.backends import native

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


@pytest.fixture
def poisoned():
    """Every uninitialised tensor is filled with NaN, so that an element nobody wrote shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(params=["direct", "winograd2", "winograd4"])
def core(request, monkeypatch):
    """Runs the test with every way the CPU kernels have to compute the second stage."""
    monkeypatch.setenv(native.CORE_VARIABLE, request.param)
    return request.param


ISAS = ("amx_bf16", "avx512_bf16", "avx512", "avx2", "baseline", "wide", "wide_bf16", "wide_amx")


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    """Runs the test once with every set of CPU kernels that this processor has."""
    if not native.load():
        pytest.skip(native.load().reason)
    if request.param not in native.isas():
        pytest.skip(f"this processor cannot run the {request.param} kernels, only {native.isas()}")
    monkeypatch.setenv(native.ISA_VARIABLE, request.param)
    return request.param
