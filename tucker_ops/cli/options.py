"""Options that several commands share, and what their texts mean."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tucker_ops.errors import ConfigError

if TYPE_CHECKING:
    from tucker_ops.nnunet.calibration import CalibrationSet
    from tucker_ops.nnunet.compare import Gate
    from tucker_ops.nnunet.refinement import Refinement

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
MinRankOption = Annotated[int, typer.Option("--min-rank", help="Smallest rank.")]
AlignOption = Annotated[int, typer.Option("--align", help="Ranks are multiples of this.")]
NoTapRanksOption = Annotated[
    bool,
    typer.Option(
        "--no-tap-ranks",
        help="With --params: give no layer a rank of its kernel's taps. Fewer multiply-accumulates at the same "
        "parameters, further from the dense model.",
    ),
]
CalibrateCaseOption = Annotated[
    list[str] | None,
    typer.Option(
        "--calibrate-case",
        help="Calibrate on this case only; repeat it [default: all, or 64 evenly among more].",
    ),
]
CalibrateSplitsOption = Annotated[
    Path | None,
    typer.Option(
        "--calibrate-splits", help="splits_final.json: calibrate each fold on its training cases only."
    ),
]
CalibratePatchesOption = Annotated[
    int | None,
    typer.Option(
        "--calibrate-patches",
        help="Random patches, at least one a case [default: 16]; more than 64 also read more cases.",
    ),
]
RefineOption = Annotated[
    int | None,
    typer.Option(
        "--refine",
        help="Steps of training all weights together towards the dense model's output on the images of --calibrate; "
        "100 take minutes, need no labels, and win back more than half of what was lost.",
    ),
]
RefinePrecisionOption = Annotated[
    str | None,
    typer.Option(
        "--refine-precision",
        help="Of the steps of --refine: fp32, bf16, or auto, which is bf16 where the processor multiplies it and its "
        "rounding matters little [default: auto].",
    ),
]


def tap_ranks_of(without: bool, params: float | str | None) -> bool | None:
    """What --no-tap-ranks asks for, as `CompressionConfig` takes it."""
    if without and params is None:
        raise ConfigError(
            "--no-tap-ranks is about --params, without which no layer gets such a rank; leave it out"
        )
    return False if without else None


def gate_of(max_drop: float | None, max_class_drop: float | None) -> Gate | None:
    """The gate that either option asks for, None where neither does."""
    from tucker_ops.nnunet.compare import Gate

    given = {"max_drop": max_drop, "max_class_drop": max_class_drop}
    given = {name: value for name, value in given.items() if value is not None}
    return Gate(**given) if given else None


def calibration_set(
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


def refinement_of(
    steps: int | None, precision: str | None, images: CalibrationSet | None
) -> Refinement | None:
    """What --refine asks for, on the images of --calibrate."""
    from tucker_ops.nnunet.refinement import Refinement

    if steps is None:
        if precision is not None:
            raise ConfigError("--refine-precision is that of --refine, which is missing; give the steps")
        return None
    if images is None:
        raise ConfigError("--refine learns from the images of --calibrate, which is missing; give the folder")
    return Refinement(images, steps) if precision is None else Refinement(images, steps, precision)
