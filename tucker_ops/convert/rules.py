"""Why a convolution is left dense. Each rule answers None, or the reason in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from tucker_ops.convert.config import CompressionConfig
from tucker_ops.cost import Cost
from tucker_ops.errors import ConversionError
from tucker_ops.nn import spec_of
from tucker_ops.types import ConvSpec, Ranks, ranks_text

_EXACT = (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True)
class Use:
    """What is known of a convolution's part in the network."""

    calls: int
    reads_input: bool
    returned: bool
    last: bool


def owners(model: nn.Module) -> dict[int, int]:
    """How many modules hold each parameter, by the parameter's id."""
    count: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                count[id(parameter)] = count.get(id(parameter), 0) + 1
    return count


def cannot(conv: nn.Module, owned_by: dict[int, int]) -> str | None:
    """Why `conv` cannot be replaced at all, whatever the configuration."""
    if type(conv) not in _EXACT:
        if isinstance(conv, nn.Conv1d | nn.ConvTranspose1d):
            return "a 1D convolution; only 2D and 3D ones are factorised"
        return f"{type(conv).__name__} is a class of its own, which a replacement would not behave like"
    weight = conv._parameters.get("weight")
    if weight is None:
        return "its weight is computed by a parametrization or hook, not stored as a parameter"
    if is_lazy(weight):
        return "a lazy layer without weights; run the model once first"
    if conv.groups != 1:
        return f"grouped ({conv.groups} groups): its channels are not mixed as a factorisation needs"
    try:
        spec_of(conv)
    except ConversionError as error:
        return str(error)
    if weight.dtype not in _DTYPES:
        return f"weights of dtype {str(weight.dtype).removeprefix('torch.')}"
    if any(owned_by.get(id(p), 1) > 1 for p in conv._parameters.values() if p is not None):
        return "another module shares its weight or bias"
    if any(getattr(conv, hooks) for hooks in _HOOKS):
        return "has hooks, which would be lost; remove them first"
    return None


def unwanted(spec: ConvSpec, use: Use, names: Sequence[str], config: CompressionConfig) -> str | None:
    """Why the configuration leaves this layer dense, before any ranks are known."""
    pattern = matching(names, config.exclude)
    if pattern is not None:
        return f"excluded by the pattern {pattern!r}"
    if use.calls == 0:
        return "not run in the traced forward pass"
    if config.skip_first and use.reads_input and spec.in_channels <= config.min_rank:
        return (
            f"first layer: its {spec.in_channels} input channels are no more than "
            f"min_rank {config.min_rank}, nothing to reduce"
        )
    if config.skip_heads and (use.returned or use.last) and max(spec.kernel_size) == 1:
        return "head: a pointwise layer that makes the network's output"
    if config.skip_transposed and spec.transposed:
        return "transposed, and skip_transposed is set"
    return None


def not_cheaper(dense: Cost, tucker: Cost, ranks: Ranks) -> str | None:
    """Why a layer at these ranks does not pay: no gain in parameters, or none in MACs."""
    parts = []
    if tucker.params >= dense.params:
        parts.append(f"{tucker.params:,} parameters against {dense.params:,}")
    if tucker.macs >= dense.macs:
        parts.append(f"{tucker.macs:,} MACs against {dense.macs:,}")
    if not parts:
        return None
    return f"not cheaper: at ranks {ranks_text(ranks)} it would take {' and '.join(parts)} dense"


def matching(names: Sequence[str], patterns: Sequence[str]) -> str | None:
    """The first of `patterns` that matches any of `names`."""
    return next((p for p in patterns if any(fnmatchcase(name, p) for name in names)), None)
