"""Tables that the command line prints; they fit a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from tucker_ops.backends.autotune import Tuning
from tucker_ops.convert import Plan
from tucker_ops.nnunet.explain import LayerExplanation
from tucker_ops.nnunet.manifest import Manifest
from tucker_ops.types import ConvSpec, Problem, Ranks, ranks_text

if TYPE_CHECKING:
    from tucker_ops.backends.triton.tuning import TritonTuning

WEAKEST = 3


def plan_table(plan: Plan, errors: Mapping[str, float] | None = None) -> Group:
    """One row per convolution: shape, ranks, parameters and millions of MACs as planned, relative error of
    the weights; below, why layers are dense. `errors` are the achieved ones; by default the expected. Of a
    calibrated plan it is the expected loss in nats instead, as errors of weights then say little.
    """
    calibrated = plan.calibration is not None
    table = _table("params", "MMAC", "nats" if calibrated else "error")
    for layer in plan.layers:
        error = (errors or {}).get(layer.name, layer.expected_error) if layer.ranks else None
        if calibrated:
            error = layer.expected_loss
        numbers = (f"{layer.cost.params:,}", f"{layer.cost.macs / 1e6:,.0f}", _number(error))
        table.add_row(layer.name, _shape(layer.spec), _ranks(layer.ranks), *numbers)
    dense = ((layer.reason or "", layer.name) for layer in plan.layers if not layer.ranks)
    return Group(table, *_reasons("Dense", dense), *plan.notes)


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
    for fold, outcome in manifest.refined_folds().items():
        before, after = (f"{outcome[key]:.3g} nats a voxel" for key in ("before", "after"))
        table.add_row(f"refined, fold {fold}", before, after if not outcome["reason"] else "not kept", "")
    label, errors = "largest errors", manifest.mean_errors()
    if plan.calibration is not None:
        label, errors = "largest losses", {x.name: x.expected_loss for x in plan.layers if x.ranks}
        table.add_row("expected loss", "", f"{sum(errors.values()):.3g} nats", "")
    worst = sorted(errors.items(), key=lambda item: -item[1])[:WEAKEST]
    for number, (name, error) in enumerate(worst):
        table.add_row(label if number == 0 else "", name, f"{error:.3f}", "")
    return table


def explanation_table(layers: Sequence[LayerExplanation]) -> Group:
    """One row per convolution in the order of running; below, why layers are dense and who runs the rest."""
    table = _table("error", "backend")
    for layer in layers:
        row = (layer.name, _shape(layer.spec), _ranks(layer.ranks), _number(layer.error), layer.backend)
        table.add_row(*row)
    dense = ((layer.reason, layer.name) for layer in layers if not layer.ranks)
    runs = ((f"{layer.backend}: {layer.backend_reason}", layer.name) for layer in layers if layer.ranks)
    return Group(table, *_reasons("Dense", dense), *_reasons("Run by", runs))


def _table(*numbers: str) -> Table:
    table = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), pad_edge=False)
    # In a narrow terminal names take a second line, so that no figure is cut.
    table.add_column("layer", overflow="fold")
    for name in ("shape", "ranks", *numbers):
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _shape(spec: ConvSpec) -> str:
    arrow = "⇑" if spec.transposed else "→"
    return f"{spec.in_channels}{arrow}{spec.out_channels} {'×'.join(map(str, spec.kernel_size))}"


def _ranks(ranks: Ranks | None) -> str:
    return ranks_text(ranks) if ranks else "dense"


def _number(error: float | None) -> str:
    return "" if error is None else f"{error:.3f}"


def _reasons(label: str, pairs: Iterable[tuple[str, str]]) -> list[Padding]:
    """Each reason once, with the layers it holds for."""
    layers: dict[str, list[str]] = {}
    for reason, name in pairs:
        layers.setdefault(reason, []).append(name)
    texts = [
        Text(f"{label}, {reason}: {names[0] if len(names) == 1 else f'{len(names)} layers'}")
        for reason, names in layers.items()
    ]
    return [Padding(text, (0, 0, 0, 1)) for text in texts]


def tuning_table(tunings: Sequence[Tuning]) -> Table:
    """One row per problem: the stages one by one, what the cost model would take, and the best, in microseconds."""
    table = Table(box=SIMPLE_HEAD)
    table.add_column("layer")
    for name in ("stages µs", "model µs", "best µs", "best"):
        table.add_column(name, justify="right")
    for tuning in tunings:
        one_pass, form, chunk = tuning.best
        how = f"one pass {form}/{chunk}" if one_pass else "stages"
        times = (tuning.times[0, 0, 0], tuning.times[tuning.modelled], tuning.times[tuning.best])
        table.add_row(_layer(tuning.problem), *(f"{time:.1f}" for time in times), how)
    return table


def triton_tuning_table(tunings: Sequence[TritonTuning]) -> Table:
    """One row per problem: forward and gradient in the shipped configurations and in the best, in microseconds."""
    table = Table(box=SIMPLE_HEAD)
    table.add_column("layer")
    for name in ("forward µs", "best µs", "gradient µs", "best µs"):
        table.add_column(name, justify="right")
    for tuning in tunings:
        # The first kernel was timed with the defaults around it, the second with the best of the first.
        forward, best = tuning.times["reduce"], tuning.times["convolve"]
        gradient = tuning.times["outer"]
        times = (
            next(iter(forward.values())),
            best[tuning.best.convolve],
            next(iter(gradient.values())),
            gradient[tuning.best.outer],
        )
        table.add_row(_layer(tuning.problem), *(f"{time:.1f}" for time in times))
    return table


def _layer(problem: Problem) -> str:
    size = "×".join(map(str, problem.input_size))
    return f"{problem.in_channels}→{problem.out_channels} r{problem.rank_in},{problem.rank_out} @{size}"
