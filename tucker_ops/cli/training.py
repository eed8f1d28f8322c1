"""The command that trains a compressed model on: finetune."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tucker_ops.cli.options import (
    CheckpointOption,
    DeviceOption,
    FoldOption,
    ModelArgument,
    TrustOption,
)
from tucker_ops.cli.terminal import case_progress, console
from tucker_ops.errors import ConfigError


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
            "--labels", help="Labels of --images; without, the model learns from the teacher alone."
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
    supervise: Annotated[
        float | None,
        typer.Option("--supervise", help="Weight of nnU-Net's own loss [default: 1 with labels, 0 without]."),
    ] = None,
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
    for number, (before, after) in summary.distances.items():
        console().print(
            f"fold {number}: distance to the dense model {before:.3g} nats a voxel before, {after:.3g} after"
        )
    console().print(f"Precision {summary.precision}. Written to {summary.output}", soft_wrap=True)


def _extents(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(
            f"--patch {text!r} given; it is whole numbers with commas between, as 64,64,64"
        ) from None
