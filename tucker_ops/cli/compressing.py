"""Commands that make smaller models: compress, sweep, and explain, which tells what was done."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from tucker_ops.cli.options import (
    AlignOption,
    CalibrateCaseOption,
    CalibratePatchesOption,
    CalibrateSplitsOption,
    CheckpointOption,
    DeviceOption,
    FoldOption,
    MaxClassDropOption,
    MaxDropOption,
    MinRankOption,
    ModelArgument,
    NoTapRanksOption,
    RefineOption,
    RefinePrecisionOption,
    TrustOption,
    calibration_set,
    gate_of,
    refinement_of,
    tap_ranks_of,
)
from tucker_ops.cli.terminal import case_progress, console
from tucker_ops.errors import ConfigError


class Policy(str, Enum):
    default = "default"
    weber2024 = "weber2024"


class StoredDtype(str, Enum):
    source = "source"
    float32 = "float32"
    float16 = "float16"


def compress(
    source: ModelArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the compressed model.")],
    factor: Annotated[
        float | None,
        typer.Option("--factor", help="Rank of each layer as a fraction of its channels [default: 0.5]."),
    ] = None,
    energy: Annotated[
        float | None, typer.Option("--energy", help="Share of the singular-value energy to keep.")
    ] = None,
    params: Annotated[
        float | None,
        typer.Option("--params", help="Budget of parameters: a fraction up to 1, else a number."),
    ] = None,
    macs: Annotated[
        float | None,
        typer.Option("--macs", help="Budget of multiply-accumulates: a fraction up to 1, else a number."),
    ] = None,
    latency_ms: Annotated[
        float | None,
        typer.Option(
            "--latency-ms", help="Budget of milliseconds for one patch, timed on this machine's CPU."
        ),
    ] = None,
    min_rank: MinRankOption = 8,
    align: AlignOption = 8,
    no_tap_ranks: NoTapRanksOption = False,
    policy: Annotated[
        Policy,
        typer.Option(
            "--policy",
            help="weber2024: the published rule, every convolution at --factor, for comparison.",
        ),
    ] = Policy.default,
    calibrate: Annotated[
        Path | None,
        typer.Option(
            "--calibrate",
            help="Folder of a few unlabelled images (or cases that nnU-Net preprocessed) by which to judge what "
            "matters; alone, it means --macs 0.5. Takes minutes and loses far less.",
        ),
    ] = None,
    calibrate_case: CalibrateCaseOption = None,
    calibrate_splits: CalibrateSplitsOption = None,
    calibrate_patches: CalibratePatchesOption = None,
    refine: RefineOption = None,
    refine_precision: RefinePrecisionOption = None,
    check_images: Annotated[
        Path | None,
        typer.Option("--check-images", help="Images to predict with both models before anything is written."),
    ] = None,
    check_labels: Annotated[
        Path | None,
        typer.Option(
            "--check-labels", help="Their labels; without, what counts is agreement with the dense model."
        ),
    ] = None,
    max_drop: MaxDropOption = None,
    max_class_drop: MaxClassDropOption = None,
    mark: Annotated[
        bool,
        typer.Option(
            "--mark", help="Write a model that loses more, marked so in its manifest, all the same."
        ),
    ] = False,
    fold: FoldOption = None,
    checkpoint: CheckpointOption = "checkpoint_final.pth",
    dtype: Annotated[
        StoredDtype, typer.Option("--dtype", help="Of the stored weights: the source's, float32 or float16.")
    ] = StoredDtype.source,
    skip_transposed: Annotated[
        bool, typer.Option("--skip-transposed", help="Leave transposed convolutions dense.")
    ] = False,
    keep_expensive: Annotated[
        bool, typer.Option("--keep-expensive", help="Factorise layers that do not get cheaper, too.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and write nothing.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier output.")] = False,
    trust_checkpoint: TrustOption = False,
) -> None:
    """Compress a trained model into a folder that stock nnU-Net predicts with.

    SOURCE may also be a folder of several models, as TotalSegmentator keeps them; their names survive.

    Example: tucker-ops compress nnUNet_results/Dataset004_Hippocampus/nnUNetTrainer__nnUNetPlans__3d_fullres
    -o hippocampus_small --calibrate imagesTr --params 0.12
    """
    import torch

    from tucker_ops.convert import CompressionConfig
    from tucker_ops.nnunet.check import AccuracyCheck
    from tucker_ops.nnunet.compress import compress_tree, plan_folder
    from tucker_ops.nnunet.folder import find_model_folders
    from tucker_ops.nnunet.tables import plan_table, summary_table

    budget = {"factor": factor, "energy": energy, "params": params, "macs": macs, "latency_ms": latency_ms}
    budget = {name: value for name, value in budget.items() if value is not None}
    if policy is Policy.weber2024:
        if (
            set(budget) - {"factor"}
            or calibrate
            or (min_rank, align) != (8, 8)
            or no_tap_ranks
            or skip_transposed
            or keep_expensive
        ):
            raise ConfigError(
                "--policy weber2024 fixes every choice but --factor; leave out the other options"
            )
        config = CompressionConfig.weber2024(budget.get("factor", 0.5))
    else:
        config = CompressionConfig(
            **(budget or ({"macs": 0.5} if calibrate else {"factor": 0.5})),
            min_rank=min_rank,
            align=align,
            tap_ranks=tap_ranks_of(no_tap_ranks, params),
            skip_transposed=skip_transposed,
            only_if_cheaper=not keep_expensive,
        )
    images = calibration_set(calibrate, calibrate_case, calibrate_patches, calibrate_splits)
    refinement = refinement_of(refine, refine_precision, images)
    gate = gate_of(max_drop, max_class_drop)
    check = None
    if check_images is not None:
        from tucker_ops.nnunet.compare import Gate

        check = AccuracyCheck(check_images, check_labels, gate or Gate(), mark=mark)
    elif gate is not None or check_labels is not None or mark:
        raise ConfigError(
            "--max-drop, --max-class-drop, --check-labels and --mark need images; give --check-images"
        )
    if dry_run:
        for model in find_model_folders(source) or [source]:
            with case_progress("Planning") as progress:
                plan = plan_folder(
                    model, config, folds=fold, checkpoint=checkpoint, trust=trust_checkpoint,
                    calibrate=images, progress=progress,
                )  # fmt: skip
            console().print(f"[bold]{model}[/bold]", plan_table(plan), sep="\n")
        return
    with case_progress("Compressing") as progress:
        manifests = compress_tree(
            source, output, config, folds=fold, checkpoint=checkpoint,
            dtype=None if dtype is StoredDtype.source else getattr(torch, dtype.value),
            calibrate=images, refine=refinement, check=check, force=force, trust=trust_checkpoint, progress=progress,
        )  # fmt: skip
    for path, manifest in manifests.items():
        console().print(plan_table(manifest.plan, manifest.mean_errors()))
        console().print(summary_table(manifest))
        for fold, outcome in manifest.refined_folds().items():
            if outcome["reason"]:
                console().print(f"Fold {fold} not refined: {outcome['reason']}", soft_wrap=True)
            else:
                console().print(f"Fold {fold} refined in {outcome['precision']}", soft_wrap=True)
        for failure in (manifest.check or {}).get("failures", ()):
            console().print(f"[red]Marked:[/red] {failure}", soft_wrap=True)
        console().print(
            f"Written to {path}; nnU-Net predicts with it as with any other model folder.", soft_wrap=True
        )


def sweep(
    model: ModelArgument,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder of models, predictions, table and plot.")
    ],
    images: Annotated[Path, typer.Option("--images", help="Images to judge on, named as for prediction.")],
    labels: Annotated[
        Path | None,
        typer.Option(
            "--labels", help="Their labels; without, what counts is agreement with the dense model."
        ),
    ] = None,
    params: Annotated[str | None, typer.Option("--params", help="Budgets, as 0.5,0.3,0.1.")] = None,
    macs: Annotated[str | None, typer.Option("--macs", help="Budgets, as 0.5,0.3,0.1.")] = None,
    factor: Annotated[str | None, typer.Option("--factor", help="Factors, as 0.5,0.3.")] = None,
    latency_ms: Annotated[
        str | None, typer.Option("--latency-ms", help="Budgets of milliseconds a patch.")
    ] = None,
    weber2024: Annotated[
        str | None, typer.Option("--weber2024", help="Factors of the published rule.")
    ] = None,
    min_rank: MinRankOption = 8,
    align: AlignOption = 8,
    no_tap_ranks: NoTapRanksOption = False,
    calibrate: Annotated[
        Path | None,
        typer.Option("--calibrate", help="A few unlabelled images by which to judge what matters."),
    ] = None,
    calibrate_case: CalibrateCaseOption = None,
    calibrate_splits: CalibrateSplitsOption = None,
    calibrate_patches: CalibratePatchesOption = None,
    refine: RefineOption = None,
    refine_precision: RefinePrecisionOption = None,
    fold: Annotated[
        str | None, typer.Option("--fold", "-f", help="Fold to use [default: the first].")
    ] = None,
    checkpoint: CheckpointOption = "checkpoint_final.pth",
    device: DeviceOption = "cpu",
    trust_checkpoint: TrustOption = False,
) -> None:
    """Compress to several budgets, judge each, and show what is lost against parameters, MACs and time.

    Interrupted, the same command goes on where it was; further budgets add to what is there.

    Example: tucker-ops sweep dense_model -o sweep --images imagesTs --labels labelsTs --calibrate imagesTr
    --params 0.5,0.3,0.1
    """
    from tucker_ops.convert import CompressionConfig
    from tucker_ops.nnunet.sweep import sweep_folder
    from tucker_ops.nnunet.sweep.output import sweep_table, write_sweep

    asked = {"params": params, "macs": macs, "factor": factor, "latency_ms": latency_ms}
    configs = [
        CompressionConfig(
            **{policy: value},
            min_rank=min_rank,
            align=align,
            tap_ranks=tap_ranks_of(no_tap_ranks, params),
        )
        for policy, text in asked.items()
        for value in _numbers(policy, text)
    ]
    configs += [CompressionConfig.weber2024(value) for value in _numbers("weber2024", weber2024)]
    data = calibration_set(calibrate, calibrate_case, calibrate_patches, calibrate_splits)
    with case_progress("Sweeping") as progress:
        result = sweep_folder(
            model, output, images, configs, labels=labels, calibrate=data,
            refine=refinement_of(refine, refine_precision, data), fold=fold,
            checkpoint=checkpoint, device=device, trust=trust_checkpoint, progress=progress,
        )  # fmt: skip
    write_sweep(result)
    console().print(sweep_table(result).rich())
    console().print(f"Written to {output}: sweep.md, sweep.png, and the models", soft_wrap=True)


def explain(
    model: ModelArgument,
    fold: FoldOption = None,
    checkpoint: CheckpointOption = "checkpoint_final.pth",
    device: DeviceOption = "cpu",
    trust_checkpoint: TrustOption = False,
) -> None:
    """Show each layer's ranks and error, or why it is dense, and which backend would run it on this machine.

    Example: tucker-ops explain hippocampus_half --device cpu
    """
    import tucker_ops
    from tucker_ops.nnunet.explain import explain_folder
    from tucker_ops.nnunet.tables import explanation_table

    layers = explain_folder(model, folds=fold, checkpoint=checkpoint, device=device, trust=trust_checkpoint)
    console().print(explanation_table(layers))
    console().print(str(tucker_ops.backends()), highlight=False)


def _numbers(name: str, text: str | None) -> list[float]:
    try:
        return [float(part) for part in text.split(",")] if text else []
    except ValueError:
        raise ConfigError(
            f"--{name.replace('_', '-')} {text!r} given; it is numbers with commas between"
        ) from None
