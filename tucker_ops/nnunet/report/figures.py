"""Plots of the report. Every function returns a matplotlib figure that the caller saves and closes.

Colours are those of Okabe and Ito, which stay apart for colour-blind readers; dense is black throughout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from tucker_ops.nnunet.report.layers import Layer
from tucker_ops.nnunet.report.speed import ForwardTime

DENSE_COLOUR = "#000000"
MODEL_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
MODEL_MARKERS = ("o", "s", "D", "^", "v", "P")
FAINT = "#BBBBBB"
ROW_INCHES = 0.26


def cost_figure(models: Mapping[str, Sequence[Layer]]) -> Figure:
    """Parameters and MACs of each layer, dense and compressed, on logarithmic axes."""
    layers = next(iter(models.values()))
    figure, (params, macs) = _rows_figure(len(layers), 2, width=11)
    _span_rows(params, layers, models, "dense_params", "params")
    _span_rows(macs, layers, models, "dense_macs", "macs")
    params.set_xlabel("parameters")
    macs.set_xlabel("multiply-accumulates of one patch")
    _name_rows(params, [layer.label for layer in layers])
    _legend(figure, models, dense=True)
    return figure


def rank_figure(models: Mapping[str, Sequence[Layer]]) -> Figure:
    """Share of the channels that each layer's ranks keep, and the error of its weights."""
    layers = next(iter(models.values()))
    figure, (rank_in, rank_out, error) = _rows_figure(len(layers), 3, width=12)
    step = 0.64 / len(models)
    for index, (colour, marker, rows) in enumerate(_styled(models)):
        offset = (index - (len(models) - 1) / 2) * step
        for row, layer in enumerate(rows):
            if layer.ranks is None:
                continue
            for axes, rank, channels in zip(
                (rank_in, rank_out), layer.ranks[:2], layer.channels, strict=True
            ):
                axes.barh(row + offset, rank / channels, height=step * 0.9, color=colour)
                axes.text(rank / channels + 0.015, row + offset, f"{rank}", va="center", fontsize=6.5)
            if layer.error is not None:
                error.plot(layer.error, row, marker, color=colour, markersize=5, linestyle="none")
    dense_rows = [
        row for row in range(len(layers)) if all(rows[row].ranks is None for rows in models.values())
    ]
    for row in dense_rows:
        for axes in (rank_in, rank_out):
            axes.text(0.015, row, "kept dense", va="center", fontsize=7, color="#666666", style="italic")
    for axes, side in ((rank_in, 0), (rank_out, 1)):
        axes.set_xlim(0, 1.12)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1.0])
        axes.set_xlabel(("input" if side == 0 else "output") + " rank ÷ channels")
    _name_rows(rank_in, [f"{layer.label}  ({layer.channels[0]}→{layer.channels[1]})" for layer in layers])
    errors = [layer.error or 0.0 for rows in models.values() for layer in rows]
    error.set_xlim(0, max(errors) * 1.08 or 1.0)
    error.set_xlabel("relative error of the weights")
    _legend(figure, models, dense=False)
    return figure


def accuracy_figure(per_case: Mapping[str, pd.DataFrame], reference: str) -> Figure:
    """Dice of every case (dots) and its mean (bar) per class and model; `per_case` as in `Evaluation`."""
    classes = list(next(iter(per_case.values())).columns)
    height = max(2.4, 1.2 + 0.24 * len(classes) * len(per_case))
    figure = Figure(figsize=(8, height), layout="constrained")
    axes = figure.subplots()
    step = 0.8 / len(per_case)
    for index, (name, table) in enumerate(per_case.items()):
        colour = (
            DENSE_COLOUR if name == "dense" else MODEL_COLOURS[_index(per_case, name) % len(MODEL_COLOURS)]
        )
        for row, label in enumerate(classes):
            values = table[label].dropna().to_numpy()
            at = row + (index - (len(per_case) - 1) / 2) * step
            axes.plot(values, np.full(len(values), at), "o", color=colour, alpha=0.35, markersize=4, mew=0)
            if len(values):
                axes.plot(
                    [values.mean()] * 2, [at - step * 0.38, at + step * 0.38], color=colour, linewidth=2.5
                )
        mean = table.mean().mean()
        axes.plot([], [], "o-", color=colour, markersize=4, label=f"{name}  (mean {mean:.3f})")
    axes.set_yticks(range(len(classes)), classes)
    axes.set_ylim(len(classes) - 0.5, -0.5)
    axes.set_xlabel(f"Dice against {reference}: each case, and the mean as a bar")
    _plain(axes)
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    return figure


def speed_figure(forward: Mapping[str, ForwardTime], prediction_seconds: Mapping[str, float]) -> Figure:
    """Milliseconds of one forward pass, and seconds per case of a whole prediction where known."""
    panels = [("forward pass of one patch, ms", {name: t.median for name, t in forward.items()})]
    if prediction_seconds:
        panels.append(("prediction, seconds per case", dict(prediction_seconds)))
    panels = [(title, values) for title, values in panels if values]
    count = max(len(values) for _, values in panels)
    figure = Figure(figsize=(5 * len(panels), 1.0 + 0.45 * count), layout="constrained")
    for axes, (title, values) in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True):
        for row, (name, value) in enumerate(values.items()):
            colour = (
                DENSE_COLOUR if name == "dense" else MODEL_COLOURS[_index(values, name) % len(MODEL_COLOURS)]
            )
            axes.barh(row, value, height=0.6, color=colour)
            ratio = f"  ({value / values['dense']:.2f}×)" if "dense" in values and name != "dense" else ""
            number = f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
            axes.text(value, row, f" {number}{ratio}", va="center", fontsize=9)
        axes.set_yticks(range(len(values)), list(values))
        axes.set_ylim(len(values) - 0.5, -0.5)
        axes.set_xlim(0, max(values.values()) * 1.35)
        axes.set_xlabel(title)
        _plain(axes)
    return figure


def _index(names: Mapping[str, object], name: str) -> int:
    return [n for n in names if n != "dense"].index(name)


def _styled(models: Mapping[str, Sequence[Layer]]):
    for index, rows in enumerate(models.values()):
        yield MODEL_COLOURS[index % len(MODEL_COLOURS)], MODEL_MARKERS[index % len(MODEL_MARKERS)], rows


def _rows_figure(rows: int, panels: int, width: float) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(width, 1.2 + ROW_INCHES * rows), layout="constrained")
    axes = figure.subplots(1, panels, sharey=True)
    for panel in axes:
        _plain(panel)
        panel.set_ylim(rows - 0.5, -0.5)
    return figure, axes


def _name_rows(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names, fontsize=8)


def _span_rows(
    axes: Axes, layers: Sequence[Layer], models: Mapping[str, Sequence[Layer]], before: str, after: str
) -> None:
    """A line from each layer's dense cost to the lowest compressed one, and a marker for each."""
    dense = [getattr(layer, before) for layer in layers]
    lowest = [min(getattr(rows[i], after) for rows in models.values()) for i in range(len(layers))]
    axes.hlines(range(len(layers)), lowest, dense, color=FAINT, linewidth=1.2, zorder=1)
    for colour, marker, rows in _styled(models):
        changed = [(getattr(r, after), i) for i, r in enumerate(rows) if r.ranks is not None]
        if changed:
            axes.plot(*zip(*changed, strict=True), marker, color=colour, markersize=5.5, zorder=3)
    axes.plot(dense, range(len(layers)), "|", color=DENSE_COLOUR, markersize=10, mew=2, zorder=2)
    axes.set_xscale("log")
    for row, cost in enumerate(dense):
        if cost == 0:
            place = axes.get_yaxis_transform()
            axes.text(
                0.015,
                row,
                "not run",
                transform=place,
                va="center",
                fontsize=7,
                color="#666666",
                style="italic",
            )


def _legend(figure: Figure, models: Mapping[str, Sequence[Layer]], *, dense: bool) -> None:
    entries = []
    if dense:
        entries.append(
            Line2D(
                [], [], color=DENSE_COLOUR, marker="|", markersize=10, mew=2, linestyle="none", label="dense"
            )
        )
    for name, (colour, marker, _) in zip(models, _styled(models), strict=True):
        entries.append(
            Line2D([], [], color=colour, marker=marker, markersize=6, linestyle="none", label=name)
        )
    figure.legend(handles=entries, loc="outside upper center", ncols=len(entries), frameon=False, fontsize=9)


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#E5E5E5", linewidth=0.8)
    axes.set_axisbelow(True)
