"""The accuracy study: who sees which cases, and what its results look like."""

from __future__ import annotations

import json

import matplotlib
import pytest

pytest.importorskip("nnunetv2")

from bench.accuracy import output
from bench.accuracy.ct import CT
from bench.accuracy.part import Options
from bench.accuracy.sources import Sources, calibration_cases, linked
from bench.accuracy.study import write_rows
from tucker_ops.errors import ConfigError
from tucker_ops.nnunet.study import Study
from tucker_ops.nnunet.training import TrainingSet


def subject(case: str) -> int:
    """Whose hippocampus it is: cases 2k-1 and 2k are both sides of one scan, and 123 goes with 150."""
    number = int(case.removeprefix("hippocampus_"))
    return {123: -1, 150: -1}.get(number, (number + 1) // 2)


@pytest.fixture
def sources(shared_dir):
    return Sources(shared_dir)


def test_nothing_sees_a_subject_that_is_validated_on(sources):
    """Calibration, choice of ranks and fine-tuning; both sides of a subject are on one side of the split."""
    validation = sources.cases("val")
    assert len(validation) == 39
    available = [p.name.removesuffix("_0000.nii.gz") for p in sources.images.iterdir()]
    data = TrainingSet(images=sources.images, labels=sources.labels, splits=sources.splits)
    seen = {
        "calibration": calibration_cases(sources, Options().calibration_cases),
        "fine-tuning": data.chosen(available, 0),
    }
    assert len(seen["calibration"]) == len(set(seen["calibration"])) == Options().calibration_cases
    assert len(seen["fine-tuning"]) == 161
    for cases in seen.values():
        assert set(cases) <= set(sources.cases("train"))
        assert not set(cases) & set(validation)
        assert not {subject(c) for c in cases} & {subject(c) for c in validation}


def test_subjects():
    assert subject("hippocampus_001") == subject("hippocampus_002") != subject("hippocampus_003")
    assert subject("hippocampus_123") == subject("hippocampus_150")


def test_absent_sources_and_links(tmp_path):
    with pytest.raises(ConfigError, match=r"does not exist; the study needs .* --sources"):
        Sources(tmp_path)
    (tmp_path / "a.txt").write_text("x")
    for _ in range(2):
        folder = linked({"b.txt": tmp_path / "a.txt"}, tmp_path / "links")
    assert (folder / "b.txt").read_text() == "x"


def test_halves_of_the_ct_are_joined_without_what_was_seen(tmp_path):
    """The model called "first" saw the first half, and the other the second: each counts on the other half."""
    import numpy
    import SimpleITK

    part = CT(None, tmp_path, Options(), Study(tmp_path), print)
    for name, value in (("first", 1), ("second", 2)):
        (tmp_path / name).mkdir()
        image = SimpleITK.GetImageFromArray(numpy.full((3, 4, 5), value, numpy.uint8))
        SimpleITK.WriteImage(image, str(tmp_path / name / "ct.nii.gz"))
        part._half(tmp_path / name / "ct.nii.gz", "ct.nii.gz", tmp_path / f"half-{name}", name)
    joined = part._joined(tmp_path / "second", tmp_path / "first") / "ct.nii.gz"
    values = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(joined)))
    assert (values[:, :, :2] == 2).all() and (values[:, :, 2:] == 1).all()
    sizes = [
        SimpleITK.ReadImage(str(tmp_path / f"half-{name}" / "ct.nii.gz")).GetSize()
        for name in ("first", "second")
    ]
    assert sizes == [(2, 4, 3), (3, 4, 3)]


BF16 = "bf16: the processor multiplies bf16"


def rows():
    size = {"of_dense": 0.123, "macs_of_dense": 0.2, "factor": 0.3, "steps": 0}
    compared = {
        "mean_drop": 0.004,
        "mean_drop_interval": [0.001, 0.006],
        "worst_class_drop": 0.005,
        "classes": {"anterior": {"p_holm": 0.02}, "posterior": {"p_holm": 0.3}},
    }
    hippocampus = {"data": "hippocampus", "dice": 0.867, "nsd": 0.95, "dice_per_case": {"a": {"anterior": 1}}}
    ct = {"agreement": 0.97, "worst": 0.9, "nsd": 0.98, "unseen": 0.975, "unseen_worst": 0.8123}
    ct |= {"swapped": 0.965, "swapped_worst": 0.8901}
    half = {"mean": 0.96, "worst": 0.8, "worst_voxels": 31, "worst_sizeable": 0.9321}
    once = {
        "precision": BF16,
        "unseen": None,
        "swapped": None,
        "steps": 9,
        "halves": {"second": half, "first": None},
    }
    ct |= {"halves": {"second": half, "first": half | {"mean": 0.95, "worst_voxels": 32}}}
    return [
        hippocampus | size | {"policy": "dense", "of_dense": 1.0},
        hippocampus | size | {"policy": "calibrated", "refined_in": ["bf16"]} | compared,
        hippocampus | size | {"policy": "calibrated", "steps": 200, "precision": BF16} | compared,
        {"data": "ct", "policy": "weber2024", "refined_in": ["bf16", "fp32"]} | size | ct,
        {"data": "ct", "policy": "weber2024"} | size | ct | once,
        {"data": "latency", "asked_ms": 80.0, "planned_ms": 82.0, "again_ms": 84.0, "dense_ms": 160.0} | size,
    ]


def test_page_plot_and_rows(tmp_path, monkeypatch):
    about = {"cpu": "some", "tucker_ops_isa": "avx2", "cores": 2, "torch": "2", "commit": "abc"}
    text = output.markdown(rows(), about, {"steps": 200}, 12.4)
    assert (
        "| 0.3 | calibrated | 200 | 12.3% | 20.0% | 0.8670 | 0.9500 | 0.0040 | +0.0010 to +0.0060 |" in text
    )
    assert "| 0.3 | weber2024 |  | 12.3% | 20.0% | 0.9700 | 0.9000 |" in text and "; 12 minutes." in text
    assert "commit abc, some (avx2), 2 cores, torch 2;" in text
    refining = "Steps of refining ran in bf16 (rows: 2) and fp32 (rows: 1)."
    assert f"Fine-tuning ran in {BF16}. {refining} All else ran in fp32." in text
    resumed = output.markdown(rows(), about, {"steps": 200}, 12.4, resumed=True)
    assert "resumed, its longer steps took 12 minutes" in resumed
    assert "| 0.9800 | 0.9750 | 0.8123 |\n" in text and "| 0.9800 |  |  |\n" in text
    half = "0.9600 | 0.8000 | 31 | 0.9321"
    assert f"| 0.3 | weber2024 |  | {half} | 0.9500 | 0.8000 | 32 | 0.9321 | 0.9650 | 0.8901 |" in text
    assert f"| 0.3 | weber2024 | 9 | {half} |  |  |  |  |  |  |" in text
    assert "| 80.0 | 82.0 | 84.0 | 1.050 | 160.0 | 12.3% | 20.0% |" in text
    output.plot(rows(), tmp_path / "plot.png")
    plain = (tmp_path / "plot.png").read_bytes()
    assert plain.startswith(b"\x89PNG")
    # As nnU-Net's trainer leaves it.
    monkeypatch.setitem(matplotlib.rcParams, "font.size", 40)
    output.plot(rows(), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes() == plain
    write_rows(rows(), tmp_path / "rows.json")
    written = json.loads((tmp_path / "rows.json").read_text())
    assert len(written) == 6 and all("dice_per_case" not in row for row in written)
