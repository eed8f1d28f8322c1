"""The report: what it shows of a manifest made by hand, and that it says what it lacks."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

pytest.importorskip("nnunetv2")
import SimpleITK as sitk
from rich.console import Console
from typer.testing import CliRunner

from tucker_ops.cli import app
from tucker_ops.convert import CompressionConfig, LayerPlan, Plan
from tucker_ops.cost import Cost
from tucker_ops.errors import ConfigError, ModelFolderError, OutputExistsError, SegmentationError, ShapeError
from tucker_ops.nnunet.manifest import MANIFEST_NAME, Manifest, Totals
from tucker_ops.nnunet.report import Inputs, write_report
from tucker_ops.nnunet.report.figures import accuracy_figure, cost_figure, rank_figure, speed_figure
from tucker_ops.nnunet.report.layers import layers_of, setting_name, short_name
from tucker_ops.nnunet.report.overlay import Volume, largest_slice, overlay_figure, read_oriented
from tucker_ops.nnunet.report.page import Section, render_page
from tucker_ops.nnunet.report.speed import ForwardTime, measure_forward
from tucker_ops.nnunet.report.tables import TextTable, layer_table
from tucker_ops.nnunet.segmentations import read_dataset
from tucker_ops.nnunet.tables import plan_table
from tucker_ops.types import ConvSpec

CUBE, ONES, ZEROS = (3, 3, 3), (1, 1, 1), (0, 0, 0)
LABELS = {"background": 0, "head": 1, "tail": 2}


def layer(name: str, channels: tuple[int, int], ranks=None, reason=None) -> LayerPlan:
    spec = ConvSpec(*channels, CUBE, ONES, ONES, ONES)
    dense = Cost(27 * channels[0] * channels[1], 27_000 * channels[0] * channels[1], 0)
    tucker = None if ranks is None else Cost(100 * ranks[0], 1000 * ranks[0], 0)
    return LayerPlan(name, (), spec, 1, dense, tucker, ranks, reason, None if ranks is None else 0.5)


def manifest(factor: float = 0.5, rank: int = 16) -> Manifest:
    layers = (
        layer("encoder.stages.0.0.convs.0.conv", (1, 32), reason="reads the network's input"),
        layer("encoder.stages.0.0.convs.1.conv", (32, 32), (rank, rank)),
        layer("decoder.stages.0.convs.0.conv", (64, 32), (2 * rank, rank)),
    )
    config = CompressionConfig(factor=factor)
    names = [planned.name for planned in layers if planned.ranks]
    return Manifest(
        source="trained/nnUNetTrainer__nnUNetPlans__3d_fullres",
        source_sha256={"fold_0/checkpoint_final.pth": "0" * 64},
        configuration="3d_fullres",
        trainer_name="nnUNetTrainer",
        network_class_name="tucker_ops.nnunet.networks.TuckerPlainConvUNet",
        input_shape=(1, 1, 16, 16, 16),
        dtype="float32",
        config=config,
        plan=Plan(config, (1, 1, 16, 16, 16), layers, total_params=2_000_000),
        errors={"0": dict.fromkeys(names, 0.4), "1": dict.fromkeys(names, 0.6)},
        dense=Totals(2_000_000, 8_000_000_000, 8_000_000, 8_100_000),
        tucker=Totals(500_000, 2_000_000_000, 2_000_000, 2_100_000),
        verification="made by hand",
        versions={"torch": "2.13.0"},
    )


def model_folder(path: Path, content: Manifest) -> Path:
    path.mkdir(parents=True)
    (path / MANIFEST_NAME).write_bytes(content.to_json())
    (path / "plans.json").write_text(json.dumps({"dataset_name": "Dataset999_Made"}))
    dataset = {"labels": LABELS, "file_ending": ".nii.gz", "channel_names": {"0": "MRI"}}
    (path / "dataset.json").write_text(json.dumps(dataset))
    return path


@pytest.fixture
def model(tmp_path):
    return model_folder(tmp_path / "half", manifest())


def write(path: Path, array: np.ndarray, spacing=(1.0, 1.0, 1.0), direction=None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing)
    if direction is not None:
        image.SetDirection(direction)
    sitk.WriteImage(image, str(path))
    return path


@pytest.fixture
def volumes(tmp_path):
    """Images, labels, and two predictions; the compressed one misses half of the head."""
    label = np.zeros((6, 8, 10), np.uint8)
    label[2:4, 2:6, 2:5], label[2:4, 2:6, 5:8] = 1, 2
    worse = label.copy()
    worse[2, 2:6, 2:5] = 0
    folders = {name: tmp_path / name for name in ("images", "labels", "dense", "pred")}
    rng = np.random.default_rng(0)
    for case in ("a", "b"):
        write(folders["images"] / f"{case}_0000.nii.gz", rng.normal(size=label.shape).astype(np.float32))
        write(folders["labels"] / f"{case}.nii.gz", label)
        write(folders["dense"] / f"{case}.nii.gz", label)
        write(folders["pred"] / f"{case}.nii.gz", worse)
    return folders


def pixels(figure) -> np.ndarray:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())


def cells(table: TextTable, name: str) -> list[str]:
    return next(list(row) for row in table.rows if row[0] == name)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("encoder.stages.1.0.convs.0.conv", "encoder 1 · conv 0"),
        ("encoder.stages.2.blocks.1.conv2.conv", "encoder 2 · block 1 conv 2"),
        ("encoder.stages.2.blocks.0.skip.1.conv", "encoder 2 · block 0 skip"),
        ("encoder.stem.convs.0.conv", "stem · conv 0"),
        ("decoder.stages.0.convs.1.conv", "decoder 0 · conv 1"),
        ("decoder.transpconvs.3", "decoder 3 · up"),
        ("decoder.seg_layers.2", "decoder 2 · head"),
        ("backbone.layer1.0.conv2", "backbone.layer1.0.conv2"),
    ],
)
def test_short_names(name, expected):
    assert short_name(name) == expected


def test_layers_of_manifest():
    first, second, _ = layers_of(manifest())
    assert (first.ranks, first.params, first.error) == (None, first.dense_params, None)
    assert first.reason == "reads the network's input"
    assert (second.ranks, second.params, second.macs) == ((16, 16), 1600, 16_000)
    assert second.error == pytest.approx(0.5)
    assert setting_name(manifest(0.3)) == "factor 0.3"


def test_manifest_alone(model, tmp_path):
    report = write_report(Inputs([model]), tmp_path / "report")
    assert sorted(p.name for p in report.page.parent.iterdir()) == [
        "cost_per_layer.png", "index.html", "ranks_and_errors.png", "tucker_ops_report.json",
    ]  # fmt: skip
    assert all(f.read_bytes().startswith(b"\x89PNG") for f in report.figures)
    assert set(report.missing) == {
        "accuracy against the labels", "agreement with the dense model", "forward time", "overlay",
    }  # fmt: skip
    page = report.page.read_text()
    assert all(reason.replace("'", "&#x27;") in page for reason in report.missing.values())
    assert "encoder.stages.0.0.convs.0.conv" in page
    assert "reads the network&#x27;s input" in page
    assert cells(report.summary, "parameters, million") == ["parameters, million", "2.000", "0.500", "0.250×"]


@pytest.mark.parametrize("width", [60, 80, 200])
def test_narrow_terminals_cut_no_figure(width):
    rows = [
        ["dense", "5.60*", "33.2*", "51.0*", "0.8715*", "–"],
        ["calibrated, refined, 13 % of the MACs", "0.53*", "4.40*", "19.2*", "0.8690", "-0.0025"],
    ]
    table = TextTable("Dice with the labels", ["", "M params", "G MACs", "ms", "Dice", "change"], rows)
    console = Console(width=width, file=io.StringIO())
    console.print(table.rich())
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    for row in rows:
        assert any(all(cell in line.split() for cell in row[1:]) for line in lines)
    assert all(any(word in line for line in lines) for word in ("calibrated", "refined", "MACs"))


def test_everything_but_speed(model, volumes, tmp_path):
    inputs = Inputs(
        [model], images=volumes["images"], labels=volumes["labels"], dense_prediction=volumes["dense"],
        predictions=[volumes["pred"]], measure_speed=False,
        prediction_seconds={"dense": 4.0, "factor 0.5": 1.0},
    )  # fmt: skip
    report = write_report(inputs, tmp_path / "report")
    assert {p.name for p in report.figures} == {
        "cost_per_layer.png", "ranks_and_errors.png", "accuracy.png", "overlay.png", "speed.png",
    }  # fmt: skip
    assert set(report.missing) == {"forward time"}
    # Half of the head is missing: 2·12 / (24 + 12).
    assert cells(report.summary, "Dice head")[1:] == ["1.0000", "0.6667", "-0.3333"]
    assert cells(report.summary, "Dice, mean of classes")[1:] == ["1.0000", "0.8333", "-0.1667"]
    assert cells(report.summary, "agreement with dense")[1:] == ["–", "0.8333", ""]
    assert cells(report.summary, "prediction, s / case")[1:] == ["4.00", "1.00", "0.250×"]
    data = json.loads((report.page.parent / "tucker_ops_report.json").read_text())
    assert data["dice_against_labels"]["factor 0.5"]["dice_per_class"]["head"] == pytest.approx(2 / 3)
    assert data["totals"]["dense"]["parameters"] == 2_000_000


def test_two_models_side_by_side(model, volumes, tmp_path):
    third = model_folder(tmp_path / "third", manifest(0.3, 8))
    inputs = Inputs([model, third], labels=volumes["labels"], predictions=[volumes["dense"], volumes["pred"]])
    report = write_report(inputs, tmp_path / "report")
    assert list(report.summary.columns) == ["", "dense", "factor 0.5", "change", "factor 0.3", "change"]
    assert cells(report.summary, "Dice head")[1:] == ["–", "1.0000", "", "0.6667", ""]


def test_inputs_that_do_not_fit(model, volumes, tmp_path):
    other = model_folder(tmp_path / "other", replace(manifest(), source_sha256={"fold_0/x.pth": "1" * 64}))
    with pytest.raises(ConfigError, match="different models"):
        write_report(Inputs([model, other]), tmp_path / "report")
    with pytest.raises(ConfigError, match="one for each"):
        write_report(Inputs([model], predictions=[volumes["dense"], volumes["pred"]]), tmp_path / "report")
    with pytest.raises(ModelFolderError, match="tucker-ops compress"):
        write_report(Inputs([tmp_path]), tmp_path / "report")
    with pytest.raises(SegmentationError, match="case c"):
        write_report(
            Inputs([model], images=volumes["images"], labels=volumes["labels"], case="c"), tmp_path / "report"
        )
    assert not (tmp_path / "report").exists()


def test_means_over_different_cases_are_not_compared(model, volumes, tmp_path):
    (volumes["pred"] / "b.nii.gz").unlink()
    inputs = Inputs(
        [model],
        labels=volumes["labels"],
        dense_prediction=volumes["dense"],
        predictions=[volumes["pred"]],
    )
    with pytest.raises(ConfigError, match=r"different cases \(b\)"):
        write_report(inputs, tmp_path / "report")


def test_the_source_must_be_what_was_compressed(model, tmp_path):
    source = tmp_path / "dense_model"
    with pytest.raises(ConfigError, match="is absent"):
        write_report(Inputs([model], source=source), tmp_path / "report")
    (source / "fold_0").mkdir(parents=True)
    (source / "fold_0" / "checkpoint_final.pth").write_bytes(b"another model")
    with pytest.raises(ConfigError, match="another file"):
        write_report(Inputs([model], source=source), tmp_path / "report")


def test_output_is_not_overwritten(model, tmp_path):
    write_report(Inputs([model]), tmp_path / "report")
    with pytest.raises(OutputExistsError, match="--force"):
        write_report(Inputs([model]), tmp_path / "report")
    write_report(Inputs([model]), tmp_path / "report", force=True)
    with pytest.raises(OutputExistsError, match="no earlier output"):
        write_report(Inputs([model]), model, force=True)


def test_command_line(model, volumes, tmp_path):
    arguments = ["report", str(model), "-o", str(tmp_path / "report"), "--labels", str(volumes["labels"])]
    result = CliRunner().invoke(app, [*arguments, "--pred", str(volumes["pred"])])
    assert result.exit_code == 0, result.output
    assert "0.8333" in result.stdout
    assert "Left out: overlay; no images were given (--images)" in result.stdout
    assert (tmp_path / "report" / "index.html").is_file()


def test_page_escapes():
    table = TextTable("<t>", ["a"], [["<b>"]])
    page = render_page("<x>", [Section("<s>", "<text>", [table], ["f.png"], "<none>")])
    assert all(f"<{tag}>" not in page for tag in ("t", "b", "x", "s", "text", "none"))


def rows_apart(axes, figure) -> bool:
    """Whether no two names beside the plot touch."""
    pixels(figure)
    boxes = [t.get_window_extent() for t in axes.get_yticklabels()]
    return not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[i + 1 :])


def test_a_rank_of_the_taps_is_shown():
    made = manifest()
    first, second, third = made.plan.layers
    second = replace(second, ranks=(16, 16, 9))
    rows = layers_of(replace(made, plan=replace(made.plan, layers=(first, second, third))))
    table = layer_table("layers", rows)
    assert (
        "ranks in, out, taps" in table.columns and "ranks in, out" in layer_table("", layers_of(made)).columns
    )
    assert [row[3] for row in table.rows] == ["dense", "16, 16, 9", "32, 16"]
    assert rank_figure({"taps": rows}).axes


@pytest.mark.parametrize("width", [60, 80, 200])
def test_tables_of_layers_cut_no_figure(width):
    made = layer("encoder.stages.0.0.convs.0.conv", (320, 320), (120, 136, 14))
    spent = replace(made, tucker=Cost(1_234_567, 12_345_678_901, 0), expected_loss=0.125)
    plan = Plan(CompressionConfig(params=0.5), (1, 1, 8, 8, 8), (spent,), 10**7, calibration="x")
    stream = io.StringIO()
    Console(file=stream, width=width).print(plan_table(plan))
    for figure in ("320→320 3×3×3", "120, 136, 14", "1,234,567", "12,346", "0.125"):
        assert figure in stream.getvalue()
    assert "…" not in stream.getvalue()


def test_names_of_many_layers_stay_apart():
    rows = layers_of(manifest()) * 15
    for figure in (cost_figure({"factor 0.5": rows}), rank_figure({"a": rows, "b": rows, "c": rows})):
        assert rows_apart(figure.axes[0], figure)


def test_names_of_many_classes_stay_apart():
    table = pd.DataFrame(np.random.default_rng(0).random((3, 40)), columns=[f"organ {i}" for i in range(40)])
    table["organ 7"] = np.nan
    figure = accuracy_figure({"dense": table, "factor 0.5": table}, "the labels")
    assert rows_apart(figure.axes[0], figure)


def test_speed_figure_writes_the_ratio():
    forward = {"dense": ForwardTime(2000, 1990, 2010, 5), "factor 0.5": ForwardTime(500, 490, 510, 5)}
    figure = speed_figure(forward, {"dense": 4.0, "factor 0.5": 3.0})
    assert [t.get_text().strip() for t in figure.axes[0].texts] == ["2,000", "500  (0.25×)"]
    assert [t.get_text().strip() for t in figure.axes[1].texts] == ["4", "3  (0.75×)"]


def test_forward_times(tiny_model):
    calls = []
    times = measure_forward(
        {"one": tiny_model, "two": tiny_model}, repeats=3, progress=lambda *step: calls.append(step)
    )
    assert list(times) == ["one", "two"]
    for time in times.values():
        assert not time.compressed and time.stock is time.not_fused
        for t in filter(None, (time.not_fused, time.fused)):
            assert t.repeats == 3 and 0 < t.low <= t.median <= t.high
    # One round to warm up, and models take turns.
    assert [name for name, _, _ in calls] == ["one", "two"] * 4 + [""]


def test_largest_slice_avoids_thick_slices():
    label = np.zeros((4, 20, 20), np.uint8)
    label[1, 5:9, 5:9] = 1
    label[2, 5:10, 5:10] = 1
    label[:, 5, :] = 1
    assert largest_slice(Volume(label, np.array([1.0, 1.0, 1.0]), True)).axis == 1
    thick = largest_slice(Volume(label, np.array([5.0, 1.0, 1.0]), True))
    assert (thick.axis, thick.index) == (0, 2)


def test_overlay_keeps_physical_aspect_and_colours(volumes, model):
    label = np.zeros((6, 8, 10), np.uint8)
    label[3, 2:6, 2:5], label[3, 2:6, 5:8] = 1, 2
    swapped = np.where(label > 0, 3 - label, 0).astype(np.uint8)
    spacing = (1.0, 2.0, 4.0)
    image = write(volumes["images"] / "c_0000.nii.gz", label.astype(np.float32), spacing)
    paths = {
        "label": write(volumes["labels"] / "c.nii.gz", label, spacing),
        "dense": write(volumes["dense"] / "c.nii.gz", swapped, spacing),
    }
    figure = overlay_figure(read_dataset(model / "dataset.json"), image, paths, "c")
    assert [a.get_title() for a in figure.axes] == ["image", "label", "dense"]
    assert all(a.get_aspect() == 2.0 for a in figure.axes)

    def fill(panel: int, index: int) -> np.ndarray:
        return figure.axes[panel].images[1 + index].get_array()

    # Same colour for the same class, on the other side.
    assert np.array_equal(fill(1, 0)[3, 3], fill(2, 0)[3, 6])
    assert np.array_equal(fill(1, 1)[3, 6], fill(2, 1)[3, 3])
    assert not np.array_equal(fill(1, 0)[3, 3], fill(1, 1)[3, 6])
    assert fill(1, 0)[3, 6, 3] == 0
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["head", "tail"]
    assert pixels(figure).std() > 0


def test_overlay_turns_to_the_patient(model, tmp_path):
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    dataset = read_dataset(model / "dataset.json")
    plain = write(tmp_path / "plain.nii.gz", array)
    turned = write(tmp_path / "turned.nii.gz", array[:, ::-1, ::-1], direction=(-1, 0, 0, 0, -1, 0, 0, 0, 1))
    first, second = read_oriented(dataset, plain), read_oriented(dataset, turned)
    assert first.oriented and second.oriented
    assert np.array_equal(first.array, array)
    assert np.array_equal(second.array, array)


def test_overlay_of_other_extent(volumes, model):
    image = volumes["images"] / "a_0000.nii.gz"
    label = write(volumes["labels"] / "a.nii.gz", np.ones((6, 8, 9), np.uint8))
    with pytest.raises(ShapeError, match=r"a\.nii\.gz"):
        overlay_figure(read_dataset(model / "dataset.json"), image, {"label": label}, "a")


def test_many_classes_have_colours_of_their_own(model, tmp_path):
    labels = {"background": 0} | {f"organ {i}": i for i in range(1, 25)}
    (model / "dataset.json").write_text(json.dumps({"labels": labels, "file_ending": ".nii.gz"}))
    array = np.zeros((3, 5, 5), np.uint8)
    array[1] = np.arange(25).reshape(5, 5)
    image = write(tmp_path / "image.nii.gz", array.astype(np.float32))
    path = write(tmp_path / "label.nii.gz", array)
    figure = overlay_figure(read_dataset(model / "dataset.json"), image, {"label": path}, "case")
    colours = {handle.get_facecolor() for handle in figure.legends[0].legend_handles}
    assert len(colours) == 24
    figure.savefig(io.BytesIO())
