"""Refinement of a compressed nnU-Net on unlabelled images, as prediction sees them: whole patches, mirrored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tucker_ops import convert
from tucker_ops.convert import Refined
from tucker_ops.convert.precision import PRECISIONS
from tucker_ops.errors import ConfigError
from tucker_ops.fused import fuse
from tucker_ops.nnunet.calibration import CalibrationPatches, CalibrationSet
from tucker_ops.nnunet.folder import Fold, ModelFolder
from tucker_ops.nnunet.patches import mirrorings

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Refinement:
    """``steps`` of `tucker_ops.refine` on the patches of ``data``, in its ``precision``.

    Raises ConfigError for less than one step and for other precisions.
    """

    data: CalibrationSet
    steps: int = 100
    precision: str = "auto"

    def __post_init__(self):
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise ConfigError(f"refining takes a whole number of steps of at least 1, got {self.steps!r}")
        if self.precision not in PRECISIONS:
            raise ConfigError(
                f"the precision of refining is one of {', '.join(PRECISIONS)}, got {self.precision!r}"
            )

    def describe(self) -> dict[str, Any]:
        """JSON-ready, without the folder's path."""
        return self.data.describe() | {"steps": self.steps, "precision": self.precision}


def refine_network(
    network: nn.Module,
    dense: nn.Module,
    source: ModelFolder,
    refinement: Refinement,
    fold: Fold = "all",
    mirror_axes: Sequence[int] | None = None,
    *,
    progress: Progress | None = None,
) -> tuple[Refined, dict[str, Any]]:
    """`tucker_ops.refine` of `network` towards `dense`, which is frozen; also returns on what, JSON-ready.

    `mirror_axes` are those along which prediction mirrors: the network is refined on what it will be shown (see
    `mirrorings`), and few images go a longer way. There is no other augmentation: what the dense model says of images
    unlike any that it was trained on is nothing to learn from. Raises as `calibrate_network` and `tucker_ops.refine`.
    """
    patches = CalibrationPatches(source, refinement.data, fold)
    inputs = _Mirrored(list(patches.read(lambda *_: None)), mirrorings(mirror_axes))

    def report(done: int, total: int, _: str) -> None:
        if progress is not None:
            progress(f"refining fold {fold}", done, total)

    outcome = convert.refine(
        network,
        fuse(dense.requires_grad_(False), precision="fp32"),
        inputs,
        steps=refinement.steps,
        likelihood=patches.likelihood,
        seed=refinement.data.seed,
        precision=refinement.precision,
        progress=report,
    )
    on = {"source": patches.describe(), "mirror_axes": list(mirror_axes or ())}
    return outcome, on | refinement.describe()


class _Mirrored(Sequence[Tensor]):
    """Each patch in each way, made when asked for; those of one patch follow each other."""

    def __init__(self, patches: Sequence[Tensor], ways: Sequence[tuple[int, ...]]):
        self._patches, self._ways = patches, ways

    def __len__(self) -> int:
        return len(self._patches) * len(self._ways)

    def __getitem__(self, number: int) -> Tensor:
        patch, way = divmod(number, len(self._ways))
        return self._patches[patch].flip(self._ways[way])
