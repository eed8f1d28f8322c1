"""Finding convolutions and every place in a module tree that refers to them."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.nn.modules.conv import _ConvNd

from tucker_ops.types import ConvSpec


def convolutions(model: nn.Module) -> dict[str, nn.Module]:
    """Every torch convolution in `model`, each object once, under its first name in registration order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, _ConvNd)}


def all_names(model: nn.Module) -> dict[int, list[str]]:
    """All names of each module, by the object's id. nnU-Net registers one convolution under up to four."""
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    return names


def slots(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """(parent, key, child) for every registration in the tree, parents visited once each."""
    for parent in list(model.modules()):
        for key, child in list(parent._modules.items()):
            if child is not None:
                yield parent, key, child


def describe(conv: _ConvNd) -> ConvSpec:
    """Channels and geometry of any torch convolution, also of those that cannot be factorised."""
    padding = conv.padding
    if padding == "valid":
        padding = (0,) * len(conv.kernel_size)
    elif padding == "same":
        padding = tuple(d * (k - 1) // 2 for d, k in zip(conv.dilation, conv.kernel_size, strict=True))
    return ConvSpec(
        in_channels=conv.in_channels,
        out_channels=conv.out_channels,
        kernel_size=tuple(conv.kernel_size),
        stride=tuple(conv.stride),
        padding=tuple(padding),
        dilation=tuple(conv.dilation),
        groups=conv.groups,
        bias=conv.bias is not None,
        transposed=conv.transposed,
        output_padding=tuple(conv.output_padding) if conv.transposed else (),
    )
