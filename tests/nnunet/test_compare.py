"""Surface Dice by hand, paired statistics against other code, and the gate."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from test_evaluate import line, write
from typer.testing import CliRunner

from tucker_ops.cli import app
from tucker_ops.errors import ConfigError, SegmentationError
from tucker_ops.nnunet.compare import Gate, compare, compare_tables
from tucker_ops.nnunet.evaluate import evaluate_folder, surface_dice


def cube(shape, low, high):
    mask = np.zeros(shape, dtype=bool)
    mask[tuple(slice(a, b) for a, b in zip(low, high, strict=True))] = True
    return mask


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (3.0, 1.0, 0.5)])
def test_surface_dice_of_moved_cubes(spacing):
    a, b = cube((20, 20, 20), (5, 5, 5), (15, 15, 15)), cube((20, 20, 20), (6, 5, 5), (16, 15, 15))
    assert surface_dice(a, a, spacing, 0.1) == 1
    # Moved by one voxel along the first axis, no surface is further away than that.
    assert surface_dice(a, b, spacing, spacing[0]) == 1
    near = surface_dice(a, b, spacing, 0.4 * spacing[0])
    faces = [spacing[1] * spacing[2], spacing[0] * spacing[2], spacing[0] * spacing[1]]
    # What is not near: the two faces across the axis; the cube's edges and corners blur the share.
    assert near == pytest.approx(1 - faces[0] / sum(faces), abs=0.12)
    far = cube((20, 20, 20), (0, 0, 0), (2, 2, 2))
    assert surface_dice(cube((20, 20, 20), (17, 17, 17), (20, 20, 20)), far, spacing, 1.0) == 0


def test_surface_of_slices(tmp_path):
    """nnU-Net's readers give 2D images a spacing of 999 along the axis that they do not have."""
    (tmp_path / "dataset.json").write_text(
        json.dumps(
            {"labels": {"background": 0, "a": 1}, "file_ending": ".nii.gz", "channel_names": {"0": "x"}}
        )
    )
    first, second = np.zeros((1, 20, 20), np.uint8), np.zeros((1, 20, 20), np.uint8)
    first[0, 2:6, 2:6], second[0, 12:16, 12:16] = 1, 1
    for name, array in (("p", first), ("r", second), ("s", first)):
        write(tmp_path / name / "x.nii.gz", array, (1.0, 1.0, 999.0))
    apart, same = (evaluate_folder(tmp_path / "p", tmp_path / n, nsd_tolerance="voxel") for n in ("r", "s"))
    assert float(apart.nsd_per_case.iloc[0, 0]) == 0 and float(same.nsd_per_case.iloc[0, 0]) == 1


def test_surface_dice_of_nothing():
    empty, some = np.zeros((4, 4, 4), dtype=bool), cube((4, 4, 4), (1, 1, 1), (3, 3, 3))
    assert np.isnan(surface_dice(empty, empty, (1, 1, 1), 1))
    assert surface_dice(empty, some, (1, 1, 1), 1) == 0 == surface_dice(some, empty, (1, 1, 1), 1)


def tables(cases=12, drop=(0.0, 0.02), noise=0.01):
    generator = np.random.default_rng(0)
    dense = pd.DataFrame(generator.uniform(0.8, 0.9, (cases, 2)), columns=["head", "tail"])
    return dense, dense - np.array(drop) - generator.normal(0, noise, (cases, 2))


def test_statistics_against_the_definitions():
    from itertools import product

    dense, compressed = tables(cases=9)
    result = compare_tables(dense, compressed)
    drops = (dense - compressed).to_numpy()
    assert result.mean_drop == pytest.approx(drops.mean())
    for column, name in enumerate(dense.columns):
        row, values = result.classes.loc[name], drops[:, column]
        assert row["drop"] == pytest.approx(values.mean()) == pytest.approx(row["dense"] - row["compressed"])
        # The exact signed-rank test: every pattern of signs is as likely.
        ranks = np.abs(values).argsort().argsort() + 1
        statistic = abs(ranks @ np.sign(values))
        extreme = [abs(ranks @ np.array(signs)) >= statistic for signs in product((-1, 1), repeat=9)]
        assert row["p"] == pytest.approx(np.mean(extreme))
        spread = 1.96 * values.std(ddof=1) / 3
        assert row["low"] == pytest.approx(values.mean() - spread, abs=0.4 * spread)
        assert row["high"] == pytest.approx(values.mean() + spread, abs=0.4 * spread)
    p, corrected = sorted(result.classes["p"]), sorted(result.classes["p_holm"])
    assert corrected == pytest.approx([min(1, 2 * p[0]), min(1, max(2 * p[0], p[1]))])
    assert result.worst_class == ("tail", pytest.approx(drops[:, 1].mean()))
    assert compare_tables(dense, compressed).to_dict() == result.to_dict()


def test_few_cases_equal_models_and_absent_classes():
    dense, compressed = tables(cases=3)
    result = compare_tables(dense, compressed)
    assert result.classes["p"].isna().all() and result.to_dict()["classes"]["head"]["p"] is None
    same = compare_tables(dense, dense)
    assert (same.mean_drop, same.mean_low, same.mean_high) == (0, 0, 0)
    equal = compare_tables(tables()[0], tables()[0])
    assert (equal.classes["p_holm"] == 1).all()
    dense.loc[:, "never there"] = np.nan
    compressed.loc[:, "never there"] = np.nan
    assert list(compare_tables(dense, compressed).classes.index) == ["head", "tail"]
    with pytest.raises(SegmentationError, match="nothing to compare"):
        compare_tables(dense[["never there"]], compressed[["never there"]])


def test_a_class_that_compression_invents_is_lost():
    """The dense model rightly sees no tail in three of six cases, where the compressed one does."""
    dense = pd.DataFrame({"head": [0.9] * 6, "tail": [0.8] * 3 + [np.nan] * 3})
    compressed = pd.DataFrame({"head": [0.9] * 6, "tail": [0.8] * 3 + [0.0] * 3})
    result = compare_tables(dense, compressed)
    assert result.classes.loc["tail", "drop"] == pytest.approx(0.5)
    assert result.classes.loc["tail", "cases"] == 6
    assert Gate(0.5, 0.4).failures(result) and not Gate(0.5, 0.4).failures(compare_tables(compressed, dense))
    # All through: without it there would be nothing to compare.
    dense["tail"] = np.nan
    assert compare_tables(dense, compressed.assign(tail=0.0)).classes.loc["tail", "drop"] == 1


def test_the_interval_of_the_mean_is_of_the_mean():
    """A rare class weighs as much as the others, in the mean as in its interval."""
    generator = np.random.default_rng(1)
    dense = pd.DataFrame(generator.uniform(0.8, 0.9, (30, 2)), columns=["head", "tail"])
    compressed = dense - np.array([0.0, 0.2]) - generator.normal(0, 0.01, (30, 2))
    dense.loc[6:, "tail"] = compressed.loc[6:, "tail"] = np.nan
    result = compare_tables(dense, compressed)
    assert result.mean_low < result.mean_drop < result.mean_high
    assert result.mean_drop == pytest.approx(0.1, abs=0.02) and result.mean_high - result.mean_low < 0.03


def test_gate():
    result = compare_tables(*tables(drop=(0.0, 0.05), noise=0.001))
    assert Gate(0.03, 0.06).failures(result) == []
    (failure,) = Gate(0.03, 0.04).failures(result)
    assert "tail falls by 0.0" in failure and "more than 0.04" in failure
    assert "mean Dice falls" in Gate(0.01, 1).failures(result)[0]
    with pytest.raises(ConfigError, match="max_drop"):
        Gate(max_drop=-0.1)


@pytest.fixture
def folders(tmp_path):
    """Labels, the dense model's output (one voxel wrong) and the compressed one's (tail lost)."""
    for case in range(2):
        write(tmp_path / "labels" / f"{case}.nii.gz", line(1, 1, 1, 0, 2, 2))
        write(tmp_path / "dense" / f"{case}.nii.gz", line(1, 1, 0, 0, 2, 2))
        write(tmp_path / "small" / f"{case}.nii.gz", line(1, 1, 0, 0, 0, 2))
    dataset = {
        "labels": {"background": 0, "head": 1, "tail": 2},
        "file_ending": ".nii.gz",
        "channel_names": {"0": "a"},
    }
    (tmp_path / "dataset.json").write_text(json.dumps(dataset))
    return tmp_path


def test_folders(folders):
    options = {"nsd_tolerance": "voxel"}
    dense, small = (
        evaluate_folder(folders / name, folders / "labels", **options) for name in ("dense", "small")
    )
    result = compare(dense, small)
    assert (
        result.classes.loc["tail", "drop"] == pytest.approx(1 / 3) and result.classes.loc["head", "drop"] == 0
    )
    assert small.nsd_per_case.shape == (2, 2)
    assert small.worst_class == ("tail", pytest.approx(2 / 3))
    write(folders / "small" / "2.nii.gz", line(1, 1))
    write(folders / "labels" / "2.nii.gz", line(1, 1))
    with pytest.raises(SegmentationError, match="different cases"):
        compare(dense, evaluate_folder(folders / "small", folders / "labels"))
    with pytest.raises(ConfigError, match="nsd_tolerance"):
        evaluate_folder(folders / "dense", folders / "labels", nsd_tolerance=0)


def test_gate_on_the_command_line(folders):
    command = ["evaluate", "-p", str(folders / "small"), "-r", str(folders / "labels")]
    compared = [*command, "--dense", str(folders / "dense")]
    written = folders / "out.json"
    passed = CliRunner().invoke(
        app, [*compared, "--max-drop", "0.5", "--max-class-drop", "0.5", "--json", str(written)]
    )
    assert passed.exit_code == 0, passed.output
    assert "p (Holm)" in passed.output and "tail, surface" in passed.output
    assert json.loads(written.read_text())["comparison"]["worst_class"] == "tail"
    failed = CliRunner().invoke(app, [*compared, "--max-drop", "0.1"])
    assert failed.exit_code == 1
    assert "Too much is lost: mean Dice falls by 0.1667" in " ".join(failed.output.split())
    alone = CliRunner().invoke(app, [*command, "--max-drop", "0.1"])
    assert isinstance(alone.exception, ConfigError) and "--dense" in str(alone.exception)
    bad = CliRunner().invoke(app, [*command, "--surface", "wide"])
    assert isinstance(bad.exception, ConfigError) and "millimetres" in str(bad.exception)
