"""A sweep: figures by the commands it is made of, and nothing lost or half-picked-up at an interrupt."""

from __future__ import annotations

import json

import pytest
from test_cli_compress import shell  # noqa: F401

from tucker_ops.convert import CompressionConfig
from tucker_ops.errors import ConfigError, OutputExistsError, ResumeError
from tucker_ops.nnunet.calibration import CalibrationSet
from tucker_ops.nnunet.evaluate import evaluate_folder
from tucker_ops.nnunet.manifest import read_manifest
from tucker_ops.nnunet.study import Study
from tucker_ops.nnunet.sweep import Sweep, run, sweep_folder
from tucker_ops.nnunet.sweep.output import sweep_table, write_sweep

SLUGS = {value: f"params_{value}_ranks_4_by_4" for value in (0.6, 0.4)}
CONFIGS = [CompressionConfig(params=value, min_rank=4, align=4) for value in (0.6, 0.4)]


def test_interrupted_and_resumed(tmp_path, tiny_model, images, monkeypatch):
    data = CalibrationSet(images, patches=2)
    made = []
    compress, calibrate = run.compress_folder, run.calibrate_network

    def counting(source, target, *args, **kwargs):
        made.append(target.name)
        if len(made) == 2:
            raise KeyboardInterrupt
        return compress(source, target, *args, **kwargs)

    def calibrating(*args, **kwargs):
        made.append("calibration")
        return calibrate(*args, **kwargs)

    monkeypatch.setattr(run, "compress_folder", counting)
    with pytest.raises(KeyboardInterrupt):
        sweep_folder(tiny_model, tmp_path / "out", images, CONFIGS)
    assert made == [SLUGS[0.6], SLUGS[0.4]]
    assert not (tmp_path / "out" / "models" / SLUGS[0.4]).exists()
    made.clear()
    monkeypatch.setattr(
        run, "compress_folder", lambda *a, **k: (made.append(a[1].name), compress(*a, **k))[1]
    )
    result = sweep_folder(tiny_model, tmp_path / "out", images, CONFIGS)
    assert made == [SLUGS[0.4]]
    # One more budget adds to it; what is there is neither compressed nor predicted again.
    made.clear()
    monkeypatch.setattr(run, "predict_folder", predicting := counted(run.predict_folder))
    more = [*CONFIGS, CompressionConfig.weber2024(0.3)]
    wider = sweep_folder(tiny_model, tmp_path / "out", images, more)
    assert made == ["weber2024_0.3"] and predicting.count == 1
    assert [row["name"] for row in wider.rows] == [
        "dense",
        *(f"params {v}, ranks 4 by 4" for v in (0.6, 0.4)),
        "weber2024 0.3",
    ]
    for before, after in zip(result.rows, wider.rows, strict=False):
        assert {**before, "milliseconds": 0} == {**after, "milliseconds": 0}
    row = wider.rows[2]
    assert row["parameters"] == read_manifest(tmp_path / "out" / "models" / SLUGS[0.4]).tucker.parameters
    predictions = tmp_path / "out" / "predictions"
    assert row["dice"] == pytest.approx(evaluate_folder(predictions / SLUGS[0.4], predictions / "dense").mean)
    assert row["mean_drop"] == pytest.approx(1 - row["dice"]) and wider.against == "the dense model's output"
    # Other images are predicted, not taken for the same; what lay there of more cases is gone.
    (images / "b_0000.nii.gz").unlink()
    predicting.count = 0
    fewer = sweep_folder(tiny_model, tmp_path / "out", images, CONFIGS[:1])
    assert predicting.count == 2 and fewer.rows[1]["dice"] != result.rows[1]["dice"]
    assert not (predictions / "dense" / "b.nii.gz").exists()
    with pytest.raises(ResumeError, match="another calibrate"):
        sweep_folder(tiny_model, tmp_path / "out", images, CONFIGS, calibrate=data)
    monkeypatch.setattr(run, "calibrate_network", calibrating)
    made.clear()
    calibrated = sweep_folder(tiny_model, tmp_path / "aware", images, CONFIGS, calibrate=data)
    assert made == ["calibration", SLUGS[0.6], SLUGS[0.4]]
    assert read_manifest(tmp_path / "aware" / "models" / SLUGS[0.6]).plan.calibration is not None
    assert calibrated.rows[1]["parameters"] <= 0.6 * calibrated.rows[0]["parameters"]


def counted(function):
    def call(*args, **kwargs):
        call.count += 1
        return function(*args, **kwargs)

    call.count = 0
    return call


def test_table_plot_and_front(tmp_path):
    values = [("dense", 100, 0.9), ("a", 50, 0.89), ("b", 60, 0.88), ("c", 20, 0.7)]
    rows = tuple(
        {
            "name": name,
            "parameters": cost,
            "macs": cost,
            "milliseconds": cost,
            "dice": dice,
            "mean_drop": None,
        }
        | {"worst_class": None, "worst_class_drop": None}
        for name, cost, dice in values
    )
    sweep = Sweep(tmp_path, "labels", rows)
    assert sweep.front("macs") == ["c", "a", "dense"]
    table = sweep_table(sweep)
    assert [row[1].endswith("*") for row in table.rows] == [True, True, False, True]
    write_sweep(sweep)
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert "| a |" in (tmp_path / "sweep.md").read_text()
    assert json.loads((tmp_path / "sweep_rows.json").read_text())["rows"][0]["name"] == "dense"


def test_a_step_is_whole_or_made_again(tmp_path):
    study = Study(tmp_path)

    def fail():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        study.step("a", {"x": 1}, fail)
    assert study.step("a", {"x": 1}, lambda: {"y": 2}) == {"y": 2}
    assert study.step("a", {"x": 1}, fail) == {"y": 2}
    assert study.step("a", {"x": 2}, lambda: {"y": 3}) == {"y": 3}
    assert 0 <= study.seconds() < 1
    # What a kill leaves beside it is not looked at.
    (tmp_path / "steps" / ".b.json.tmp").write_text('{"arg')
    assert study.step("b", {}, lambda: {"z": 1}) == {"z": 1}


def test_command_line_and_refusals(tmp_path, tiny_model, images, shell):  # noqa: F811
    small = ["--min-rank", 4, "--align", 4]
    code, out, err = shell(
        "sweep", tiny_model, "-o", tmp_path / "o", "--images", images, "--params", "0.5", *small
    )
    assert code == 0, err
    assert "params 0.5" in out and "Pareto" in out and (tmp_path / "o" / "sweep.png").is_file()
    code, out, err = shell(
        "sweep",
        tiny_model,
        "-o",
        tmp_path / "o",
        "--images",
        images,
        "--params",
        "0.2",
        "--no-tap-ranks",
        *small,
    )
    assert code == 0 and "no tap ranks" in " ".join(out.split()), err
    code, _, err = shell(
        "sweep", tiny_model, "-o", tmp_path / "p", "--images", images, "--macs", "0.5", "--no-tap-ranks"
    )
    assert code == 2 and "--no-tap-ranks is about --params" in " ".join(err.split())
    code, _, err = shell("sweep", tiny_model, "-o", tmp_path / "p", "--images", images, "--params", "half")
    assert code == 2 and "numbers with commas" in err
    with pytest.raises(ConfigError, match="budgets that differ"):
        sweep_folder(tiny_model, tmp_path / "q", images, [CONFIGS[0], CONFIGS[0]])
    with pytest.raises(ConfigError, match="budgets that differ"):
        sweep_folder(tiny_model, tmp_path / "q", images, [])
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "mine.txt").write_text("")
    with pytest.raises(OutputExistsError, match="does not hold a sweep"):
        sweep_folder(tiny_model, tmp_path / "r", images, CONFIGS)
