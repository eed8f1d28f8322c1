"""Tables of the report: plain rows that the terminal and the page both show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tucker_ops.nnunet.compare import Comparison
from tucker_ops.nnunet.evaluate import Evaluation
from tucker_ops.nnunet.report.layers import Layer
from tucker_ops.types import ranks_text

if TYPE_CHECKING:
    from rich.table import Table


# Characters up to which a cell is shown in one piece, however narrow the terminal.
FIGURE = 12


@dataclass(frozen=True)
class TextTable:
    """Rows of text; the first column holds names, the others figures."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def rich(self) -> Table:
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

        table = Table(
            title=self.title,
            title_justify="left",
            box=SIMPLE_HEAD,
            show_edge=False,
            padding=(0, 2, 0, 0),
            pad_edge=False,
        )
        for index, column in enumerate(self.columns):
            longest = max((len(row[index]) for row in self.rows), default=0)
            # A figure that is cut is another figure; names and reasons take a second line instead.
            whole = longest if 0 < index and longest <= FIGURE else None
            table.add_column(
                column, justify="left" if index == 0 else "right", overflow="fold", min_width=whole
            )
        for row in self.rows:
            table.add_row(*row)
        return table


@dataclass(frozen=True)
class Quantity:
    """One line of the comparison: a value per model, dense first, and how to write it.

    ``compare`` is "ratio" (to the dense value), "difference", or "" for neither. Missing values are None.
    """

    name: str
    values: Sequence[float | None]
    pattern: str
    compare: str = "ratio"


def comparison_table(title: str, models: Sequence[str], quantities: Sequence[Quantity]) -> TextTable:
    """A column per model, each but the first followed by its ratio to (or difference from) the first."""
    columns = ["", models[0]]
    for name in models[1:]:
        columns += [name, "change"]
    rows = []
    for quantity in quantities:
        first = quantity.values[0]
        row = [quantity.name, _format(first, quantity.pattern)]
        for value in quantity.values[1:]:
            row += [_format(value, quantity.pattern), _against(value, first, quantity.compare)]
        rows.append(row)
    return TextTable(title, columns, rows)


def evaluation_table(evaluations: Mapping[str, Evaluation]) -> TextTable:
    """Mean Dice per class, a column per evaluation, and their mean; then surface Dice, where it was counted."""
    names = list(evaluations)
    classes = list(dict.fromkeys(c for e in evaluations.values() for c in e.classes))
    rows = [[c, *(_format(e.per_class.get(c), "{:.4f}") for e in evaluations.values())] for c in classes]
    rows.append(["mean", *(_format(e.mean, "{:.4f}") for e in evaluations.values())])
    nsd = {name: e.nsd_per_case for name, e in evaluations.items()}
    if all(table is not None for table in nsd.values()):
        rows += [[f"{c}, surface", *(_format(t[c].mean(), "{:.4f}") for t in nsd.values())] for c in classes]
        rows.append(["mean, surface", *(_format(t.mean().mean(), "{:.4f}") for t in nsd.values())])
    cases = len(next(iter(evaluations.values())).per_case)
    return TextTable(f"Dice, mean of {cases} cases", ["class", *names], rows)


def comparison_of_classes(comparison: Comparison) -> TextTable:
    """What compression costs each class, with intervals and corrected p-values; the last row is the mean."""
    rows = [
        [
            str(name),
            *(_format(row[key], "{:.4f}") for key in ("dense", "compressed", "drop")),
            _interval(row["low"], row["high"]),
            _format(row["p_holm"], "{:.2g}"),
        ]
        for name, row in comparison.classes.iterrows()
    ]
    means = (comparison.mean_dense, comparison.mean_compressed, comparison.mean_drop)
    figures = [_format(value, "{:.4f}") for value in means]
    rows.append(["mean", *figures, _interval(comparison.mean_low, comparison.mean_high), ""])
    name, drop = comparison.worst_class
    title = f"Dice lost against the dense model; most in {name}: {drop:.4f}"
    return TextTable(title, ["class", "dense", "compressed", "drop", "95 % interval", "p (Holm)"], rows)


def _interval(low: float, high: float) -> str:
    return "–" if np.isnan(low) else f"{low:+.4f} to {high:+.4f}"


def case_table(evaluation: Evaluation, title: str, *, most_columns: int | None = None) -> TextTable:
    """Dice of every case and class; of more than `most_columns` classes only the mean and the lowest."""
    table = evaluation.per_case
    if most_columns is not None and len(table.columns) > most_columns:
        rows = []
        for case, values in table.iterrows():
            lowest = values.idxmin() if values.notna().any() else None
            low = (_format(values[lowest], "{:.4f}"), lowest) if lowest is not None else ("–", "–")
            rows.append([str(case), _format(values.mean(), "{:.4f}"), *low])
        return TextTable(title, ["case", "mean of classes", "lowest", "class of the lowest"], rows)
    rows = [[str(case), *(_format(v, "{:.4f}") for v in values)] for case, values in table.iterrows()]
    return TextTable(title, ["case", *table.columns], rows)


def layer_table(title: str, layers: Sequence[Layer]) -> TextTable:
    """Kernel, channels, ranks, costs and error of each layer, or the reason why it is dense."""
    rows = []
    for layer in layers:
        kernel = "×".join(map(str, layer.kernel_size)) + (" transposed" if layer.transposed else "")
        if any(s != 1 for s in layer.stride):
            kernel += " /" + "×".join(map(str, layer.stride))
        rows.append(
            [
                layer.name,
                kernel,
                f"{layer.channels[0]} → {layer.channels[1]}",
                ranks_text(layer.ranks) if layer.ranks else "dense",
                f"{layer.dense_params:,}",
                f"{layer.params:,}",
                f"{layer.dense_macs / 1e6:,.1f}",
                f"{layer.macs / 1e6:,.1f}",
                _format(layer.error, "{:.3f}"),
                layer.reason or "",
            ]
        )
    columns = [
        "layer",
        "kernel /stride",
        "channels",
        "ranks in, out, taps" if any(len(x.ranks or ()) == 3 for x in layers) else "ranks in, out",
        "params",
        "→",
        "MMACs",
        "→",
        "error",
        "why dense",
    ]
    return TextTable(title, columns, rows)


def _format(value: float | None, pattern: str) -> str:
    return "–" if value is None or np.isnan(value) else pattern.format(value)


def _against(value: float | None, first: float | None, compare: str) -> str:
    if value is None or first is None or np.isnan(value) or np.isnan(first) or not compare:
        return ""
    if compare == "difference":
        return f"{value - first:+.4f}"
    return f"{value / first:.3f}×" if first else ""
