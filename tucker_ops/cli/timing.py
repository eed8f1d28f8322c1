"""Commands that time kernels: bench and tune."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from tucker_ops.cli.options import (
    CheckpointOption,
    FoldOption,
    TrustOption,
)
from tucker_ops.cli.terminal import console
from tucker_ops.errors import ConfigError


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


def tune(
    model: Annotated[Path, typer.Argument(help="Compressed model folder: its layers, at its patch size.")],
    fold: FoldOption = None,
    checkpoint: CheckpointOption = "checkpoint_final.pth",
    trust_checkpoint: TrustOption = False,
    backend: Annotated[
        str | None,
        typer.Option(help="Whose kernels: cuda or triton.", show_default="cuda where it runs, else triton"),
    ] = None,
) -> None:
    """Time the GPU kernels' choices for a model's layers on this card, and remember the best of each.

    The table lies in ~/.cache/tucker_ops (TUCKER_CACHE names another folder); delete it to go back to what is shipped.

    Example: tucker-ops tune hippocampus_half
    """
    from rich.progress import track

    from tucker_ops.nnunet.tables import triton_tuning_table, tuning_table
    from tucker_ops.nnunet.tuning import backend_to_tune, problems_of, save_tunings, tune_here

    if backend not in (None, "cuda", "triton"):
        raise ConfigError(
            f"--backend is {backend!r}: the kernels that can be tuned are those of cuda and triton"
        )
    backend = backend or backend_to_tune()
    problems = problems_of(model, folds=fold, checkpoint=checkpoint, trust=trust_checkpoint, backend=backend)
    show = console(stderr=True)
    tunings = [tune_here(p, backend) for p in track(problems, description="Timing layers", console=show)]
    console().print((triton_tuning_table if backend == "triton" else tuning_table)(tunings))
    console().print(f"written to {save_tunings(tunings, backend)}")
