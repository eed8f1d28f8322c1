"""The demo, through the command line, and what it refuses."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("nnunetv2")
from typer.testing import CliRunner

from tucker_ops.cli import app
from tucker_ops.errors import ConfigError, ModelFolderError, OutputExistsError
from tucker_ops.nnunet.demo import EXAMPLE, MARKER, PARTS, demo

LARGEST_LOSS = 0.04


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, str]:
    output = tmp_path_factory.mktemp("demo") / "out"
    result = CliRunner().invoke(app, ["demo", "-o", str(output)], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return output, result.stdout


def row(text: str, name: str) -> list[float]:
    """Figures of a table row: dense, then value and comparison for each factor."""
    line = next(line for line in text.splitlines() if name in line)
    return [
        float(n.replace("−", "-"))
        for n in re.findall(r"(?<= )[+-]?\d+\.?\d*(?=×?(?: |$))", line.split(name)[1])
    ]


@pytest.mark.slow
def test_table_and_report(run):
    output, text = run
    for name in (
        "parameters, million", "MACs, billion", "weights on disk, MB", "Dice Anterior",
        "Dice Posterior", "Dice, mean of classes", "one forward pass, ms", "nothing fused, ms",
        "all fused, ms", "prediction, s / case", "in the network, s", "peak memory, MB",
    ):  # fmt: skip
        assert len(row(text, name)) == 5, name
    page = output / "report" / "index.html"
    assert str(page.resolve()) in text.splitlines()[-1]
    assert {p.name for p in page.parent.glob("*.png")} == {
        "accuracy.png", "cost_per_layer.png", "overlay.png", "ranks_and_errors.png", "speed.png",
    }  # fmt: skip


@pytest.mark.slow
def test_little_is_lost_and_much_is_saved(run):
    _, text = run
    dense, half, loss_of_half, third, _ = row(text, "Dice, mean of classes")
    assert dense > 0.8
    assert half == pytest.approx(dense + loss_of_half, abs=2e-4)
    assert loss_of_half >= -LARGEST_LOSS
    assert third > 0.7
    assert row(text, "parameters, million")[4] <= 0.13
    assert row(text, "weights on disk, MB")[4] <= 0.13


def test_example_absent(tmp_path):
    with pytest.raises(ModelFolderError, match=r"lacks cases\.json.*--example"):
        demo(tmp_path / "out", example=tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("cases", [0, 11])
def test_cases_out_of_range(tmp_path, cases):
    with pytest.raises(ConfigError, match="1 to 10"):
        demo(tmp_path / "out", cases=cases)


def test_other_folders_are_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputExistsError, match="--force"):
        demo(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_only_its_own_folders_are_replaced(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "old.html").write_text("")
    # No factors and a case that is not there end it after the output was prepared.
    with pytest.raises(ConfigError):
        demo(tmp_path, cases=1, factors=(2.0,), force=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == [MARKER, "thesis.txt"]
    assert "report" in PARTS


def test_example_is_complete():
    assert len(list((EXAMPLE / "images").glob("*_0000.nii.gz"))) == 10
    assert sorted(p.name for p in (EXAMPLE / "labels").iterdir()) == sorted(
        p.name.replace("_0000", "") for p in (EXAMPLE / "images").iterdir()
    )
    assert "CC BY-SA 4.0" in (EXAMPLE / "NOTICE").read_text()
    assert sum(p.stat().st_size for p in EXAMPLE.rglob("*") if p.is_file()) < 13e6
