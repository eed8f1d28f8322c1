"""Layers of a compressed model as the report shows them: under names that fit beside a plot."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tucker_ops.nnunet.manifest import Manifest
from tucker_ops.types import Ranks

_SHORT_NAMES = (
    (r"encoder\.stem\.convs\.(\d+)\.conv", r"stem · conv \1"),
    (r"encoder\.stages\.(\d+)(?:\.0)?\.convs\.(\d+)\.conv", r"encoder \1 · conv \2"),
    (r"encoder\.stages\.(\d+)(?:\.0)?\.blocks\.(\d+)\.conv(\d)\.conv", r"encoder \1 · block \2 conv \3"),
    (r"encoder\.stages\.(\d+)(?:\.0)?\.blocks\.(\d+)\.skip.*", r"encoder \1 · block \2 skip"),
    (r"decoder\.stages\.(\d+)\.convs\.(\d+)\.conv", r"decoder \1 · conv \2"),
    (r"decoder\.transpconvs\.(\d+)", r"decoder \1 · up"),
    (r"decoder\.seg_layers\.(\d+)", r"decoder \1 · head"),
)


@dataclass(frozen=True)
class Layer:
    """One convolution, dense and as compressed (the same where ``ranks`` is None, for ``reason``).

    ``error`` is the relative error of the weights (Frobenius norm), averaged over the folds.
    """

    name: str
    label: str
    channels: tuple[int, int]
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    transposed: bool
    dense_params: int
    dense_macs: int
    params: int
    macs: int
    ranks: Ranks | None
    reason: str | None
    error: float | None


def short_name(name: str) -> str:
    """nnU-Net's module name for people: ``encoder.stages.1.0.convs.0.conv`` is ``encoder 1 · conv 0``."""
    for pattern, replacement in _SHORT_NAMES:
        if match := re.fullmatch(pattern, name):
            return match.expand(replacement)
    return name


def layers_of(manifest: Manifest) -> list[Layer]:
    """The layers of a compressed model in the order in which the plan holds them."""
    errors = manifest.mean_errors()
    result = []
    for planned in manifest.plan.layers:
        spec, kept_dense = planned.spec, planned.ranks is None
        cost = planned.dense if kept_dense else planned.tucker
        result.append(
            Layer(
                name=planned.name,
                label=short_name(planned.name),
                channels=(spec.in_channels, spec.out_channels),
                kernel_size=spec.kernel_size,
                stride=spec.stride,
                transposed=spec.transposed,
                dense_params=planned.dense.params,
                dense_macs=planned.dense.macs,
                params=cost.params,
                macs=cost.macs,
                ranks=planned.ranks,
                reason=planned.reason,
                error=errors.get(planned.name),
            )
        )
    return result


def setting_name(manifest: Manifest) -> str:
    """What was asked for, as ``factor 0.5`` or ``params 0.13``."""
    for policy in ("factor", "energy", "params", "macs"):
        value = getattr(manifest.config, policy, None)
        if value is not None:
            return f"{policy} {value:g}"
    return "Tucker"
