"""Rows as tables on the screen, and as JSON, Markdown and pictures in a folder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from bench.folders import as_json, replace_folder
from bench.measure import MEASURED, NO_PEAK
from bench.peers import DENSE, OURS, THREE_CONVS
from bench.plot import figure
from bench.roofline import roofline
from tucker_ops.errors import OutputExistsError

Row = dict[str, object]

JSON_NAME, TABLE_NAME, PLOT_NAME, ROOFLINE_NAME = "results.json", "results.md", "results.png", "roofline.png"
SUMMARY = ("problem", "layer", "dense\nms", "three\n÷ dense", "ours\n÷ dense", "ours\n÷ three", "extra\nMB")
FLOOR_SUMMARY = (
    "problem", "strongest peer", "its\nms", "its\n% floor", "floor\nms", "ours\nms", "ours\n% floor", "ours\n% peak",
    "ours\n÷ it", "machine\nfree",
)  # fmt: skip
DETAILS = (
    "peer", "layout", "ms", "20–80 %", "GFLOP/s", "% peak", "GB/s", "% floor", "extra MB", "÷ dense", "÷ three",
    "÷ strongest", "error",
)  # fmt: skip
LEGEND = (
    "Times are medians; ratios are time ÷ time in the same rounds, below 1 is faster. Every peer in its faster "
    "layout; ours: the backend that tucker_ops chooses. Extra MB: peak memory beyond arguments and output, of dense, "
    "three and ours."
)
FLOOR_LEGEND = (
    "Floor: the larger of the arithmetic of one pass at the machine's peak and its least traffic at the speed of a "
    "copy (for dense peers, those of the dense convolution); 100 % is the floor. % peak: GFLOP/s, counted as direct "
    "convolutions, of the dtype's peak. Strongest: the fastest that is not tucker_ops. Machine free: the part of the "
    "float32 peak that was to be had just before and just after the problem."
)
DETAILS_LEGEND = (
    "Error: relative RMS against float64. Time and memory as above, of this layout. GB/s: least traffic of the form, "
    "divided by the time."
)
LEAST_WIDTH = 128
# A peak that differs by more within a run was measured beside other work.
BUSY = 0.85


def print_rows(rows: Sequence[Row], console: Console | None = None) -> None:
    """A line or two a problem; then what was left out or refused, with the reason."""
    console = console or Console()
    console.width = max(console.width, LEAST_WIDTH)
    for configuration in _configurations(rows):
        console.print(_origin(configuration[0]), highlight=False)
        for line in _ceilings(configuration[0]):
            console.print(line, highlight=False)
        for columns, left, legend, lines in _tables(configuration):
            table = Table(box=SIMPLE_HEAD, pad_edge=False)
            for index, column in enumerate(columns):
                table.add_column(column, justify="left" if index < left else "right", no_wrap=True)
            for line in lines:
                table.add_row(*line)
            console.print(table)
            console.print(legend, highlight=False)
        for absence in _absences(configuration):
            console.print(absence, highlight=False, soft_wrap=True)


def markdown(rows: Sequence[Row]) -> str:
    """The same, and every peer in both layouts, for a file."""
    lines = ["# tucker_ops benchmark"]
    configurations = _configurations(rows)
    for configuration in configurations:
        if len(configurations) > 1:
            lines += ["", f"# Configuration {configuration[0]['configuration']}"]
        lines += ["", _origin(configuration[0]), *_ceilings(configuration[0])]
        for columns, left, legend, table in _tables(configuration):
            lines += ["", *_markdown_table(columns, left, table), "", legend]
        absences = _absences(configuration)
        if absences:
            lines += ["", "## Left out", "", *(f"- {absence}" for absence in absences)]
        lines += ["", "## All peers and layouts", "", DETAILS_LEGEND]
        for problem in _problems(configuration):
            measured = [_details(row) for row in problem if row["status"] == MEASURED]
            lines += ["", f"### {_title(problem[0])}", "", *_markdown_table(DETAILS, 2, measured)]
    return "\n".join(lines) + "\n"


def write(rows: Sequence[Row], destination: Path, *, force: bool = True, ratios: bool = True) -> None:
    """Write the files into `destination`, which appears whole or not at all.

    The picture of ratios only with `ratios`; the roofline only where the rows know their ceilings. An existing
    folder is replaced with `force`, if it holds nothing but earlier results.
    Raises OutputExistsError, or OutputWriteError where the disk refuses.
    """
    destination = Path(os.path.abspath(destination))
    check_replaceable(destination, force=force)

    def fill(folder: Path) -> None:
        (folder / JSON_NAME).write_text(as_json(rows), encoding="utf-8")
        (folder / TABLE_NAME).write_text(markdown(rows), encoding="utf-8")
        if ratios:
            figure(rows).savefig(folder / PLOT_NAME, dpi=150)
        if any(row.get("floor_ms") for row in rows):
            roofline(rows).savefig(folder / ROOFLINE_NAME, dpi=150)

    replace_folder(destination, fill)


def check_replaceable(destination: Path, *, force: bool) -> None:
    """Raise OutputExistsError where `write` would not write."""
    if not os.path.lexists(destination):
        return
    if not force:
        raise OutputExistsError(f"{destination} exists; choose another output or give --force")
    names = {JSON_NAME, TABLE_NAME, PLOT_NAME, ROOFLINE_NAME}
    if not destination.is_dir() or not {path.name for path in destination.iterdir()} <= names:
        raise OutputExistsError(
            f"{destination} holds more than earlier results and is not replaced; choose another output"
        )


def _configurations(rows: Sequence[Row]) -> list[list[Row]]:
    return _groups(rows, "configuration")


def _problems(rows: Sequence[Row]) -> list[list[Row]]:
    return _groups(rows, "problem")


def _groups(rows: Sequence[Row], field: str) -> list[list[Row]]:
    return [
        [row for row in rows if row[field] == value] for value in dict.fromkeys(row[field] for row in rows)
    ]


def _tables(rows: Sequence[Row]) -> list[tuple[Sequence[str], int, str, list[tuple[str, ...]]]]:
    """Columns, how many of them hold text, legend and lines; the second table only where ceilings are known."""
    problems = _problems(rows)
    tables = [(SUMMARY, 2, LEGEND, [_summary(problem) for problem in problems])]
    if any(row.get("floor_ms") for row in rows):
        tables.append((FLOOR_SUMMARY, 2, FLOOR_LEGEND, [_floor_summary(problem) for problem in problems]))
    return tables


def _title(row: Row) -> str:
    return f"{row['problem']}: {row['layer']}, {row['dtype']} ({row['where']})"


def _origin(row: Row) -> str:
    return (
        f"{row['cpu']}, {row['threads']} threads of {row['cores']} cores, load {row['load_average']} at the start; "
        f"torch {row['torch']} ({row['torch_isa']}), oneDNN {row['onednn']}, ONNX Runtime {row['onnxruntime'] or '–'}, "
        f"OpenVINO {row['openvino'] or '–'}; tucker_ops {row['tucker_ops']} "
        f"({row['tucker_ops_isa'] or 'no compiled kernels'}), commit {row['commit']}; {row['date']}"
    )


def _ceilings(row: Row) -> list[str]:
    """What the machine can do at most, each time it was measured, and whether that shows other work on it."""
    lines, peaks = [], []
    for measured in row.get("ceilings", ()):
        if measured["reason"]:
            lines.append(f"Ceilings unknown: {measured['reason']}")
            continue
        rates = [
            f"{dtype} {rate:.0f} GFLOP/s ({measured['loops'][dtype]})"
            for dtype, rate in measured["gflop_per_s"].items()
        ]
        rates.append(f"copy {measured['copy_gb_per_s']:.1f} GB/s")
        lines.append(f"Ceilings at {measured['date']}: {', '.join(rates)}.")
        peaks.append(measured["gflop_per_s"]["float32"])
    if peaks and min(peaks) < BUSY * max(peaks):
        lines.append(
            f"The machine was busy: its float32 peak moved between {min(peaks):.0f} and {max(peaks):.0f} GFLOP/s. "
            "Other work slows some peers far more than others; repeat the run on a free machine."
        )
    return lines


def _absences(rows: Sequence[Row]) -> list[str]:
    """What was not measured; peers of a problem that share a reason in one line."""
    grouped: dict[tuple[object, ...], dict[str, list[str]]] = {}
    for row in rows:
        if row["status"] != MEASURED:
            key = tuple(row[field] for field in ("problem", "status", "reason"))
            grouped.setdefault(key, {}).setdefault(str(row["peer"]), []).append(str(row["layout"]))
    lines = []
    for (problem, status, reason), peers in grouped.items():
        who = ", ".join(f"{peer} ({', '.join(layouts)})" for peer, layouts in peers.items())
        lines.append(f"{problem}: {who} {status}: {reason}")
    return lines + [
        f"{row['problem']}: {row['peer']} ({row['layout']}) no memory figure: {row['extra_peak_reason']}"
        for row in rows
        if row["status"] == MEASURED
        and row["extra_peak_bytes"] is None
        and row["extra_peak_reason"] != NO_PEAK.reason
    ]


def _summary(problem: Sequence[Row]) -> tuple[str, ...]:
    best = [row for row in problem if row["best_layout"]]
    dense = next((row for row in best if row["peer"] == DENSE), None)
    three = next((row for row in best if row["peer"] == THREE_CONVS), None)
    ours = _ours(problem)
    return (
        str(problem[0]["problem"]),
        str(problem[0]["layer"]),
        _number(dense, "median_ms"),
        _number(three, "ratio_to_dense"),
        _number(ours, "ratio_to_dense"),
        _number(ours, "ratio_to_three_convs"),
        " / ".join(_megabytes(row) for row in (dense, three, ours)),
    )


def _ours(problem: Sequence[Row]) -> Row | None:
    """The faster layout of the backend that tucker_ops chooses, or of the kernel where it was measured alone."""
    measured = [row for row in problem if row["status"] == MEASURED and str(row["peer"]).startswith(OURS)]
    chosen = [row for row in measured if row["automatic"]] or measured
    return min(chosen, key=lambda row: row["median_ms"], default=None)


def _floor_summary(problem: Sequence[Row]) -> tuple[str, ...]:
    ours = _ours(problem)
    key = next((row["strongest_peer"] for row in problem), None)
    strongest = next((row for row in problem if f"{row['peer']}-{row['layout']}" == key), None)
    return (
        str(problem[0]["problem"]),
        "–" if strongest is None else str(strongest["peer"]),
        _number(strongest, "median_ms"),
        _percent(strongest, "share_of_floor"),
        _number(ours, "floor_ms"),
        _number(ours, "median_ms"),
        _percent(ours, "share_of_floor"),
        _percent(ours, "share_of_peak"),
        _number(ours, "ratio_to_strongest"),
        _percent(problem[0], "free_share"),
    )


def _details(row: Row) -> tuple[str, ...]:
    return (
        str(row["peer"]),
        f"{row['layout']}{', faster' if row['best_layout'] else ''}",
        f"{row['median_ms']:.2f}",
        f"{row['p20_ms']:.2f}–{row['p80_ms']:.2f}",
        f"{row['gflop_per_s']:.1f}",
        _percent(row, "share_of_peak"),
        f"{row['gb_per_s']:.1f}",
        _percent(row, "share_of_floor"),
        _megabytes(row),
        _number(row, "ratio_to_dense"),
        _number(row, "ratio_to_three_convs"),
        _number(row, "ratio_to_strongest"),
        f"{row['relative_rms']:.1e}",
    )


def _number(row: Row | None, field: str) -> str:
    return "–" if row is None or row[field] is None else f"{row[field]:.2f}"


def _percent(row: Row | None, field: str) -> str:
    return "–" if row is None or row.get(field) is None else f"{row[field]:.0%}"


def _megabytes(row: Row | None) -> str:
    return "–" if row is None or row["extra_peak_bytes"] is None else f"{row['extra_peak_bytes'] / 1e6:.1f}"


def _markdown_table(header: Sequence[str], left: int, rows: Sequence[Sequence[str]]) -> list[str]:
    rule = "|---" * left + "|---:" * (len(header) - left) + "|"
    titles = [title.replace("\n", " ") for title in header]
    return [f"| {' | '.join(titles)} |", rule, *(f"| {' | '.join(row)} |" for row in rows)]
