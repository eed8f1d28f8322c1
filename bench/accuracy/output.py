"""The study's table and plot."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.accuracy.ct import SIZEABLE

Row = Mapping[str, Any]
COLOURS = {
    "weber2024": "#b04a4a",
    "budget": "#8a8a8a",
    "calibrated": "#1f6fb4",
    "calibrated, ranks by 4": "#7fb2d9",
    "weber2024, refined": "#d99a9a",
    "calibrated, refined": "#1d7a4d",
}


def markdown(
    rows: Sequence[Row],
    provenance: Mapping[str, Any],
    settings: Mapping[str, Any],
    minutes: float,
    *,
    resumed: bool = False,
) -> str:
    """The whole result as a page; `minutes` of the run, or of the steps that are kept where it was `resumed`."""
    machine = (
        f"{provenance['cpu']} ({provenance['tucker_ops_isa']}), {provenance['cores']} cores, "
        f"torch {provenance['torch']}"
    )
    precisions = sorted({row["precision"] for row in rows if row.get("steps")})
    lines = [
        "# Accuracy after compression",
        "",
        f"`make accuracy`, commit {provenance['commit']}, {machine}; "
        + (
            f"resumed, its longer steps took {minutes:.0f} minutes." if resumed else f"{minutes:.0f} minutes."
        ),
        f"Fine-tuning ran in {'; '.join(precisions)}. Steps of refining ran in {_refined_in(rows)}. "
        "All else ran in fp32.",
        f"Settings: {', '.join(f'{key} {value}' for key, value in settings.items())}.",
        "",
        "weber2024 is the published policy: every convolution, one factor, weights alone. budget shares the same "
        "number of parameters out by the weights alone; calibrated does by the Fisher information of unlabelled "
        "images, ranks of the channels on multiples of 8, or of 4 where it says so; both may give a kernel a rank of "
        "its taps, which pays for larger ranks of the channels. same MACs has the published policy's "
        "multiply-accumulates instead of its parameters, and no ranks of taps. refined: all weights trained "
        "together towards the dense model's output on the images of the calibration. No labels but in fine-tuning.",
        "",
        "## Hippocampus: 39 validation cases, mean Dice of both classes",
        "",
        "Loss is against the dense model, with a 95 % bootstrap interval over cases; p is Holm-corrected over the "
        "classes, the smaller of the two. NSD at 1 mm. Negative losses are gains.",
        "",
        "| at DF | policy | steps | parameters | MACs | Dice | NSD | loss | 95 % interval | worst class | p |",
        "|---|---|---:|---:|---:|---:|---:|---:|---|---:|---:|",
        *(_hippocampus(row) for row in rows if row["data"] == "hippocampus"),
        "",
        "## CT, 24 organs: agreement with the dense model's output",
        "",
        "Calibrated on the first half (left to right) of one CT; Dice with the dense output, mean and worst of the "
        "classes that are there. unseen: all voxels of the CT, each in the output of a model calibrated on the half "
        "that it is not in; blank where that was not measured. NSD at 3 mm. Rows with steps were trained on by "
        "label-free distillation on the first half.",
        "",
        "| at DF | policy | steps | parameters | MACs | whole: mean | worst | NSD | unseen: mean | worst |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
        *(_ct(row) for row in rows if row["data"] == "ct"),
        "",
        "Each half by itself, judged in the output of the model calibrated on the other one, and the whole in that of "
        "the model calibrated on the second half. voxels: how many the dense model gives the worst class there; worst "
        f"of {SIZEABLE}: the worst of the classes with at least {SIZEABLE}.",
        "",
        f"| at DF | policy | steps | second half: mean | worst | voxels | worst of {SIZEABLE} "
        f"| first half: mean | worst | voxels | worst of {SIZEABLE} | whole, from the second: mean | worst |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
        *(_halves(row) for row in rows if row["data"] == "ct"),
        "",
        "## Latency budgets: hippocampus, one patch, fused, fp32",
        "",
        "Asked for, measured while planning, and measured again afterwards, in turns.",
        "",
        "| asked, ms | planned | again | again ÷ asked | dense | parameters | MACs |",
        "|---:|---:|---:|---:|---:|---:|---:|",
        *(_latency(row) for row in rows if row["data"] == "latency"),
        "",
    ]
    return "\n".join(lines)


def _size(row: Row) -> str:
    return f"{row['of_dense']:.1%} | {row['macs_of_dense']:.1%}"


def _refined_in(rows: Sequence[Row]) -> str:
    """The precisions, and how many rows were refined in each, in words."""
    counts = Counter(
        precision for row in rows if not row.get("steps") for precision in row.get("refined_in", ())
    )
    return (
        " and ".join(f"{precision} (rows: {count})" for precision, count in sorted(counts.items())) or "none"
    )


def _hippocampus(row: Row) -> str:
    factor = "" if row["policy"] == "dense" else row["factor"]
    head = f"| {factor} | {row['policy']} | {row['steps'] or ''} | {_size(row)}"
    loss = " | | | |"
    if "mean_drop" in row:
        low, high = row["mean_drop_interval"]
        p = min(c["p_holm"] for c in row["classes"].values())
        loss = (
            f" {row['mean_drop']:.4f} | {low:+.4f} to {high:+.4f} | {row['worst_class_drop']:.4f} | {p:.2g} |"
        )
    return f"{head} | {row['dice']:.4f} | {row['nsd']:.4f} |{loss}"


def _ct(row: Row) -> str:
    unseen = " | " if row["unseen"] is None else f"{row['unseen']:.4f} | {row['unseen_worst']:.4f}"
    return (
        f"| {row['factor']} | {row['policy']} | {row['steps'] or ''} | {_size(row)} | {row['agreement']:.4f} | "
        f"{row['worst']:.4f} | {row['nsd']:.4f} | {unseen} |"
    )


def _halves(row: Row) -> str:
    cells = []
    for half in ("second", "first"):
        found = row["halves"][half]
        cells.append(
            " |  |  | "
            if found is None
            else f"{found['mean']:.4f} | {found['worst']:.4f} | {found['worst_voxels']} | {found['worst_sizeable']:.4f}"
        )
    whole = " | " if row["swapped"] is None else f"{row['swapped']:.4f} | {row['swapped_worst']:.4f}"
    return f"| {row['factor']} | {row['policy']} | {row['steps'] or ''} | {' | '.join(cells)} | {whole} |"


def _latency(row: Row) -> str:
    times = " | ".join(f"{row[key]:.1f}" for key in ("asked_ms", "planned_ms", "again_ms"))
    return f"| {times} | {row['again_ms'] / row['asked_ms']:.3f} | {row['dense_ms']:.1f} | {_size(row)} |"


def plot(rows: Sequence[Row], path: Path) -> None:
    """Dice (hippocampus) and agreement (CT) against the share of parameters, a line a policy."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    # nnU-Net's trainer, which ran before, sets fonts of its own for the whole process.
    with pyplot.style.context("default", after_reset=True):
        figure = _figure(rows)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}")
        figure.savefig(partial, dpi=120, format="png")
    partial.replace(path)
    pyplot.close(figure)


def _figure(rows: Sequence[Row]) -> Any:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for axis, data, key, title in (
        (axes[0], "hippocampus", "dice", "Hippocampus, 39 validation cases: Dice"),
        (axes[1], "ct", "unseen", "CT, 24 organs: agreement with dense, unseen"),
    ):
        for policy, colour in COLOURS.items():
            for tuned, style in ((False, "-"), (True, ":")):
                points = sorted(
                    (100 * row["of_dense"], row[key])
                    for row in rows
                    if row["data"] == data
                    and row["policy"] == policy
                    and bool(row["steps"]) == tuned
                    and row[key] is not None
                )
                if points:
                    label = f"{policy}, fine-tuned" if tuned else policy
                    axis.plot(*zip(*points, strict=True), style, marker="o", color=colour, label=label)
        for row in rows:
            if row["data"] == data and row["policy"] == "dense":
                name = "dense, fine-tuned" if row["steps"] else "dense"
                axis.axhline(
                    row[key], color="black", linestyle=":" if row["steps"] else "--", linewidth=1, label=name
                )
        axis.set(xlabel="parameters, % of the dense model's", title=title, xscale="log")
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    return figure
