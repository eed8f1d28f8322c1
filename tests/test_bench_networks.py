"""The benchmark of whole networks: rows, wrong answers refused, what is left out has a reason."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))
pytest.importorskip("rich")
pytest.importorskip("dynamic_network_architectures")

from bench import network_cases, networks
from bench.peers import of_networks
from tests.fused.networks import plain_unet
from tucker_ops.backends import native


def small_unet() -> torch.nn.Module:
    return plain_unet(features=(8, 8, 16), classes=network_cases.OUTPUTS)


CASE = network_cases.Case("small", (16,) * 3, small_unet, 1, 0.5)


@pytest.fixture(autouse=True)
def _kernels():
    if not native.load():
        pytest.skip(native.load().reason)


@pytest.fixture
def without_runtimes(monkeypatch):
    """Other runtimes take long to start."""
    peers = {
        name: p for name, p in networks.PEERS.items() if name not in ("openvino", "onnxruntime", "compile")
    }
    monkeypatch.setattr(networks, "PEERS", peers)


def test_every_peer_is_measured_or_says_why_not(without_runtimes, tmp_path, capsys):
    rows = networks.measure(CASE, ("float32", "bfloat16"), 2, False, False)
    assert {(r["peer"], r["dtype"]) for r in rows} == {(p, d) for p in networks.PEERS for d in networks.GATES}
    for row in rows:
        if row["status"] == "left out":
            assert ("in --full only" in row["reason"]) == (row["peer"] == "channels-last")
            assert row["peer"] == "channels-last" or "no bfloat16 instructions" in row["reason"]
            continue
        assert row["fastest_ms"] <= row["median_ms"] <= row["slowest_ms"]
        assert 0 < row["relative_rms"] <= row["gate"]
        assert row["ratio_to_nnunet"] > 0
    rows = [{"configuration": "machine", **row} for row in rows]
    networks.write(rows, networks.provenance(), tmp_path / "out")
    assert (
        "| small " in (tmp_path / "out" / "results.md").read_text() and "| small " in capsys.readouterr().out
    )
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(written) == len(rows) and all(row["commit"] for row in written)


def test_wrong_answers_are_refused(without_runtimes, monkeypatch):
    def wrong(case, dtype):
        right = of_networks._fused(case, dtype)
        return lambda: right() * 1.01

    monkeypatch.setitem(networks.PEERS, "wrong", wrong)
    rows = {r["peer"]: r for r in networks.measure(CASE, ("float32",), 1, False, False)}
    assert rows["wrong"]["status"] == "refused" and "median_ms" not in rows["wrong"]
    assert rows["fused"]["status"] == "measured"


def test_one_block():
    rows = networks.measure_block(("float32", "bfloat16"), 2, extent=16)
    assert {(r["form"], r["peer"]) for r in rows} == {
        (form, peer) for form in ("dense", "rank 0.5") for peer in ("eager", "channels-last", "fused")
    }
    assert all(r["status"] == "measured" for r in rows)
    assert all(r["relative_rms_to_eager"] > 0 for r in rows if r["peer"] == "fused")


def test_convolutions_of_a_compressed_network_compute_the_same():
    x = CASE.input()
    with torch.no_grad():
        expected, actual = CASE.network()(x), network_cases.as_convolutions(CASE.network())(x)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    names = [type(m).__name__ for m in network_cases.as_convolutions(CASE.network()).modules()]
    assert "TuckerConv3d" not in names
