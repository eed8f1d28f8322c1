"""The benchmark of training and the survey, tiny: rows, checks, the table. Their times mean nothing here."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))

from bench import survey, training
from bench.survey import BACKENDS
from tucker_ops.backends import native


@pytest.fixture(autouse=True)
def compiled():
    if not native.load():
        pytest.skip(native.load().reason)


def test_peers_of_the_op_take_turns_and_give_ratios():
    rows = training.measure("op", training.op_steps(4), rounds=2)
    assert {(row["peer"], row["layout"]) for row in rows} == {
        (name, layout)
        for name in (training.OURS, training.KEPT, training.THREE, training.DENSE)
        for layout in ("contiguous", "channels-last")
    }
    assert all(row["ratio_to_best_three_convolutions"] > 0 and row["rounds"] == 2 for row in rows)
    assert min(row["ratio_to_best_dense"] for row in rows if row["peer"] == training.DENSE) == 1
    assert "TUCKER_KEEP_STAGES" not in os.environ


def test_a_gradient_that_is_wrong_is_not_timed(monkeypatch):
    right = training._gradients

    def wrong(module, x, grad):
        return [1.01 * g if x.dtype == torch.float32 else g for g in right(module, x, grad)]

    monkeypatch.setattr(training, "_gradients", wrong)
    with pytest.raises(SystemExit, match="off by"):
        training.op_steps(4)


@pytest.mark.slow
def test_the_table_is_written(monkeypatch, tmp_path):
    peers, budgets = (training.OURS, training.FUSED_DENSE, training.THREE, training.DENSE), []

    def steps(batch, **budget):
        budgets.append(budget)
        return {(name, "as nnU-Net"): lambda: None for name in peers}

    monkeypatch.setattr(training, "network_steps", steps)
    training.main(["--rounds", "1", "--extent", "4", "-o", str(tmp_path)])
    assert budgets == [{"factor": 0.5}, {"params": 0.12}]
    rows = json.loads((tmp_path / "results.json").read_text())
    # Eight of the op, four of each network.
    assert len(rows) == 16 and rows[0]["tucker_ops_isa"] == native.isa()
    text = (tmp_path / "results.md").read_text()
    assert text.count("\n| ") == 17 and "t and z kept" in text and "network, 12% of its parameters" in text


@pytest.mark.slow
def test_losses_of_networks_are_compared_before_anything_is_timed(monkeypatch):
    steps = training.network_steps(1, params=0.12)
    assert {name for name, _ in steps} == {
        training.OURS,
        training.FUSED_DENSE,
        training.THREE,
        training.DENSE,
    }
    right, calls = training._step, []

    def wrong(network, x):
        calls.append(network)
        return right(network, x) * (1.01 if len(calls) == 3 else 1)

    monkeypatch.setattr(training, "_step", wrong)
    with pytest.raises(SystemExit, match=f"losses differ: .* by {training.FUSED_DENSE}"):
        training.network_steps(1, params=0.12)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "gradient"])
def test_survey(dtype, gradient, monkeypatch):
    if dtype == "bfloat16" and not native.multiplies_bfloat16():
        pytest.skip("torch takes a hundred times as long for bfloat16 on this processor")
    monkeypatch.setattr(survey, "SECONDS", 0.0)
    monkeypatch.setattr(survey, "FEWEST_ROUNDS", 1)
    monkeypatch.setattr(survey, "MOST_MACS", 1e6)
    rows = survey.survey(0.3, 0, dtype=dtype, gradient=gradient)
    assert rows and all(ratio > 0 and problem.dtype_name == dtype for ratio, problem, _ in rows)
    for _, problem, layout in rows:
        assert survey.kind_of(problem, layout, gradient=gradient)[0] in ("taken", "declined")


def test_survey_times_nothing_that_disagrees():
    calls = {name: lambda name=name: (torch.ones(3) * (1 + 0.01 * (name == "cpu")),) for name in BACKENDS}
    with pytest.raises(SystemExit, match="differ"):
        survey.ratio_of(calls, torch.float32)
