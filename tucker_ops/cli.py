"""The command line: ``tucker-ops compress | finetune | sweep | predict | evaluate | report | explain | ...``.

Heavy imports live inside the commands, so that ``tucker-ops --help`` answers at once.
"""

from __future__ import annotations

import os
import signal
import sys
import warnings
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tucker_ops.errors import ConfigError, TuckerOpsError

if TYPE_CHECKING:
    from rich.console import Console

    from tucker_ops.nnunet.calibration import CalibrationSet
    from tucker_ops.nnunet.compare import Gate

app = typer.Typer(
    name="tucker-ops",
    help="Compress a trained nnU-Net with Tucker decomposition and run it with stock nnU-Net.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


class Policy(str, Enum):
    default = "default"
    weber2024 = "weber2024"


class StoredDtype(str, Enum):
    source = "source"
    float32 = "float32"
    float16 = "float16"


ModelArgument = Annotated[
    Path, typer.Argument(help="nnU-Net model folder: dataset.json, plans.json, fold_*/.")
]
FoldOption = Annotated[
    list[str] | None,
    typer.Option("--fold", "-f", help="Fold to use; repeat it for several. Default: all there are."),
]
CheckpointOption = Annotated[
    str, typer.Option("--checkpoint", help="Name of the checkpoint file in each fold.")
]
DeviceOption = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1 or mps.")]
TrustOption = Annotated[
    bool,
    typer.Option(
        "--trust-checkpoint", help="Read a checkpoint by pickle, which can run code, if it needs that."
    ),
]


MaxDropOption = Annotated[
    float | None, typer.Option("--max-drop", help="Mean Dice over classes that may be lost [default: 0.01].")
]
MaxClassDropOption = Annotated[
    float | None, typer.Option("--max-class-drop", help="Dice that any one class may lose [default: 0.03].")
]


def _gate(max_drop: float | None, max_class_drop: float | None) -> Gate | None:
    """The gate that either option asks for, None where neither does."""
    from tucker_ops.nnunet.compare import Gate

    given = {"max_drop": max_drop, "max_class_drop": max_class_drop}
    given = {name: value for name, value in given.items() if value is not None}
    return Gate(**given) if given else None


def _calibration_set(
    folder: Path | None, cases: list[str] | None, patches: int | None, splits: Path | None
) -> CalibrationSet | None:
    """What --calibrate and its companions ask for."""
    from tucker_ops.nnunet.calibration import CalibrationSet

    given = {"cases": tuple(cases) if cases else None, "patches": patches, "splits": splits}
    given = {name: value for name, value in given.items() if value is not None}
    if folder is not None:
        return CalibrationSet(folder, **given)
    if given:
        raise ConfigError(
            f"--calibrate-{', --calibrate-'.join(given)} is of the images of --calibrate, which is missing; give the "
            "folder"
        )
    return None


def _extents(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(
            f"--patch {text!r} given; it is whole numbers with commas between, as 64,64,64"
        ) from None


def _millimetres(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"--surface {text!r} given; it is a number of millimetres, voxel or none") from None


def console(stderr: bool = False) -> Console:
    from rich.console import Console

    return Console(stderr=stderr)


def _print_version(value: bool) -> None:
    if value:
        import tucker_ops

        typer.echo(f"tucker-ops {tucker_ops.__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop."),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error (or set TUCKER_OPS_DEBUG=1).")
    ] = False,
) -> None:
    if debug:
        os.environ["TUCKER_OPS_DEBUG"] = "1"


@app.command()
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
    min_rank: Annotated[int, typer.Option("--min-rank", help="Smallest rank.")] = 8,
    align: Annotated[int, typer.Option("--align", help="Ranks are multiples of this.")] = 8,
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
    calibrate_case: Annotated[
        list[str] | None,
        typer.Option("--calibrate-case", help="Calibrate on this case only; repeat it [default: all]."),
    ] = None,
    calibrate_splits: Annotated[
        Path | None,
        typer.Option(
            "--calibrate-splits", help="splits_final.json: calibrate each fold on its training cases only."
        ),
    ] = None,
    calibrate_patches: Annotated[
        int | None,
        typer.Option("--calibrate-patches", help="Random patches, at least one a case [default: 16]."),
    ] = None,
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
            skip_transposed=skip_transposed,
            only_if_cheaper=not keep_expensive,
        )
    images = _calibration_set(calibrate, calibrate_case, calibrate_patches, calibrate_splits)
    gate = _gate(max_drop, max_class_drop)
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
            calibrate=images, check=check, force=force, trust=trust_checkpoint, progress=progress,
        )  # fmt: skip
    for path, manifest in manifests.items():
        console().print(plan_table(manifest.plan, manifest.mean_errors()))
        console().print(summary_table(manifest))
        for failure in (manifest.check or {}).get("failures", ()):
            console().print(f"[red]Marked:[/red] {failure}", soft_wrap=True)
        console().print(
            f"Written to {path}; nnU-Net predicts with it as with any other model folder.", soft_wrap=True
        )


@app.command()
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


@app.command()
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


@app.command()
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

    gate = _gate(max_drop, max_class_drop)
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


@app.command()
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
    min_rank: Annotated[int, typer.Option("--min-rank", help="Smallest rank.")] = 8,
    align: Annotated[int, typer.Option("--align", help="Ranks are multiples of this.")] = 8,
    calibrate: Annotated[
        Path | None,
        typer.Option("--calibrate", help="A few unlabelled images by which to judge what matters."),
    ] = None,
    calibrate_case: Annotated[
        list[str] | None, typer.Option("--calibrate-case", help="Calibrate on this case only; repeat it.")
    ] = None,
    calibrate_splits: Annotated[
        Path | None,
        typer.Option(
            "--calibrate-splits", help="splits_final.json: calibrate on the fold's training cases only."
        ),
    ] = None,
    calibrate_patches: Annotated[
        int | None,
        typer.Option("--calibrate-patches", help="Random patches, at least one a case [default: 16]."),
    ] = None,
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
        CompressionConfig(**{policy: value}, min_rank=min_rank, align=align)
        for policy, text in asked.items()
        for value in _numbers(policy, text)
    ]
    configs += [CompressionConfig.weber2024(value) for value in _numbers("weber2024", weber2024)]
    data = _calibration_set(calibrate, calibrate_case, calibrate_patches, calibrate_splits)
    with case_progress("Sweeping") as progress:
        result = sweep_folder(
            model, output, images, configs, labels=labels, calibrate=data, fold=fold, checkpoint=checkpoint,
            device=device, trust=trust_checkpoint, progress=progress,
        )  # fmt: skip
    write_sweep(result)
    console().print(sweep_table(result).rich())
    console().print(f"Written to {output}: sweep.md, sweep.png, and the models", soft_wrap=True)


def _numbers(name: str, text: str | None) -> list[float]:
    try:
        return [float(part) for part in text.split(",")] if text else []
    except ValueError:
        raise ConfigError(
            f"--{name.replace('_', '-')} {text!r} given; it is numbers with commas between"
        ) from None


@app.command()
def finetune(
    model: ModelArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the fine-tuned model.")],
    teacher: Annotated[
        Path | None, typer.Option("--teacher", help="The dense model, to distil from. Strongly advised.")
    ] = None,
    preprocessed: Annotated[
        Path | None,
        typer.Option("--preprocessed", help="nnUNet_preprocessed/DatasetNNN_Name, where nnU-Net trained."),
    ] = None,
    images: Annotated[
        Path | None, typer.Option("--images", help="Or images, named as for prediction; preprocessed first.")
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option(
            "--labels", help="Labels of --images; without, the teacher's own output stands for them."
        ),
    ] = None,
    splits: Annotated[
        Path | None,
        typer.Option("--splits", help="splits_final.json: train on the fold's training cases only."),
    ] = None,
    case: Annotated[
        list[str] | None, typer.Option("--case", help="Train on this case only; repeat it.")
    ] = None,
    steps: Annotated[int, typer.Option("--steps", help="Steps of the optimizer.")] = 300,
    learning_rate: Annotated[float, typer.Option("--learning-rate", help="The schedule's peak.")] = 3e-4,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", help="Of all processes together [default: the plans'].")
    ] = None,
    distill: Annotated[
        float | None,
        typer.Option(
            "--distill", help="Weight of the distance to the teacher's output [default: 1 with one]."
        ),
    ] = None,
    supervise: Annotated[float, typer.Option("--supervise", help="Weight of nnU-Net's own loss.")] = 1.0,
    features: Annotated[
        float, typer.Option("--features", help="Weight of the distance to the teacher's encoder features.")
    ] = 0.0,
    patch: Annotated[
        str | None,
        typer.Option(
            "--patch", help="Extents like 64,64,64 [default: the plans'], where memory or time is short."
        ),
    ] = None,
    precision: Annotated[
        str,
        typer.Option("--precision", help="On the CPU: fp32, bf16, or auto, what the processor does well."),
    ] = "auto",
    processes: Annotated[
        int, typer.Option("--processes", help="Of distributed training: GPUs, or parts of the CPU.")
    ] = 1,
    seed: Annotated[int, typer.Option("--seed", help="Of sampling and augmentation.")] = 0,
    fold: FoldOption = None,
    checkpoint: CheckpointOption = "checkpoint_final.pth",
    device: DeviceOption = "cpu",
    restart: Annotated[
        bool, typer.Option("--restart", help="Forget what an interrupted run left, instead of resuming it.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier output.")] = False,
    trust_checkpoint: TrustOption = False,
) -> None:
    """Train a compressed model on with nnU-Net's trainer, taught by the dense model it was made from.

    Interrupted, the same command goes on where it was; what it needs for that lies in OUTPUT.training until the end.

    Example: tucker-ops finetune hippocampus_small -o hippocampus_tuned --teacher dense_model
    --preprocessed nnUNet_preprocessed/Dataset004_Hippocampus --steps 300
    """
    from tucker_ops.nnunet.training import FinetuneSettings, TrainingSet, finetune_folder

    settings = FinetuneSettings(
        steps=steps, learning_rate=learning_rate, batch_size=batch_size, supervise=supervise, features=features,
        distill=(1.0 if teacher is not None else 0.0) if distill is None else distill, precision=precision, seed=seed,
        patch_size=None if patch is None else _extents(patch),
    )  # fmt: skip
    data = TrainingSet(preprocessed, images, labels, splits, tuple(case) if case else None)
    with case_progress("Fine-tuning") as progress:
        summary = finetune_folder(
            model, output, data, settings, teacher=teacher, folds=fold, checkpoint=checkpoint, device=device,
            processes=processes, force=force, restart=restart, trust=trust_checkpoint, progress=progress,
        )  # fmt: skip
    for number, names in summary.cases.items():
        resumed = f", resumed at step {summary.resumed_at[number]}" if number in summary.resumed_at else ""
        console().print(f"fold {number}: {summary.steps} steps on {len(names)} cases{resumed}")
    console().print(f"Precision {summary.precision}. Written to {summary.output}", soft_wrap=True)


@app.command()
def report(
    models: Annotated[list[Path], typer.Argument(help="Compressed model folders, all of one source.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the report.")],
    source: Annotated[
        Path | None, typer.Option("--source", help="The dense model, to measure forward times.")
    ] = None,
    images: Annotated[Path | None, typer.Option("--images", help="Images, for the overlay.")] = None,
    labels: Annotated[Path | None, typer.Option("--labels", help="Labels, for the accuracy.")] = None,
    dense_prediction: Annotated[
        Path | None, typer.Option("--dense-pred", help="Segmentations of the dense model.")
    ] = None,
    predictions: Annotated[
        list[Path] | None,
        typer.Option("--pred", help="Segmentations of the compressed model; repeat it for several models."),
    ] = None,
    case: Annotated[
        str | None, typer.Option("--case", help="Case of the overlay [default: the one in the middle].")
    ] = None,
    speed: Annotated[
        bool, typer.Option("--speed/--no-speed", help="Measure forward times (needs --source).")
    ] = True,
    device: DeviceOption = "cpu",
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier report.")] = False,
) -> None:
    """Size, ranks, errors, accuracy and speed of compressed models as a page with figures.

    A part that needs something not given is left out, and the report says why.

    Example: tucker-ops report hippocampus_half --source dense_model --images imagesTs --labels labelsTs
    --dense-pred segmentations_dense --pred segmentations -o report
    """
    from tucker_ops.nnunet.report import Inputs, write_report

    inputs = Inputs(
        models=models, source=source, images=images, labels=labels, dense_prediction=dense_prediction,
        predictions=predictions or (), case=case, measure_speed=speed, device=device,
    )  # fmt: skip
    with case_progress("Measuring") as progress:
        result = write_report(inputs, output, force=force, progress=progress)
    console().print(result.summary.rich())
    for part, reason in result.missing.items():
        console().print(f"Left out: {part}; {reason}", highlight=False)
    console().print(f"Report: {result.page}", soft_wrap=True)


@app.command()
def bench(
    problems: Annotated[str, typer.Option("--set", help="Problems to run: small or full.")] = "small",
    problem: Annotated[
        list[str] | None, typer.Option("--problem", help="Only this one of the set; repeat it.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder for the results.", show_default="bench/results/latest"),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace earlier results in the output.")] = False,
) -> None:
    """Time the op against dense and three separate convolutions on nnU-Net's layers; needs the repository.

    Example: tucker-ops bench --problem stage0 --problem decoder0 -o bench_out
    """
    import subprocess

    import tucker_ops

    roots = (Path(tucker_ops.__file__).resolve().parents[1], Path.cwd())
    root = next((root for root in roots if (root / "bench" / "bench_op.py").exists()), None)
    if root is None:
        raise ConfigError(
            "the benchmarks are not part of the installed package: clone the repository and run this "
            "from its "
            f"top folder (looked for bench/ in {' and '.join(map(str, roots))})"
        )
    command = [sys.executable, "-m", "bench", "--set", problems]
    command += [f"--problem={name}" for name in problem or []]
    if output is not None:
        command += ["--output", str(output.absolute())]
    if force:
        command.append("--force")
    raise typer.Exit(subprocess.run(command, cwd=root).returncode)


@app.command()
def tune(
    model: Annotated[Path, typer.Argument(help="Compressed model folder: its layers, at its patch size.")],
    fold: FoldOption = None,
    checkpoint: CheckpointOption = "checkpoint_final.pth",
    trust_checkpoint: TrustOption = False,
) -> None:
    """Time the CUDA kernels' choices for a model's layers on this card, and remember the best of each.

    The table lies in ~/.cache/tucker_ops (TUCKER_CACHE names another folder); delete it to go back to the cost model.

    Example: tucker-ops tune hippocampus_half
    """
    from rich.progress import track

    from tucker_ops.nnunet.tables import tuning_table
    from tucker_ops.nnunet.tuning import problems_of, save_tunings, tune_here

    problems = problems_of(model, folds=fold, checkpoint=checkpoint, trust=trust_checkpoint)
    show = console(stderr=True)
    tunings = [tune_here(p) for p in track(problems, description="Timing layers", console=show)]
    console().print(tuning_table(tunings))
    console().print(f"written to {save_tunings(tunings)}")


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for all that it makes.")] = Path(
        "demo_out"
    ),
    example: Annotated[
        Path | None, typer.Option("--example", help="The folder examples/hippocampus of a checkout.")
    ] = None,
    cases: Annotated[
        int | None, typer.Option("--cases", help="Predict only the first of the ten cases.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Write into a folder that holds other things, too.")
    ] = False,
) -> None:
    """Compress the trained hippocampus model that comes with the source, and show what was gained and lost.

    Example: tucker-ops demo -o demo_out
    """
    from tucker_ops.nnunet.demo import demo as run_demo

    with case_progress("Demo") as progress:
        result = run_demo(output, example=example, cases=cases, force=force, progress=progress)
    console().print(result.report.summary.rich())
    console().print(f"Report: {result.report.page.resolve()}", soft_wrap=True)


class case_progress:
    """A progress bar on standard error; entered, it gives a function of (label, done, total)."""

    def __init__(self, title: str):
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self._title = title
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[label]}"),
            console=(out := console(stderr=True)),
            disable=not out.is_terminal,
        )

    def __enter__(self):
        self._bar.start()
        task = self._bar.add_task(self._title, total=None, label="")
        return lambda label, done, total: self._bar.update(task, completed=done, total=total, label=label)

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


def _exit_once(number: int, frame: object) -> None:
    """Leave by an exception; a second signal must not interrupt the clean-up of the first."""
    signal.signal(number, signal.SIG_IGN)
    sys.exit(128 + number)


def main() -> None:
    """Entry point. An error that tucker_ops raises on purpose is one message and exit code 2."""
    # A batch system ends jobs with these; as an exit, they clean up what is half-made.
    for number in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
        signal.signal(number, _exit_once)
    warnings.formatwarning = lambda message, *_, **__: f"Warning: {message}\n"
    try:
        app()
    except TuckerOpsError as error:
        if os.environ.get("TUCKER_OPS_DEBUG"):
            raise
        from rich.markup import escape

        console(stderr=True).print(f"[red]{type(error).__name__}:[/red] {escape(str(error))}", soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
