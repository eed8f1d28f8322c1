"""Image files of a folder, grouped into cases as nnU-Net names them: CASE_0000.nii.gz, CASE_0001.nii.gz."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from tucker_ops.errors import ModelFolderError, ShapeError


def fingerprint(place: str | Path) -> str:
    """Hash of where a file or folder is, and of the names, sizes and times of all files in it."""
    place = Path(place)
    content = hashlib.sha256(str(place.resolve()).encode())
    for path in [place, *sorted(place.rglob("*"))]:
        if path.is_file():
            status = path.stat()
            content.update(f"{path.relative_to(place)} {status.st_size} {status.st_mtime_ns}\n".encode())
    return content.hexdigest()


def find_cases(folder: str | Path, file_ending: str, channels: int) -> dict[str, list[Path]]:
    """Channel files per case, both sorted.

    Raises ModelFolderError where no image of this ending is there, ShapeError where a case has not exactly
    the channels 0 to `channels` - 1.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ModelFolderError(f"{folder} is no folder; give the folder that holds the images")
    pattern = re.compile(r"(.+)_(\d{4})" + re.escape(file_ending))
    cases: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if path.is_file() and (match := pattern.fullmatch(path.name)):
            cases.setdefault(match[1], []).append(path)
    if not cases:
        others = [p.name for p in sorted(folder.iterdir()) if p.is_file()]
        found = (
            f"it holds {', '.join(others[:3])}{' ...' if len(others) > 3 else ''}"
            if others
            else "it is empty"
        )
        raise ModelFolderError(
            f"{folder} has no image named CASE_0000{file_ending}, as this model expects; {found}. "
            "nnU-Net wants the channel number, four digits, at the end of the name"
        )
    wanted = [f"{c:04d}" for c in range(channels)]
    for case, files in cases.items():
        given = [pattern.fullmatch(f.name)[2] for f in files]
        if given != wanted:
            raise ShapeError(
                f"case {case} in {folder} has the channels {', '.join(given)}; this model was trained on "
                f"{channels} ({', '.join(wanted)})"
            )
    return cases
