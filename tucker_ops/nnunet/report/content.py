"""What the report says: the table of sizes, accuracy and speed, and the page's sections."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from tucker_ops.nnunet.evaluate import Evaluation
from tucker_ops.nnunet.manifest import Manifest
from tucker_ops.nnunet.report.layers import Layer
from tucker_ops.nnunet.report.page import Section
from tucker_ops.nnunet.report.speed import Forward
from tucker_ops.nnunet.report.tables import (
    Quantity,
    TextTable,
    case_table,
    comparison_table,
    evaluation_table,
    layer_table,
)

DENSE = "dense"


def summary_table(
    title: str,
    names: Sequence[str],
    manifests: Sequence[Manifest],
    against_labels: Mapping[str, Evaluation],
    against_dense: Mapping[str, Evaluation],
    forward: Mapping[str, Forward],
    prediction_seconds: Mapping[str, float],
    network_seconds: Mapping[str, float],
    peak_memory_bytes: Mapping[str, int],
) -> TextTable:
    """Size, accuracy and speed of each model beside the dense one; rows nobody has figures for are absent."""
    totals = [manifests[0].dense, *(m.tucker for m in manifests)]
    columns = [DENSE, *names]
    quantities = [
        Quantity("parameters, million", [t.parameters / 1e6 for t in totals], "{:.3f}"),
        Quantity("MACs, billion", [t.macs / 1e9 for t in totals], "{:.2f}"),
        Quantity("weights on disk, MB", [t.weight_bytes / 1e6 for t in totals], "{:.2f}"),
    ]
    if against_labels:
        classes = list(next(iter(against_labels.values())).classes)
        found = [against_labels.get(n) for n in columns]
        for label in classes:
            values = [None if e is None else float(e.per_class[label]) for e in found]
            quantities.append(Quantity(f"Dice {label}", values, "{:.4f}", "difference"))
        quantities.append(
            Quantity("Dice, mean of classes", [e and e.mean for e in found], "{:.4f}", "difference")
        )
    if against_dense:
        agreement = [against_dense.get(n) for n in columns]
        values = [e and e.mean for e in agreement]
        quantities.append(Quantity("agreement with dense", values, "{:.4f}", ""))
    if forward:
        rows = {"one forward pass, ms": [forward[n].stock for n in columns]}
        if all(forward[n].fused for n in columns):
            rows["nothing fused, ms"] = [forward[n].not_fused for n in columns]
            rows["all fused, ms"] = [forward[n].fused for n in columns]
        for title_of_row, times in rows.items():
            quantities.append(Quantity(title_of_row, [t.median for t in times], "{:.0f}"))
    for title_of_row, seconds in (
        ("prediction, s / case", prediction_seconds),
        ("in the network, s", network_seconds),
    ):
        if seconds:
            quantities.append(Quantity(title_of_row, [seconds.get(n) for n in columns], "{:.2f}"))
    if peak_memory_bytes:
        values = [peak_memory_bytes[n] / 1e6 if n in peak_memory_bytes else None for n in columns]
        quantities.append(Quantity("peak memory, MB", values, "{:.0f}"))
    return comparison_table(title, columns, quantities)


def sections(
    summary: TextTable,
    manifests: Sequence[Manifest],
    names: Sequence[str],
    layers: Mapping[str, Sequence[Layer]],
    against_labels: Mapping[str, Evaluation],
    against_dense: Mapping[str, Evaluation],
    figures: Collection[str],
    missing: Mapping[str, str],
    overlay_text: str,
) -> list[Section]:
    """The page's sections; those whose figure or table could not be made hold the reason from `missing`."""

    def shown(name: str) -> tuple[str, ...]:
        return (name,) if name in figures else ()

    first = manifests[0]
    shape = "×".join(map(str, first.input_shape[2:]))
    stored = ", ".join(dict.fromkeys(m.dtype for m in manifests))
    about = (
        f"MACs and the forward pass are for one patch of {shape} voxels; the latter as nnU-Net's own predictor runs "
        "each model, compressed ones fused. Agreement is the mean Dice with the "
        "dense model's output. Change is a ratio to dense, of Dice a difference. Weights are stored as "
        f"{stored}."
    )
    result = [
        Section("Summary", about, [summary]),
        Section("One slice", overlay_text, figures=shown("overlay.png"), missing=missing.get("overlay")),
        Section("Accuracy", figures=shown("accuracy.png"), missing=missing.get("accuracy against the labels"),
                tables=[evaluation_table(against_labels)] if against_labels else ()),
        Section("Agreement with the dense model", missing=missing.get("agreement with the dense model"),
                tables=[evaluation_table(against_dense)] if against_dense else ()),
        Section("Speed", figures=shown("speed.png"), missing=missing.get("forward time")),
        Section("Size and arithmetic of each layer", figures=shown("cost_per_layer.png")),
        Section("Ranks and errors of each layer", figures=shown("ranks_and_errors.png"),
                tables=[layer_table(name, rows) for name, rows in layers.items()]),
    ]  # fmt: skip
    if against_labels:
        tables = [case_table(e, name) for name, e in against_labels.items()]
        result.append(Section("Dice of each case against the labels", tables=tables))
    rows = [
        [n, *(m.versions.get(k, "–") for k in first.versions)] for n, m in zip(names, manifests, strict=True)
    ]
    versions = TextTable("Compressed with", ["model", *first.versions], rows)
    hashes = TextTable("Compressed from", ["checkpoint", "SHA-256"], list(first.source_sha256.items()))
    result.append(Section("Provenance", first.source, [versions, hashes]))
    return result
