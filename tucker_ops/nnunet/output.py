"""A file that appears whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from tucker_ops.errors import OutputExistsError, OutputWriteError


def check_file(path: str | Path, *, force: bool = False) -> None:
    """Raise OutputExistsError where `write_file` would not write."""
    if Path(path).exists() and not force:
        raise OutputExistsError(f"{path} exists; choose another file or replace it with --force (force=True)")


def write_file(path: str | Path, content: bytes, *, force: bool = False) -> None:
    """Write `content` to a temporary neighbour of `path` and rename it; parents are made.

    Raises OutputExistsError where `path` exists and `force` is not set, OutputWriteError where the disk
    refuses.
    """
    path = Path(path)
    check_file(path, force=force)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise OutputWriteError(
            f"{path} cannot be written ({error.strerror or error}); free some space or choose another output"
        ) from error
