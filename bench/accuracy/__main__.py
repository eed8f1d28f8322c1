"""`make accuracy`: the published policy and ours on real models and volumes. Interrupted, it goes on where it was."""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from dataclasses import asdict
from pathlib import Path

from bench.accuracy.output import markdown, plot
from bench.accuracy.part import Options
from bench.accuracy.sources import Sources
from bench.accuracy.study import run, write_rows
from bench.provenance import REPOSITORY, provenance
from tucker_ops.errors import TuckerOpsError
from tucker_ops.nnunet.output import write_file
from tucker_ops.nnunet.study import Study

RESULTS = REPOSITORY / "bench" / "results"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.accuracy", description=__doc__)
    parser.add_argument(
        "--sources", type=Path, default=REPOSITORY.parent / "shared", help="folder of models/ and data/"
    )
    parser.add_argument(
        "--work", type=Path, default=REPOSITORY / "build" / "accuracy", help="what is kept meanwhile"
    )
    parser.add_argument(
        "-o", "--output", type=Path, default=RESULTS / "latest_accuracy", help="folder of the results"
    )
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message="Detected old nnU-Net plans format")
    # Workers that augment beside the training process take its cores.
    if (os.cpu_count() or 1) <= 4:
        os.environ.setdefault("nnUNet_n_proc_DA", "0")
    start = time.perf_counter()

    def log(text: str) -> None:
        print(f"{(time.perf_counter() - start) / 60:5.1f} min  {text}", file=sys.stderr, flush=True)

    # Before the hour in which the tree may change.
    options, about = Options(), provenance()
    resumed = (arguments.work / "steps").is_dir()
    try:
        rows = run(Sources(arguments.sources), arguments.work, options, log)
    except TuckerOpsError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    minutes = (Study(arguments.work).seconds() if resumed else time.perf_counter() - start) / 60
    write_rows(rows, arguments.output / "results.json")
    text = markdown(rows, about, asdict(options), minutes, resumed=resumed)
    write_file(arguments.output / "results.md", text.encode(), force=True)
    plot(rows, arguments.output / "accuracy.png")
    print(text)
    print(f"Written to {arguments.output}")


if __name__ == "__main__":
    main()
