"""A sweep as a table, a file and a picture."""

from __future__ import annotations

import io
import json
from typing import Any

from tucker_ops.nnunet.output import write_file
from tucker_ops.nnunet.report.tables import TextTable
from tucker_ops.nnunet.sweep.run import COSTS, Sweep

AXES = {
    "parameters": (1e6, "parameters, million"),
    "macs": (1e9, "MACs of one patch, billion"),
    "milliseconds": (1, "one patch, ms"),
}


def sweep_table(sweep: Sweep) -> TextTable:
    """A row per model; a star stands where no other model is both cheaper in that column and better."""
    fronts = {cost: set(sweep.front(cost)) for cost in COSTS}

    def cost(row: Any, name: str) -> str:
        star = "*" if row["name"] in fronts[name] else " "
        return f"{row[name] / AXES[name][0]:.3g}{star}"

    def figure(value: float | None) -> str:
        return "–" if value is None else f"{value:.4f}"

    rows = []
    for row in sweep.rows:
        worst = "–" if row["worst_class"] is None else f"{row['worst_class']} {row['worst_class_drop']:.4f}"
        costs = [cost(row, name) for name in COSTS]
        rows.append([row["name"], *costs, figure(row["dice"]), figure(row["mean_drop"]), worst])
    columns = ["", "M params", "G MACs", "ms", "Dice", "lost", "most in"]
    return TextTable(f"Dice with {sweep.against}; * on the Pareto front", columns, rows)


def write_sweep(sweep: Sweep) -> None:
    """sweep_rows.json, sweep.md and sweep.png into the sweep's folder. Raises OutputWriteError."""
    rows = json.dumps({"against": sweep.against, "rows": list(sweep.rows)}, indent=1)
    write_file(sweep.folder / "sweep_rows.json", rows.encode(), force=True)
    table = sweep_table(sweep)
    lines = [
        f"# {table.title}",
        "",
        *(_line(cells) for cells in (table.columns, ["---"] * len(table.columns))),
    ]
    lines += [_line(cells) for cells in table.rows]
    write_file(sweep.folder / "sweep.md", ("\n".join(lines) + "\n").encode(), force=True)
    write_file(sweep.folder / "sweep.png", _plot(sweep), force=True)


def _line(cells: Any) -> str:
    return "| " + " | ".join(cells) + " |"


def _plot(sweep: Sweep) -> bytes:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(COSTS), figsize=(12, 4), layout="constrained", sharey=True)
    for axis, cost in zip(axes, COSTS, strict=True):
        unit, label = AXES[cost]
        for row in sweep.rows:
            axis.plot(
                row[cost] / unit, row["dice"], "o", color="black" if row["name"] == "dense" else "#1f6fb4"
            )
            axis.annotate(
                row["name"],
                (row[cost] / unit, row["dice"]),
                fontsize=7,
                xytext=(4, -8),
                textcoords="offset points",
            )
        names = sweep.front(cost)
        front = sorted((row[cost] / unit, row["dice"]) for row in sweep.rows if row["name"] in names)
        axis.plot(*zip(*front, strict=True), color="#1f6fb4", linewidth=1, alpha=0.6)
        axis.set(xlabel=label, xscale="log")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(f"Dice with {sweep.against}")
    content = io.BytesIO()
    figure.savefig(content, dpi=120, format="png")
    pyplot.close(figure)
    return content.getvalue()
