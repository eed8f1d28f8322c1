"""Tables that the command line prints."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from tucker_ops.nnunet.explain import LayerExplanation
from tucker_ops.nnunet.manifest import Manifest

WEAKEST = 3


def summary_table(manifest: Manifest) -> Table:
    """Dense against compressed: parameters, MACs, bytes, layers, and the layers with the largest errors."""
    plan, dense, tucker = manifest.plan, manifest.dense, manifest.tucker
    table = Table(title=manifest.source)
    table.add_column("")
    for name in ("dense", "compressed", "ratio"):
        table.add_column(name, justify="right")
    rows = (
        ("parameters", dense.parameters, tucker.parameters, 1e6, "M"),
        ("MACs per patch", dense.macs, tucker.macs, 1e9, "G"),
        ("weights", dense.weight_bytes, tucker.weight_bytes, 1e6, "MB"),
        ("checkpoint on disk", dense.file_bytes, tucker.file_bytes, 1e6, "MB"),
    )
    for label, before, after, unit, name in rows:
        table.add_row(
            label, f"{before / unit:.2f} {name}", f"{after / unit:.2f} {name}", f"{after / before:.1%}"
        )
    table.add_row("factorised layers", "", f"{len(plan.ranks)} of {len(plan.layers)}", "")
    worst = sorted(manifest.mean_errors().items(), key=lambda item: -item[1])[:WEAKEST]
    for number, (name, error) in enumerate(worst):
        table.add_row("largest errors" if number == 0 else "", name, f"{error:.3f}", "")
    return table


def explanation_table(layers: Sequence[LayerExplanation]) -> Table:
    """One row per convolution in the order of running."""
    table = Table(title="Convolutions of one patch, in the order in which they run")
    table.add_column("layer", overflow="fold")
    for name in ("kernel", "channels", "input", "ranks", "error", "backend"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("why")
    for layer in layers:
        table.add_row(
            layer.name,
            layer.kind,
            "{}→{}".format(*layer.channels),
            "×".join(map(str, layer.input_size)),
            "{}, {}".format(*layer.ranks) if layer.ranks else "dense",
            "" if layer.error is None else f"{layer.error:.3f}",
            layer.backend,
            layer.backend_reason if layer.ranks else f"dense: {layer.reason}",
        )
    return table
