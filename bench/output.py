"""Rows as a table on the screen, and as results.json, results.md and results.png in a folder."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from bench.measure import MEASURED
from bench.peers import DENSE, THREE_CONVS
from bench.plot import figure
from tucker_ops.errors import OutputExistsError, OutputWriteError

Row = dict[str, object]

JSON_NAME, TABLE_NAME, PLOT_NAME = "results.json", "results.md", "results.png"
SUMMARY = ("problem", "layer", "dense\nms", "three\n÷ dense", "ours\n÷ dense", "ours\n÷ three", "extra\nMB")
DETAILS = ("peer", "layout", "ms", "20–80 %", "GFLOP/s", "extra MB", "÷ dense", "÷ three", "error")
LEGEND = (
    "Times are medians; ratios are time ÷ time in the same rounds, below 1 is faster. Every peer in its faster "
    "layout; ours: the backend that tucker_ops chooses. Extra MB: peak memory beyond arguments and output, of dense, "
    "three and ours."
)
DETAILS_LEGEND = "Error: relative RMS against float64. Time and memory as above, of this layout."
LEAST_WIDTH = 128


def print_rows(rows: Sequence[Row], console: Console | None = None) -> None:
    """One line a problem; then what was left out or refused, with the reason."""
    console = console or Console()
    console.width = max(console.width, LEAST_WIDTH)
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(SUMMARY):
        table.add_column(column, justify="left" if index < 2 else "right", no_wrap=True)
    for problem in _problems(rows):
        table.add_row(*_summary(problem))
    console.print(_origin(rows[0]), highlight=False)
    console.print(table)
    console.print(LEGEND, highlight=False)
    for absence in _absences(rows):
        console.print(absence, highlight=False, soft_wrap=True)


def markdown(rows: Sequence[Row]) -> str:
    """The same, and every peer in both layouts, for a file."""
    lines = ["# tucker_ops benchmark", "", _origin(rows[0]), ""]
    lines += _markdown_table(SUMMARY, 2, [_summary(problem) for problem in _problems(rows)])
    lines += ["", LEGEND]
    absences = _absences(rows)
    if absences:
        lines += ["", "## Left out", "", *(f"- {absence}" for absence in absences)]
    lines += ["", "## All peers and layouts", "", DETAILS_LEGEND]
    for problem in _problems(rows):
        measured = [_details(row) for row in problem if row["status"] == MEASURED]
        lines += ["", f"### {_title(problem[0])}", "", *_markdown_table(DETAILS, 2, measured)]
    return "\n".join(lines) + "\n"


def as_json(rows: Sequence[Row]) -> str:
    """A JSON list with one row a line, so that a change of one row is a change of one line."""
    return "[\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n]\n"


def write(rows: Sequence[Row], destination: Path, *, force: bool = True) -> None:
    """Write the three files into `destination`, which appears whole or not at all.

    An existing folder is replaced with `force`, if it holds nothing but earlier results.
    Raises OutputExistsError, or OutputWriteError where the disk refuses.
    """
    destination = Path(os.path.abspath(destination))
    check_replaceable(destination, force=force)
    temporary = None
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", dir=destination.parent))
        temporary.chmod(0o755)
        (temporary / JSON_NAME).write_text(as_json(rows), encoding="utf-8")
        (temporary / TABLE_NAME).write_text(markdown(rows), encoding="utf-8")
        figure(rows).savefig(temporary / PLOT_NAME, dpi=150)
        if destination.exists():
            shutil.rmtree(destination)
        os.rename(temporary, destination)
    except OSError as error:
        raise OutputWriteError(
            f"{destination} cannot be written ({error.strerror or error}); choose another output"
        ) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def check_replaceable(destination: Path, *, force: bool) -> None:
    """Raise OutputExistsError where `write` would not write."""
    if not os.path.lexists(destination):
        return
    if not force:
        raise OutputExistsError(f"{destination} exists; choose another output or give --force")
    names = {JSON_NAME, TABLE_NAME, PLOT_NAME}
    if not destination.is_dir() or not {path.name for path in destination.iterdir()} <= names:
        raise OutputExistsError(
            f"{destination} holds more than earlier results and is not replaced; choose another output"
        )


def _problems(rows: Sequence[Row]) -> list[list[Row]]:
    return [
        [row for row in rows if row["problem"] == name] for name in dict.fromkeys(r["problem"] for r in rows)
    ]


def _title(row: Row) -> str:
    return f"{row['problem']}: {row['layer']}, {row['dtype']} ({row['where']})"


def _origin(row: Row) -> str:
    return (
        f"{row['cpu']}, {row['threads']} threads of {row['cores']} cores, load {row['load_average']} at the start; "
        f"torch {row['torch']} ({row['torch_isa']}), oneDNN {row['onednn']}; tucker_ops {row['tucker_ops']} "
        f"({row['tucker_ops_isa'] or 'no compiled kernels'}), commit {row['commit']}; {row['date']}"
    )


def _absences(rows: Sequence[Row]) -> list[str]:
    """What was not measured; layouts of a peer that share a reason in one line."""
    grouped: dict[tuple[object, ...], list[str]] = {}
    for row in rows:
        if row["status"] != MEASURED:
            key = tuple(row[field] for field in ("problem", "peer", "status", "reason"))
            grouped.setdefault(key, []).append(str(row["layout"]))
    return [
        f"{problem}: {peer} ({', '.join(layouts)}) {status}: {reason}"
        for (problem, peer, status, reason), layouts in grouped.items()
    ] + [
        f"{row['problem']}: {row['peer']} ({row['layout']}) no memory figure: {row['extra_peak_reason']}"
        for row in rows
        if row["status"] == MEASURED and row["extra_peak_bytes"] is None
    ]


def _summary(problem: Sequence[Row]) -> tuple[str, ...]:
    best = [row for row in problem if row["best_layout"]]
    dense = next((row for row in best if row["peer"] == DENSE), None)
    three = next((row for row in best if row["peer"] == THREE_CONVS), None)
    chosen = [row for row in problem if row["automatic"] and row["status"] == MEASURED]
    ours = min(chosen, key=lambda row: row["median_ms"], default=None)
    return (
        str(problem[0]["problem"]),
        str(problem[0]["layer"]),
        _number(dense, "median_ms"),
        _number(three, "ratio_to_dense"),
        _number(ours, "ratio_to_dense"),
        _number(ours, "ratio_to_three_convs"),
        " / ".join(_megabytes(row) for row in (dense, three, ours)),
    )


def _details(row: Row) -> tuple[str, ...]:
    return (
        str(row["peer"]),
        f"{row['layout']}{', faster' if row['best_layout'] else ''}",
        f"{row['median_ms']:.2f}",
        f"{row['p20_ms']:.2f}–{row['p80_ms']:.2f}",
        f"{row['gflop_per_s']:.1f}",
        _megabytes(row),
        _number(row, "ratio_to_dense"),
        _number(row, "ratio_to_three_convs"),
        f"{row['relative_rms']:.1e}",
    )


def _number(row: Row | None, field: str) -> str:
    return "–" if row is None or row[field] is None else f"{row[field]:.2f}"


def _megabytes(row: Row | None) -> str:
    return "–" if row is None or row["extra_peak_bytes"] is None else f"{row['extra_peak_bytes'] / 1e6:.1f}"


def _markdown_table(header: Sequence[str], left: int, rows: Sequence[Sequence[str]]) -> list[str]:
    rule = "|---" * left + "|---:" * (len(header) - left) + "|"
    titles = [title.replace("\n", " ") for title in header]
    return [f"| {' | '.join(titles)} |", rule, *(f"| {' | '.join(row)} |" for row in rows)]
