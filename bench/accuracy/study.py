"""The rows of the study. Each is kept, so that an interrupted run goes on where it was."""

from __future__ import annotations

import copy
import statistics
from pathlib import Path
from typing import Any

import torch

from bench.accuracy.ct import CT
from bench.accuracy.hippocampus import Hippocampus
from bench.accuracy.part import Log, Options
from bench.accuracy.sources import Sources
from tucker_ops.convert import CompressionConfig, substitute
from tucker_ops.fused import fuse
from tucker_ops.nnunet.compress import input_shape, load_network
from tucker_ops.nnunet.folder import read_model_folder
from tucker_ops.nnunet.latency import plan_for_latency, time_network
from tucker_ops.nnunet.output import write_file
from tucker_ops.nnunet.study import Study


def run(sources: Sources, folder: Path, options: Options, log: Log) -> list[dict[str, Any]]:
    """All rows: what was compressed, how, to how many parameters, and what it lost."""
    study = Study(folder)
    rows = Hippocampus(sources, folder, options, study, log).rows()
    rows += CT(sources, folder, options, study, log).rows()
    return rows + latency_rows(sources.hippocampus, options, log)


def latency_rows(model: Path, options: Options, log: Log) -> list[dict[str, Any]]:
    """Budgets of milliseconds, and what the networks planned for them take when timed again afterwards, in turns."""
    source = read_model_folder(model)
    network, shape = load_network(source, 0).requires_grad_(False), input_shape(source)
    x = torch.randn(shape)
    dense_ms, _ = time_network(fuse(copy.deepcopy(network), precision="fp32"), x)
    rows, networks = [], []
    for share in options.latency_shares:
        log(f"latency: {share:g} of {dense_ms:.1f} ms")
        plan, found = plan_for_latency(network, CompressionConfig(latency_ms=share * dense_ms), shape)
        networks.append(fuse(substitute(copy.deepcopy(network), plan.ranks).eval(), precision="fp32"))
        rows.append(
            {
                "data": "latency",
                "name": f"latency-{share:g}",
                "asked_ms": found.asked_ms,
                "planned_ms": found.measured_ms,
                "dense_ms": found.dense_ms,
                "of_dense": plan.compressed.params / plan.dense.params,
                "macs_of_dense": plan.compressed.macs / plan.dense.macs,
            }
        )
    times = [[time_network(n, x)[0] for n in networks] for _ in range(3)]
    for index, row in enumerate(rows):
        row["again_ms"] = statistics.median(turn[index] for turn in times)
    return rows


def write_rows(rows: list[dict[str, Any]], path: Path) -> None:
    """Rows as JSON, one a line, without the values of every case."""
    from bench.folders import as_json

    kept = [{key: value for key, value in row.items() if key != "dice_per_case"} for row in rows]
    write_file(path, as_json(kept).encode(), force=True)
