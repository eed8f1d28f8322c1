"""Folders of results: written whole or not at all. Needs neither matplotlib nor rich."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tucker_ops.errors import OutputWriteError


def as_json(rows: Sequence[Mapping[str, object]]) -> str:
    """A JSON list with one row a line, so that a change of one row is a change of one line."""
    return "[\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n]\n"


def replace_folder(destination: Path, fill: Callable[[Path], None]) -> None:
    """`fill` writes into a folder beside `destination`, which then takes its place.

    The caller has made sure that what is there may go. Raises OutputWriteError where the disk refuses.
    """
    temporary = None
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", dir=destination.parent))
        temporary.chmod(0o755)
        fill(temporary)
        if destination.exists():
            shutil.rmtree(destination)
        os.rename(temporary, destination)
    except OSError as error:
        raise OutputWriteError(
            f"{destination} cannot be written ({error.strerror or error}); choose another output"
        ) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
