"""Commands that show the outcome as a page: report and demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tucker_ops.cli.options import (
    DeviceOption,
)
from tucker_ops.cli.terminal import case_progress, console


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
