"""Traced networks, and what can be asked of one before it is rewritten."""

from __future__ import annotations

import math

import torch
from torch import fx, nn
from torch.nn.modules.instancenorm import _InstanceNorm

from tucker_ops.errors import ConversionError
from tucker_ops.nn import _TuckerConv


class _Tracer(fx.Tracer):
    """Sees our convolutions as leaves, like torch's own modules."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, _TuckerConv) or super().is_leaf_module(module, name)


def trace(model: nn.Module) -> fx.Graph:
    """The graph of `model`'s forward; ConversionError, with the reason, where torch.fx cannot follow it."""
    try:
        return _Tracer().trace(model)
    except Exception as error:  # whatever the model's code raises on symbolic values
        first = str(error).splitlines()[0] if str(error) else ""
        raise ConversionError(
            f"torch.fx cannot follow the forward of {type(model).__name__} ({type(error).__name__}: {first})"
        ) from error


def is_leaf(module: nn.Module) -> bool:
    """Does a trace of a network that holds this module have it as one node?"""
    return _Tracer().is_leaf_module(module, "")


def sizes(model: nn.Module, graph: fx.Graph) -> dict[fx.Node, float]:
    """Values of every hidden convolution's output per voxel of the network's input, strides as they would divide it.

    A result is not among them: when it is written, hardly anything else is alive.
    """
    density: dict[fx.Node, float] = {}
    sizes: dict[fx.Node, float] = {}
    for node in graph.nodes:
        density[node] = max((density[read] for read in node.all_input_nodes), default=1.0)
        module = model.get_submodule(node.target) if node.op == "call_module" else None
        if isinstance(module, (nn.modules.conv._ConvNd, _TuckerConv)):
            steps = math.prod(module.stride)
            density[node] *= steps if module.transposed else 1 / steps
            if any(user.op != "output" for user in node.users):
                sizes[node] = density[node] * module.out_channels
    return sizes


def computes_statistics(module: nn.Module) -> bool:
    hooked = module._forward_hooks or module._forward_pre_hooks
    return isinstance(module, _InstanceNorm) and not module.track_running_stats and not hooked


def hooked(module: nn.Module) -> bool:
    """Does anyone wait for this module to run, forward or backward?"""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, name) for name in hooks)


def has_own_forward(module: nn.Module) -> bool:
    """Is it a plain convolution, not a subclass that computes something else or derives its weight?"""
    plain = next(
        cls for cls in type(module).__mro__ if cls.__module__ in ("torch.nn.modules.conv", "tucker_ops.nn")
    )
    names = ("core", "u_taps") if isinstance(module, _TuckerConv) else ("weight",)
    return type(module).forward is plain.forward and all(name in module._parameters for name in names)


def readers_behind_cat(node: fx.Node) -> list[fx.Node]:
    readers: list[fx.Node] = []
    for user in node.users:
        is_cat = user.op == "call_function" and user.target in (torch.cat, torch.concat)
        readers += list(user.users) if is_cat else [user]
    return readers
