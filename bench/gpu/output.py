"""Rows as one table, and as JSON and Markdown in a folder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from bench.folders import as_json, replace_folder
from bench.gpu.clock import IN_A_ROW
from bench.measure import MEASURED
from tucker_ops.errors import OutputExistsError

Row = dict[str, object]

JSON_NAME, TABLE_NAME = "results.json", "results.md"
SUMMARY = (
    "case", "layer", "numbers", "ours", "µs", "quartiles", "in a row µs", "model µs", "floor µs", "% floor", "÷ copy",
    "dense", "three", "dense compiled", "three compiled", "strongest other", "peak MB ours / dense", "error",
    "asked for",
)  # fmt: skip
DETAILS = ("peer", "layout", "µs", "quartiles", "in a row µs", "dense ÷ it", "three ÷ it", "peak MB", "error")
TEXT_COLUMNS = 4
LEGEND = (
    "Every time is a median, and every ratio other ÷ ours in the same rounds, its median over them: above 1, ours is "
    "faster. dense, three: one convolution or three (of a network: as nnU-Net runs it, fp16 autocast), the faster "
    "layout; compiled: by torch.compile. Times of op and block are the kernels' from a cold L2 cache on, those of "
    "networks one call's from an idle GPU on, launches included; in a row: a call's share of {in_a_row} issued one "
    "after the other. Floor: the larger of the least traffic at the speed of the copy and the arithmetic of one pass, "
    "counted as direct convolutions, at the rate of the matrix product; ÷ copy: time ÷ that of copying input and "
    "output once. model: what the cost model predicted. Error: relative RMS against float64. Peak: memory allocated "
    "beyond weights and input."
)


def with_floors(rows: Sequence[Row], ceilings: Row | None, origin: Row) -> list[Row]:
    """Rows with floor_us, share_of_floor and times_copy, where the ceilings are known, what was asked, and `origin`."""
    done = []
    for row in rows:
        if row["part"] != "ceilings" and row.get("status"):
            row = {**row, **_floors(row, ceilings or {})}
            row["verdicts"] = verdicts(row) if row.get("shown") else []
        done.append({**row, **origin})
    return done


def _floors(row: Row, ceilings: Row) -> Row:
    copy, rate = ceilings.get("copy_gb_per_s"), (ceilings.get("tflop_per_s") or {}).get(row.get("kind"))
    taken = row.get("median_us")
    floor = bound = times_copy = None
    if copy and rate and row.get("floor_bytes"):
        traffic, arithmetic = row["floor_bytes"] / copy / 1e3, 2 * row["floor_macs"] / rate / 1e6
        floor, bound = max(traffic, arithmetic), "memory" if traffic >= arithmetic else "arithmetic"
    if copy and taken and row.get("copied_bytes"):
        times_copy = taken / (row["copied_bytes"] / copy / 1e3)
    share = floor / taken if floor and taken else None
    return {"floor_us": floor, "floor_bound": bound, "share_of_floor": share, "times_copy": times_copy}


def verdicts(row: Row) -> list[str]:
    """Each target with the figure, and whether it was met."""
    lines = []
    for name, wanted in (row.get("targets") or {}).items():
        at_most, value = True, row.get("times_copy")
        if name == "ms":
            value = row["median_us"] and row["median_us"] / 1e3
        elif name == "peak":
            value = row.get("peak_share")
        elif name != "floor":
            at_most, value = False, row.get(f"{name}_ratio")
        words = {"floor": "÷ copy", "ms": "ms", "peak": "of dense's peak"}.get(name, name.replace("_", " "))
        sign = "≤" if at_most else "≥"
        if value is None:
            lines.append(f"{words} {sign} {wanted:g}: not measured")
            continue
        met = value <= wanted if at_most else value >= wanted
        lines.append(f"{words} {sign} {wanted:g}: {value:.2f} {'met' if met else 'MISSED'}")
    return lines


def summary(rows: Sequence[Row]) -> list[str]:
    """The one table: a line for each of ours that is shown, measured or not."""
    lines = [_summary_line(row) for row in rows if row.get("shown")]
    return _markdown(SUMMARY, TEXT_COLUMNS, lines)


def absences(rows: Sequence[Row]) -> list[str]:
    """What was refused, failed or left out, with the reason."""
    return [
        f"- {row.get('case', row['part'])}{', ' + row['kind'] if row.get('kind') else ''}: "
        f"{row.get('peer', 'the part')} ({row.get('layout', 'all')}) {row['status']}: {row['reason']}"
        for row in rows
        if row.get("status") not in (None, MEASURED)
    ]


def headline(rows: Sequence[Row]) -> list[str]:
    """The card and its ceilings."""
    if not rows:
        return ["Nothing was measured."]
    row = rows[0]
    lines = [
        f"{row.get('gpu') or row['device']} ({row.get('multiprocessors')} multiprocessors, capability "
        f"{row.get('capability')}), driver {row['driver']}, clocks as found: SM {row['sm_mhz']} of "
        f"{row['most_sm_mhz']} MHz, memory {row['memory_mhz']} MHz; torch {row['torch']}, CUDA {row['cuda']}, "
        f"cuDNN {row['cudnn']}, Triton {row['triton']}; tucker_ops {row['tucker_ops']}, "
        f"commit {row['commit']}; {row['date']}"
    ]
    for row in rows:
        if row["part"] == "ceilings" and "copy_gb_per_s" in row:
            rates = [
                f"{kind} {'unknown' if rate is None else f'{rate:.0f} TFLOP/s'}"
                for kind, rate in row["tflop_per_s"].items()
            ]
            copy = row["copy_gb_per_s"]
            copied = "unknown" if copy is None else f"{copy:.0f} GB/s, read and written"
            lines.append(f"Ceilings: copy {copied}; matrix product {', '.join(rates)}.")
            lines += [f"- {name}: {reason}" for name, reason in row["reasons"].items()]
    return lines


def details(rows: Sequence[Row]) -> list[str]:
    """Every peer of every case."""
    lines, cases = [], {}
    for row in rows:
        if row.get("status") == MEASURED:
            cases.setdefault((row["part"], row["case"], row["layer"], row["kind"]), []).append(row)
    for (part, case, layer, kind), peers in cases.items():
        lines += ["", f"### {part} {case}: {layer}, {kind}", ""]
        lines += _markdown(DETAILS, 2, [_details_line(row) for row in peers])
    return lines


def markdown(rows: Sequence[Row]) -> str:
    parts = ["# tucker_ops on an NVIDIA GPU", "", *headline(rows), "", *summary(rows), ""]
    parts += [LEGEND.format(in_a_row=IN_A_ROW)]
    missing = absences(rows)
    parts += ["", "## Left out", "", *missing] if missing else []
    return "\n".join([*parts, "", "## All peers and layouts", *details(rows)]) + "\n"


def as_text(rows: Sequence[Row]) -> str:
    """What is printed: the table comes last."""
    lines = [*headline(rows), *absences(rows), LEGEND.format(in_a_row=IN_A_ROW), "", *summary(rows)]
    return "\n".join(lines)


def write(rows: Sequence[Row], destination: Path) -> None:
    """Writes both files into `destination`, which appears whole or not at all and replaces earlier results only."""
    destination = Path(os.path.abspath(destination))
    if os.path.lexists(destination):
        known = {JSON_NAME, TABLE_NAME}
        if not destination.is_dir() or not {path.name for path in destination.iterdir()} <= known:
            raise OutputExistsError(
                f"{destination} holds more than earlier results and is not replaced; choose another output"
            )

    def fill(folder: Path) -> None:
        (folder / JSON_NAME).write_text(as_json(rows), encoding="utf-8")
        (folder / TABLE_NAME).write_text(markdown(rows), encoding="utf-8")

    replace_folder(destination, fill)


def _summary_line(row: Row) -> tuple[str, ...]:
    begin = (str(row["case"]), str(row["layer"]), str(row["kind"]), _how(row))
    if row["status"] != MEASURED:
        return (*begin, str(row["status"]), *("–",) * (len(SUMMARY) - 6), "; ".join(row["verdicts"]))
    strongest = "–"
    if row["strongest_ratio"] is not None:
        strongest = f"{row['strongest_ratio']:.2f} ({row['strongest_peer']})"
    return (
        *begin,
        _number(row["median_us"], 1),
        _quartiles(row),
        _number(row["in_a_row_us"], 1),
        _number(row.get("predicted_us"), 1),
        _number(row["floor_us"], 1),
        "–" if row["share_of_floor"] is None else f"{row['share_of_floor']:.0%} ({row['floor_bound']})",
        _number(row["times_copy"], 2),
        *(
            _number(row[f"{name}_ratio"], 2)
            for name in ("dense", "three", "dense_compiled", "three_compiled")
        ),
        strongest,
        f"{_megabytes(row['peak_bytes'])} / {_megabytes(row['dense_peak_bytes'])}",
        f"{row['relative_rms']:.1e}",
        "; ".join(row["verdicts"]),
    )


def _how(row: Row) -> str:
    return f"{row['peer']}: {row['how']}" if row.get("how") else str(row["peer"])


def _details_line(row: Row) -> tuple[str, ...]:
    return (
        str(row["peer"]), str(row["layout"]), _number(row["median_us"], 1), _quartiles(row),
        _number(row["in_a_row_us"], 1), _number(row["dense_ratio"], 2), _number(row["three_ratio"], 2),
        _megabytes(row["peak_bytes"]), f"{row['relative_rms']:.1e}",
    )  # fmt: skip


def _quartiles(row: Row) -> str:
    return "–" if row["q1_us"] is None else f"{row['q1_us']:.1f}–{row['q3_us']:.1f}"


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _megabytes(value: int | None) -> str:
    return "–" if value is None else f"{value / 1e6:.0f}"


def _markdown(header: Sequence[str], left: int, lines: Sequence[Sequence[str]]) -> list[str]:
    rule = "|---" * left + "|---:" * (len(header) - left) + "|"
    return [f"| {' | '.join(header)} |", rule, *(f"| {' | '.join(line)} |" for line in lines)]
