"""The roofline: how much arithmetic a byte of traffic feeds, against the rate reached, under the machine's ceilings."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from bench.measure import MEASURED
from bench.peers import DENSE, ONE_PASS, OURS, THREE_CONVS

# Colours of Okabe and Ito, by who computes; the shape says what is computed.
FAMILIES = {
    "torch": "#000000",
    "compile": "#009E73",
    "onnxruntime": "#E69F00",
    "openvino": "#CC79A7",
    OURS.rstrip(":"): "#0072B2",
}
LABELS = {
    "torch": "torch",
    "compile": "torch.compile",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    OURS.rstrip(":"): "tucker_ops",
}
SHAPES = {DENSE: "s", THREE_CONVS: "^", ONE_PASS: "o"}
SHAPE_LABELS = {DENSE: "dense convolution", THREE_CONVS: "three convolutions", ONE_PASS: "one pass"}
PANEL_INCHES = (7.5, 5.2)
# Points further below the peak than this are not shown.
LOWEST_SHARE = 0.01
MOST_LABELLED = 120
NOTE = {"textcoords": "offset points", "fontsize": 7, "color": "#555555"}


def roofline(rows: Sequence[dict[str, object]]) -> Figure:
    """A panel for each configuration (down) and dtype (across); a point is a problem and a peer's faster layout."""
    shown = [row for row in rows if row["status"] == MEASURED and row["best_layout"] and row["floor_ms"]]
    shown = [row for row in shown if row["peer"] != f"{OURS}reference"]
    configurations = list(dict.fromkeys(row["configuration"] for row in shown))
    dtypes = list(dict.fromkeys(row["dtype"] for row in shown))
    size = PANEL_INCHES[0] * len(dtypes), PANEL_INCHES[1] * len(configurations) + 1
    result = Figure(figsize=size, layout="constrained")
    panels = result.subplots(len(configurations), len(dtypes), squeeze=False, sharex=True, sharey=True)
    for line, configuration in enumerate(configurations):
        for column, dtype in enumerate(dtypes):
            of_panel = [
                row for row in shown if (row["configuration"], row["dtype"]) == (configuration, dtype)
            ]
            axes = panels[line][column]
            if of_panel:
                _draw(axes, of_panel)
            else:
                axes.text(0.5, 0.5, f"{dtype}: nothing measured", transform=axes.transAxes, ha="center")
    for axes in panels[-1]:
        axes.set_xlabel("arithmetic ÷ least traffic of the form, FLOP a byte (log)")
    for axes in panels[:, 0]:
        axes.set_ylabel("GFLOP/s, counted as direct convolutions (log)")
    families = {_family(row) for row in shown}
    result.legend(handles=_handles(families), loc="outside upper center", ncols=4, frameon=False, fontsize=9)
    return result


def _draw(axes, rows: Sequence[dict[str, object]]) -> None:
    first = rows[0]
    peak, copy = first["peak_gflop_per_s"], first["copy_gb_per_s"]
    intensities = [_intensity(row) for row in rows]
    left, right = min(*intensities, peak / copy) / 2, max(*intensities, peak / copy) * 2
    ridge = peak / copy
    axes.plot([left, ridge, right], [copy * left, peak, peak], color="#555555", linewidth=1.4, zorder=1)
    axes.annotate(
        f"{peak:.0f} GFLOP/s: {first['peak_loop'].split(':')[0]}", (right, peak), (-4, 4), ha="right", **NOTE
    )
    axes.annotate(f"copy {copy:.1f} GB/s", (left, copy * left), (4, 8), ha="left", **NOTE)
    for row, intensity in zip(rows, intensities, strict=True):
        ours = row["peer"].startswith(OURS)
        axes.plot(
            intensity, row["gflop_per_s"], color=FAMILIES[_family(row)], marker=SHAPES[row["form"]],
            markersize=7 if ours else 5, alpha=1 if ours else 0.75, zorder=3 if ours else 2,
        )  # fmt: skip
        if ours and len(rows) <= MOST_LABELLED:
            axes.annotate(row["layer"], (intensity, row["gflop_per_s"]), (5, -9), **NOTE)
    axes.set_xscale("log")
    axes.set_yscale("log")
    slowest = min(row["gflop_per_s"] for row in rows)
    axes.set_ylim(max(slowest / 2, peak * LOWEST_SHARE), 1.6 * peak)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(
            FuncFormatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else "")
        )
    axes.set_axisbelow(True)
    axes.grid(color="#EEEEEE")
    axes.spines[["top", "right"]].set_visible(False)
    threads = f"{first['threads']} thread{'s' if first['threads'] != 1 else ''}"
    axes.set_title(f"{first['cpu']}, {threads}, {first['tucker_ops_isa']}, {first['dtype']}", fontsize=10)


def _intensity(row: dict[str, object]) -> float:
    return row["gflop"] * 1e9 / row["bytes"]


def _family(row: dict[str, object]) -> str:
    return row["peer"].split(":")[0] if ":" in row["peer"] else "torch"


def _handles(families: set[str]) -> list[Line2D]:
    who = [
        Line2D([], [], color=colour, marker="D", linestyle="none", label=LABELS[family])
        for family, colour in FAMILIES.items()
        if family in families
    ]
    what = [
        Line2D([], [], color="#555555", marker=marker, linestyle="none", label=SHAPE_LABELS[form])
        for form, marker in SHAPES.items()
    ]
    return who + what
