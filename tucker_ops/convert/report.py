"""A plan for people: as plain text, or as a table for rich."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tucker_ops.types import ranks_text

if TYPE_CHECKING:
    from rich.table import Table

    from tucker_ops.convert.plan import LayerPlan, Plan

_COLUMNS = ("layer", "shape", "ranks", "params", "MMAC", "error", "why dense")
_NUMBERS = ("params", "MMAC", "error", "nats")


def _columns(plan: Plan) -> tuple[str, ...]:
    """Of a calibrated plan the expected loss in nats, as errors of weights then say little."""
    return tuple("nats" if c == "error" and plan.calibration is not None else c for c in _COLUMNS)


def as_text(plan: Plan) -> str:
    """The plan in aligned columns, totals and notes below."""
    rows = [_columns(plan), *(_row(layer) for layer in plan.layers)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS) - 1)]
    lines = [
        "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[-1]]).rstrip()
        for row in rows
    ]
    return "\n".join([*lines, *_footer(plan)])


def as_table(plan: Plan) -> Table:
    """The plan as a rich Table, totals and notes as its caption. Needs rich."""
    from rich.table import Table
    from rich.text import Text

    table = Table(caption="\n".join(_footer(plan)), caption_justify="left", pad_edge=False)
    for name in _columns(plan):
        table.add_column(name, justify="right" if name in _NUMBERS else "left")
    for layer in plan.layers:
        table.add_row(*map(Text, _row(layer)), style="dim" if layer.ranks is None else None)
    return table


def _row(layer: LayerPlan) -> tuple[str, ...]:
    spec = layer.spec
    arrow = "⇑" if spec.transposed else "→"
    shape = f"{spec.in_channels}{arrow}{spec.out_channels} {'×'.join(map(str, spec.kernel_size))}"
    if any(s != 1 for s in spec.stride):
        shape += f" /{'×'.join(map(str, spec.stride))}"
    dense, cost = layer.dense, layer.cost
    params, macs = f"{dense.params:,}", _mega(dense.macs)
    if layer.ranks is None:
        return layer.name, shape, "", params, macs, "", layer.reason or ""
    error = layer.expected_error if layer.expected_loss is None else layer.expected_loss
    return (
        layer.name,
        shape,
        ranks_text(layer.ranks),
        f"{params} → {cost.params:,}",
        f"{macs} → {_mega(cost.macs)}",
        "" if error is None else f"{error:.3f}",
        "",
    )


def _footer(plan: Plan) -> list[str]:
    dense, compressed = plan.dense, plan.compressed
    total = f"{len(plan.ranks)} of {len(plan.layers)} convolutions factorised; "
    total += f"parameters {dense.params:,} → {compressed.params:,} ({compressed.params / dense.params:.1%})"
    if dense.macs and plan.input_shape is not None:
        total += f"; MACs {dense.macs / 1e9:,.2f} G → {compressed.macs / 1e9:,.2f} G"
        total += f" ({compressed.macs / dense.macs:.1%})"
    return [total, *plan.notes]


def _mega(macs: int) -> str:
    return f"{macs / 1e6:,.1f}" if macs >= 1e5 else f"{macs / 1e6:.2g}"
