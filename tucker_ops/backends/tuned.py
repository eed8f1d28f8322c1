"""Choices that were timed, kept as data: a table shipped for each architecture, and one for the user's own card.

A table is JSON, {"problems": {key: [one_pass, form, chunk]}}, the key made by `key_of`. The user's table, which
`tucker-ops tune` writes, goes before the shipped one; where neither has the problem, the cost model decides. Triton's
tables hold its configurations instead, and lie in a folder for each version of Triton.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from tucker_ops.errors import BackendError
from tucker_ops.types import Problem

SHIPPED = Path(__file__).parent / "tuned_tables"
CACHE_VARIABLE = "TUCKER_CACHE"
# The one-pass kernel in a form and with a chunk, where it can: a block may ask for what the timed op did not.
PREFERRED = 2


def cache_folder() -> Path:
    """Where tables of the user's cards lie: TUCKER_CACHE, else tucker_ops in the user's cache folder."""
    named = os.environ.get(CACHE_VARIABLE)
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(named) if named else base / "tucker_ops"


def table_path(device_name: str, compiler: str = "") -> Path:
    """The user's table for a card of this name, and for what `compiler` makes of the kernels where that is not ours."""
    safe = "".join(c if c.isalnum() else "_" for c in device_name)
    return cache_folder() / "tuned" / compiler / f"{safe}.json"


def key_of(
    kind: str,
    channels: Sequence[int],
    size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> str:
    """Names a problem: kind (float16, bfloat16, tf32, float32), batch and channels, extents, geometry."""
    parts = (channels, size, kernel, stride, padding, dilation)
    return " ".join([kind, *("x".join(map(str, part)) for part in parts)])


def key_of_problem(problem: Problem, tf32: bool) -> str:
    """`key_of` for the call that a problem stands for."""
    channels = (problem.batch, problem.in_channels, problem.rank_in, problem.rank_out, problem.out_channels)
    geometry = (problem.kernel_size, problem.stride, problem.padding, problem.dilation)
    return key_of(kind_of(problem.dtype, tf32), channels, problem.input_size, *geometry)


def kind_of(dtype: torch.dtype, tf32: bool) -> str:
    return "tf32" if dtype == torch.float32 and tf32 else str(dtype).removeprefix("torch.")


def read(
    path: Path, entries: int = 3, check: Callable[[list[int]], object] | None = None
) -> dict[str, list[int]]:
    """A table's problems, with so many integers each; empty where there is none.

    `check` raises ValueError for integers that are no choice. Raises BackendError for a file that is no such table.
    """
    try:
        problems = json.loads(path.read_text())["problems"]
        if not all(
            isinstance(v, list) and len(v) == entries and all(type(n) is int for n in v)
            for v in problems.values()
        ):
            raise ValueError(f"entries must be {entries} integers")
        for values in problems.values() if check else ():
            check(values)
        return problems
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BackendError(
            f"{path} is no table of tuned choices ({error}): delete it, or run tucker-ops tune"
        ) from None


def write(path: Path, problems: dict[str, list[int]], notes: dict[str, str]) -> None:
    """Writes a table, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
        json.dump({"notes": notes, "problems": problems}, file, indent=1, sort_keys=True)
    os.replace(file.name, path)
    _table.cache_clear()


@cache
def _table(index: int) -> dict[str, list[int]]:
    properties = torch.cuda.get_device_properties(index)
    shipped = read(SHIPPED / f"sm_{properties.major}{properties.minor}.json")
    return {**shipped, **read(table_path(properties.name))}


def choice(
    index: int, dtype: torch.dtype, channels, size, core: Tensor, stride, padding, dilation, tf32: bool
) -> list[int]:
    """The ops' `choice` argument for a call on GPU `index`: what a table says, else whether TF32 will do and no more.

    channels: batch, C_in of all sources, R_in, R_out, C_out; size: the input's extents.
    """
    table = _table(index)
    if not table:
        return [int(tf32)]
    known = table.get(key_of(kind_of(dtype, tf32), channels, size, core.shape[2:], stride, padding, dilation))
    if known is None:
        return [int(tf32)]
    one_pass, form, chunk = known
    return [int(tf32), PREFERRED, form, chunk] if one_pass else [int(tf32), 0]
