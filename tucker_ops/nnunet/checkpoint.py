"""Reading and writing nnU-Net checkpoints without running code that a checkpoint may carry."""

from __future__ import annotations

import hashlib
import io
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tucker_ops.errors import CheckpointError

REQUIRED_KEYS = ("network_weights", "trainer_name", "init_args")


def _numpy_globals() -> list[Any]:
    """The numpy names in nnU-Net's checkpoints: its log keeps losses and Dice scores as numpy scalars.

    numpy 2 renamed ``numpy.core`` to ``numpy._core``; a checkpoint names whichever wrote it.
    """
    scalar = np.float64(0).__reduce__()[0]
    reconstruct = np.zeros(1).__reduce__()[0]
    names = [
        (scalar, "numpy.core.multiarray.scalar"),
        (scalar, "numpy._core.multiarray.scalar"),
        (reconstruct, "numpy.core.multiarray._reconstruct"),
        (reconstruct, "numpy._core.multiarray._reconstruct"),
    ]
    dtypes = [type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i4", "i8", "bool")]
    return [*names, np.ndarray, np.dtype, *dtypes]


def read_checkpoint(path: str | Path, *, trust: bool = False) -> dict[str, Any]:
    """Read a checkpoint onto the CPU with ``torch.load(weights_only=True)``.

    Only a checkpoint that holds other objects than tensors and plain data, and only with ``trust=True``, is
    read by pickle, which runs whatever code the file contains; a UserWarning says so.

    Returns nnU-Net's dictionary: ``network_weights``, ``trainer_name``, ``init_args`` and the rest.
    Raises CheckpointError where the file is truncated, unsafe, or lacks what prediction needs.
    """
    path = Path(path)
    if not zipfile.is_zipfile(path):
        raise CheckpointError(
            f"{path} ({path.stat().st_size} bytes) is truncated or no torch checkpoint; "
            "copy it again from where the model was trained"
        )
    damaged = _damaged_member(path)
    if damaged is not None:
        raise CheckpointError(f"{path} is damaged ({damaged} fails its checksum); copy it again")
    try:
        with torch.serialization.safe_globals(_numpy_globals()):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if not trust:
            reason = str(error).split("\n\n")[0].splitlines()[-1].strip()
            raise CheckpointError(
                f"{path} holds objects that are not weights and was not read ({reason}); if you trust its "
                "author, allow reading it by pickle with --trust-checkpoint (trust=True in Python)"
            ) from error
        warnings.warn(
            f"{path} is read by pickle, which can run code that the file contains, as you allowed",
            stacklevel=2,
        )
        checkpoint = _read_by_pickle(path)
    except (RuntimeError, EOFError, KeyError) as error:
        raise _corrupt(path, error) from error
    _check_content(path, checkpoint)
    return checkpoint


def _damaged_member(path: Path) -> str | None:
    """The first part whose checksum is wrong; torch.load does not look at them."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip()
    except (zipfile.BadZipFile, EOFError) as error:
        return str(error)


def _read_by_pickle(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=False)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ImportError, AttributeError) as error:
        raise _corrupt(path, error) from error


def _corrupt(path: Path, error: Exception) -> CheckpointError:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return CheckpointError(f"{path} cannot be read as a torch checkpoint ({reason}); copy it again")


def _check_content(path: Path, checkpoint: Any) -> None:
    missing = [k for k in REQUIRED_KEYS if not isinstance(checkpoint, dict) or not checkpoint.get(k)]
    if not missing and not (
        isinstance(checkpoint["init_args"], dict)
        and isinstance(checkpoint["init_args"].get("configuration"), str)
    ):
        missing = ["init_args.configuration"]
    if not missing and not isinstance(checkpoint["trainer_name"], str):
        missing = ["the trainer's name"]
    if not missing and not (
        isinstance(checkpoint["network_weights"], dict)
        and all(isinstance(t, torch.Tensor) for t in checkpoint["network_weights"].values())
    ):
        missing = ["tensors in network_weights"]
    if missing:
        raise CheckpointError(
            f"{path} lacks {', '.join(missing)}, which nnU-Net's checkpoints hold; "
            "give a checkpoint_*.pth that nnU-Net version 2 wrote"
        )
    unique = {(t.data_ptr(), t.shape): (name, t) for name, t in checkpoint["network_weights"].items()}
    for name, tensor in unique.values():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise CheckpointError(
                f"{path}: the weights {name} hold infinite or undefined values; retrain the model"
            )


def cast_weights(weights: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Cast floating-point tensors; names that share a tensor share the result, so that it is stored once."""
    seen: dict[tuple[int, torch.Size], torch.Tensor] = {}
    result = {}
    for name, tensor in weights.items():
        key = (tensor.data_ptr(), tensor.shape) if tensor.numel() else (id(tensor), tensor.shape)
        if key not in seen:
            seen[key] = tensor.detach().to(dtype) if tensor.is_floating_point() else tensor.detach()
        result[name] = seen[key]
    return result


def stored_dtype(weights: Mapping[str, torch.Tensor]) -> torch.dtype:
    """That of the first floating-point tensor."""
    return next(t.dtype for t in weights.values() if t.is_floating_point())


def serialise(checkpoint: dict[str, Any]) -> bytes:
    """The bytes of a checkpoint file.

    torch.save into a file reports a full disk as RuntimeError; written by ourselves it is an OSError.
    """
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    return buffer.getvalue()


def sha256(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
