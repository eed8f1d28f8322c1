"""Commands on segmentations: predict and evaluate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tucker_ops.cli.options import (
    CheckpointOption,
    DeviceOption,
    FoldOption,
    MaxClassDropOption,
    MaxDropOption,
    TrustOption,
    gate_of,
)
from tucker_ops.cli.terminal import case_progress, console
from tucker_ops.errors import ConfigError


def predict(
    model: Annotated[Path, typer.Option("--model", "-m", help="Model folder, dense or compressed.")],
    images: Annotated[Path, typer.Option("--input", "-i", help="Folder of images named CASE_0000.nii.gz.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the segmentations.")],
    fold: FoldOption = None,
    checkpoint: CheckpointOption = "checkpoint_final.pth",
    device: DeviceOption = "cpu",
    mirroring: Annotated[
        bool, typer.Option("--mirroring/--no-mirroring", help="Average over mirrored passes.")
    ] = True,
    step_size: Annotated[
        float, typer.Option("--step-size", help="Step of the tiles, a fraction of the patch.")
    ] = 0.5,
    case: Annotated[
        list[str] | None, typer.Option("--case", help="Predict this case only; repeat it.")
    ] = None,
    precision: Annotated[
        str,
        typer.Option(
            "--precision",
            help="Of the fused network on the CPU: fp32, bf16, or auto, which takes bf16 "
            "where the processor has it and the first tile agrees with fp32.",
        ),
    ] = "auto",
    fuse: Annotated[
        bool, typer.Option("--fuse/--no-fuse", help="Fold norms and activations into the convolutions.")
    ] = True,
    force: Annotated[bool, typer.Option("--force", help="Overwrite segmentations that exist.")] = False,
    trust_checkpoint: TrustOption = False,
) -> None:
    """Segment images through nnU-Net's own predictor.

    Example: tucker-ops predict -m hippocampus_half -i imagesTs -o segmentations --no-mirroring
    """
    from tucker_ops.nnunet.predict import predict_folder

    with case_progress("Predicting") as progress:
        summary = predict_folder(
            model, images, output, folds=fold, checkpoint=checkpoint, device=device, mirroring=mirroring,
            step_size=step_size, cases=case, precision=precision, fused=fuse, overwrite=force,
            progress=progress, trust=trust_checkpoint,
        )  # fmt: skip
    memory = f"{summary.peak_rss_bytes / 1e9:.2f} GB of memory"
    if summary.peak_cuda_bytes:
        memory += f", {summary.peak_cuda_bytes / 1e9:.2f} GB on the GPU"
    console().print(
        f"{len(summary.cases)} cases in {summary.seconds:.1f} s, at most {memory}; written to "
        f"{summary.output}"
    )
    console().print(
        f"{summary.network_seconds:.1f} s of it in the network: {summary.inference}", soft_wrap=True
    )


def evaluate(
    prediction: Annotated[Path, typer.Option("--pred", "-p", help="Folder of segmentations.")],
    reference: Annotated[Path, typer.Option("--reference", "-r", help="Folder of labels.")],
    dense: Annotated[
        Path | None,
        typer.Option("--dense", help="Segmentations of the dense model: show the agreement with them, too."),
    ] = None,
    dataset_json: Annotated[
        Path | None,
        typer.Option("--dataset-json", help="Names the classes [default: the one in or above --pred]."),
    ] = None,
    allow_missing: Annotated[
        bool, typer.Option("--allow-missing", help="Let labels without a prediction pass.")
    ] = False,
    surface: Annotated[
        str,
        typer.Option(
            "--surface",
            help="Tolerance of the surface Dice in mm; voxel: the largest spacing; none: leave it out.",
        ),
    ] = "voxel",
    max_drop: MaxDropOption = None,
    max_class_drop: MaxClassDropOption = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write all figures to this file, too.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file of --json.")] = False,
) -> None:
    """Dice (counted by nnU-Net's own code) and surface Dice per class and case.

    With --dense also what was lost against the dense model, class by class, with 95 % intervals and p-values
    corrected for the number of classes; --max-drop and --max-class-drop then decide on the exit code: 1 where more
    was lost. A class that a case lacks in both segmentations does not count in the means.

    Example: tucker-ops evaluate -p segmentations -r labelsTs --dense segmentations_dense --max-drop 0.01
    """
    from tucker_ops.nnunet.compare import compare
    from tucker_ops.nnunet.evaluate import evaluate_folder, write_json
    from tucker_ops.nnunet.output import check_file
    from tucker_ops.nnunet.report.tables import case_table, comparison_of_classes, evaluation_table

    gate = gate_of(max_drop, max_class_drop)
    if gate is not None and dense is None:
        raise ConfigError(
            "--max-drop and --max-class-drop compare with the dense model; give its output with --dense"
        )
    tolerance = None if surface == "none" else surface if surface == "voxel" else _millimetres(surface)

    if json_file is not None:
        check_file(json_file, force=force)
    options = {"dataset_json": dataset_json, "allow_missing": allow_missing, "nsd_tolerance": tolerance}
    evaluations = {}
    for name, folder in {"labels": reference, "dense": dense}.items():
        if folder is None:
            continue
        with case_progress(f"Comparing with {name}") as progress:
            evaluations[name] = evaluate_folder(prediction, folder, progress=progress, **options)
    for name, evaluation in evaluations.items():
        console().print(case_table(evaluation, f"Dice against {name}", most_columns=8).rich())
    console().print(evaluation_table({f"against {name}": e for name, e in evaluations.items()}).rich())
    results = dict(evaluations)
    if dense is not None:
        with case_progress("Comparing the dense model with labels") as progress:
            of_dense = evaluate_folder(
                dense, reference, progress=progress, **options | {"nsd_tolerance": None}
            )
        results["comparison"] = compare(of_dense, evaluations["labels"])
        console().print(comparison_of_classes(results["comparison"]).rich())
    if json_file is not None:
        write_json(results, json_file, force=force)
    failures = [] if gate is None else gate.failures(results["comparison"])
    for failure in failures:
        console(stderr=True).print(f"[red]Too much is lost:[/red] {failure}", soft_wrap=True)
    if failures:
        raise typer.Exit(1)


def _millimetres(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"--surface {text!r} given; it is a number of millimetres, voxel or none") from None
