"""Long work whose results outlive an interrupt: a folder of its own, in it one JSON file a step, whole or absent."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tucker_ops.errors import OutputExistsError, ResumeError
from tucker_ops.nnunet.output import write_file

Result = dict[str, Any]


def claim(folder: Path, state: str, arguments: Mapping[str, Any], *, work: str, otherwise: str) -> None:
    """Make `folder` that of some `work` with these `arguments` (JSON), kept in its file `state`, or find that it is.

    Raises ResumeError where it holds the same work with other arguments (`otherwise` says what to do then), and
    OutputExistsError where it holds something else.
    """
    mine, path = json.loads(json.dumps(arguments, default=str)), folder / state
    if path.is_file():
        theirs = json.loads(path.read_text())
        differing = sorted(key for key in mine if theirs.get(key) != mine[key])
        if differing:
            raise ResumeError(f"{folder} holds {work} with another {', '.join(differing)}; {otherwise}")
    elif folder.exists() and any(folder.iterdir()):
        raise OutputExistsError(
            f"{folder} exists and does not hold {work}; choose another output, or remove it"
        )
    else:
        write_file(path, json.dumps(mine, indent=1).encode())


class Study:
    """Steps kept in `folder`. A step is made again when it was asked for with other arguments."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    def step(self, name: str, arguments: Mapping[str, Any], make: Callable[[], Result]) -> Result:
        """The result of `make`, a JSON object: from the file of an earlier run with equal `arguments`, or made now."""
        path = self.folder / "steps" / f"{name}.json"
        asked = json.loads(json.dumps(arguments))
        if path.is_file():
            kept = json.loads(path.read_text())
            if kept["arguments"] == asked:
                return kept["result"]
        start = time.perf_counter()
        result = json.loads(json.dumps(make()))
        step = {"arguments": asked, "seconds": time.perf_counter() - start, "result": result}
        write_file(path, json.dumps(step, indent=1).encode(), force=True)
        return result

    def seconds(self) -> float:
        """What the steps that are kept took together, each in the run that made it."""
        files = (self.folder / "steps").glob("*.json")
        return sum(json.loads(file.read_text())["seconds"] for file in files)
