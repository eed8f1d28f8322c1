"""The rows in one picture: time relative to the dense convolution, and peak extra memory."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter

from bench.measure import MEASURED
from bench.peers import DENSE, THREE_CONVS

# Colours of Okabe and Ito, which stay apart for colour-blind readers; the shape says the same again. The
# reference backend is three convolutions once more and is not drawn.
STYLES = {DENSE: ("#000000", "s"), THREE_CONVS: ("#E69F00", "^"), "tucker_ops:cpu": ("#0072B2", "o")}
LABELS = {
    DENSE: "dense convolution",
    THREE_CONVS: "three convolutions",
    "tucker_ops:cpu": "tucker_ops, one pass",
}
INCHES_A_ROW = 0.46
LEAST_MEGABYTES = 0.1
BAND = "#F3F3F3"


def figure(rows: Sequence[dict[str, object]]) -> Figure:
    """One line a problem; each peer has its own height in it, filled where its layout is channels-last."""
    problems = list(dict.fromkeys(row["problem"] for row in rows))
    result = Figure(figsize=(11.5, 1.9 + INCHES_A_ROW * len(problems)), layout="constrained")
    time, memory = result.subplots(1, 2, sharey=True, width_ratios=(1.35, 1))
    names = {}
    for line, problem in enumerate(problems):
        shown = [row for row in rows if row["problem"] == problem and row["peer"] in STYLES]
        first = next(row for row in rows if row["problem"] == problem)
        dtype = "" if first["dtype"] == "float32" else f" {first['dtype']}"
        names[line] = f"{problem}\n{first['layer']}{dtype}"
        if line % 2 == 0:
            for axes in (time, memory):
                axes.axhspan(line - 0.5, line + 0.5, color=BAND, zorder=0, linewidth=0)
        for row in shown:
            if row["status"] == MEASURED:
                _draw(time, memory, line, row)
        if not any(row["ratio_to_dense"] for row in shown):
            time.text(1.05, line, "dense left out: no ratio", va="center", fontsize=7, style="italic")
    for axes in (time, memory):
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
    time.axvline(1, color="#000000", linewidth=0.8, linestyle=":")
    time.xaxis.set_minor_formatter(
        FuncFormatter(lambda value, _: f"{value:g}" if _leads(value, "25") else "")
    )
    time.tick_params(axis="x", which="minor", labelsize=8)
    time.set_ylim(len(problems) - 0.5, -0.5)
    time.set_yticks(list(names), list(names.values()), fontsize=8)
    time.set_xlabel("time ÷ dense convolution in its faster layout (log; left is faster)")
    memory.set_xlabel("peak memory beyond arguments and output, MB (log)")
    result.legend(handles=_handles(), loc="outside upper center", ncols=5, frameon=False, fontsize=9)
    result.supxlabel(_origin(rows[0]), fontsize=7.5, color="#555555")
    return result


def _draw(time, memory, line: int, row: dict[str, object]) -> None:
    colour, marker = STYLES[row["peer"]]
    height = line + 0.26 * (list(STYLES).index(row["peer"]) - 1)
    fill = colour if row["layout"] == "channels_last" else "white"
    style = {"color": colour, "marker": marker, "markersize": 6, "markerfacecolor": fill, "zorder": 3}
    ratio = row["ratio_to_dense"]
    if ratio is not None:
        time.plot(ratio, height, **style)
    if row["extra_peak_bytes"] is not None:
        memory.plot(max(row["extra_peak_bytes"] / 1e6, LEAST_MEGABYTES), height, **style)


def _handles() -> list[Line2D]:
    peers = [
        Line2D([], [], color=colour, marker=marker, linestyle="none", label=LABELS[name])
        for name, (colour, marker) in STYLES.items()
    ]
    layouts = [
        Line2D([], [], color="#555555", marker="D", markerfacecolor=fill, linestyle="none", label=label)
        for fill, label in (("white", "contiguous"), ("#555555", "channels-last"))
    ]
    return peers + layouts


def _leads(value: float, digits: str) -> bool:
    return f"{value:e}"[0] in digits


def _origin(row: dict[str, object]) -> str:
    return (
        f"{row['cpu']}, {row['threads']} threads, load {row['load_average']} · torch {row['torch']} "
        f"({row['torch_isa']}), oneDNN {row['onednn']} · tucker_ops {row['commit']} ({row['tucker_ops_isa']}) · "
        f"{str(row['date'])[:10]}"
    )
