"""A folder that appears whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tucker_ops.errors import OutputExistsError, OutputWriteError


class Staging:
    """The temporary folder that `staged_folder` yields."""

    def __init__(self, path: Path, destination: Path):
        self.path = path
        self.destination = destination

    def write(self, name: str | Path, content: bytes) -> None:
        """Write a file, `name` relative to the folder, down to the disk. Raises OutputWriteError."""
        target = self.path / name
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with open(target, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise write_error(self.destination / name, error) from error


def write_error(path: Path, error: OSError) -> OutputWriteError:
    """The error of a refused write, with the system's reason and the remedy."""
    reason = error.strerror or str(error)
    return OutputWriteError(
        f"{path} cannot be written ({reason}); nothing was left behind. Free some space or choose "
        "another output"
    )


@contextmanager
def staged_folder(
    destination: str | Path, *, replaceable: Callable[[Path], bool], force: bool = False
) -> Iterator[Staging]:
    """Fill a temporary sibling of `destination`, renamed into place when the block ends without an error.

    With `force` an existing destination is replaced, provided that it is empty or `replaceable` says that
    it is an earlier output: a mistyped path must not cost a user's data. It is moved aside first and moved
    back if the rename fails. On any error or interrupt the temporary folder and the parents made for it
    disappear.

    Raises OutputExistsError before anything is written, OutputWriteError where the disk refuses.
    """
    destination = Path(os.path.abspath(destination))
    check_destination(destination, replaceable=replaceable, force=force)
    created = _make_parents(destination.parent)
    temporary = None
    try:
        try:
            temporary = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", dir=destination.parent))
            temporary.chmod(0o777 & ~_umask())
        except OSError as error:
            raise write_error(destination, error) from error
        yield Staging(temporary, destination)
        try:
            _swap(temporary, destination)
        except OSError as error:
            raise write_error(destination, error) from error
    except BaseException:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        _remove_empty(created)
        raise


def check_destination(destination: Path, *, replaceable: Callable[[Path], bool], force: bool) -> None:
    """Raise OutputExistsError where `staged_folder` would not write."""
    if not os.path.lexists(destination):
        return
    if not force:
        raise OutputExistsError(
            f"{destination} exists; choose another output or replace it with --force (force=True)"
        )
    if destination.is_symlink() or not destination.is_dir():
        raise OutputExistsError(f"{destination} is no folder and is not replaced; choose another output")
    if any(destination.iterdir()) and not replaceable(destination):
        raise OutputExistsError(
            f"{destination} is no earlier output of this command, or holds other files as well, and is "
            "not replaced, even with --force; choose another output or remove it yourself"
        )


def _make_parents(parent: Path) -> list[Path]:
    """Create missing parents; returns those made, innermost first."""
    missing = [p for p in (parent, *parent.parents) if not p.exists()]
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        _remove_empty(missing)
        raise write_error(parent, error) from error
    return missing


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def _swap(temporary: Path, destination: Path) -> None:
    if not destination.exists():
        os.rename(temporary, destination)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{destination.name}.replaced.", dir=destination.parent))
    old = aside / destination.name
    try:
        os.rename(destination, old)
        os.rename(temporary, destination)
    except BaseException:
        if old.exists():
            os.rename(old, destination)
        aside.rmdir()
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
