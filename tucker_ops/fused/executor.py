"""`fuse`: a model whose inference runs in blocks, and which is otherwise the model it was."""

from __future__ import annotations

import copy
import os
import threading
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from tucker_ops.backends.base import Verdict
from tucker_ops.backends.select import block_kernels
from tucker_ops.errors import ConversionError
from tucker_ops.fused.rewrite import Layer, Rewriter, trace

FUSE_VARIABLE = "TUCKER_FUSE"
_STATE = "_tucker_ops_fusion"


@dataclass(frozen=True)
class Fusion:
    """A rewritten network, what became of each of its layers, and what it was made from.

    ``module`` is None where the network could not be rewritten, for ``reason``.
    """

    module: fx.GraphModule | None
    layers: tuple[Layer, ...]
    reason: str
    signature: tuple = ()


@dataclass(frozen=True)
class Explanation:
    """What `fuse` makes of a model: print it. ``used``: does inference run fused, on the model's device and dtype?"""

    fusion: Fusion
    used: Verdict

    @property
    def layers(self) -> tuple[Layer, ...]:
        return self.fusion.layers

    def __str__(self) -> str:
        if self.fusion.module is None:
            return f"runs as it was: {self.fusion.reason}"
        count = sum(layer.fused for layer in self.layers)
        width = max((len(layer.name) for layer in self.layers), default=0)
        lines = [f"{count} of {len(self.layers)} layers fused"]
        lines.append(f"runs {'fused' if self.used else 'as it was'}: {self.used.reason}")
        for layer in self.layers:
            state = "fused" if layer.fused else "left "
            lines.append(f"  {state} {layer.name:<{width}}  {layer.kind}: {layer.reason}")
        return "\n".join(lines)


class FusedForward:
    """Mixin in front of an nn.Module class: inference runs in blocks, everything else as in that class.

    Blocks run in evaluation mode where nothing requires a gradient, autocast is off and a kernel computes them; the
    variable TUCKER_FUSE=0 turns them off. Parameters, their names and
    the state dict stay those of the class, and weights may change or be loaded at any time. A network that cannot be
    traced runs as it was; `tucker_ops.fused.explain` says why.
    """

    def forward(self, input: Tensor):
        if not _may_fuse(self, input):
            return super().forward(input)
        fusion = fusion_of(self)
        return super().forward(input) if fusion.module is None else fusion.module(input)

    def __getstate__(self):
        return {name: value for name, value in self.__dict__.items() if name != _STATE}


def fuse(model: nn.Module) -> nn.Module:
    """`model` with its inference in fused blocks; shares all parameters and buffers with it.

    Takes PlainConvUNet, ResidualEncoderUNet and any other module that torch.fx can trace, compressed or dense, in
    2D and 3D; the output has the input's dtype. Layers that cannot be folded run as they were. In training mode, where
    a gradient is required, under autocast or torch's global forward hooks, with TUCKER_FUSE=0, and where no kernel
    computes blocks of this dtype on this device, the whole model runs as it was.
    `print(tucker_ops.fused.explain(model))` says what happens and why.

    Raises ConversionError for what is not a module or cannot be traced.
    """
    if not isinstance(model, nn.Module):
        raise ConversionError(f"fuse takes a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, FusedForward):
        return model
    fused = copy.copy(model)
    fused.__class__ = _fused_class(type(model))
    fusion = fusion_of(fused)
    if fusion.module is None:
        raise ConversionError(f"{fusion.reason}; run the model as it is")
    return fused


def explain(model: nn.Module, *, device: str | None = None, dtype: torch.dtype | None = None) -> Explanation:
    """What `fuse` does with each layer of `model`, and why, and whether inference uses it; print it.

    `device` and `dtype` are those of the inference, by default the model's own.
    """
    fused = model
    if not isinstance(model, FusedForward):
        fused = copy.copy(model)
        fused.__class__ = _fused_class(type(model))
    fusion = fusion_of(fused)
    parameter = next(model.parameters(), torch.empty(0))
    return Explanation(fusion, _kernels(device or parameter.device.type, dtype or parameter.dtype))


@cache
def _fused_class(cls: type) -> type:
    return type(f"Fused{cls.__name__}", (FusedForward, cls), {"__module__": cls.__module__})


def _may_fuse(model: nn.Module, input: Tensor) -> bool:
    if model.training or not isinstance(input, Tensor) or _global_forward_hooks or _global_forward_pre_hooks:
        return False
    if not torch.compiler.is_compiling() and not _kernels(input.device.type, input.dtype):
        return False
    if torch.is_autocast_enabled(input.device.type):
        return False
    if not torch.is_grad_enabled():
        return True
    return not (input.requires_grad or any(p.requires_grad for p in model.parameters()))


def _kernels(device: str, dtype: torch.dtype) -> Verdict:
    if os.environ.get(FUSE_VARIABLE) == "0":
        return Verdict(False, f"{FUSE_VARIABLE}=0")
    return block_kernels(device, dtype)


_LOCK = threading.Lock()


def fusion_of(model: nn.Module) -> Fusion:
    """The fusion of `model` as it is now; made anew when modules, parameters or switches of it have changed."""
    known = model.__dict__.get(_STATE)
    if torch.compiler.is_compiling():
        # Nothing can be rewritten while torch traces; `fuse` has done it already.
        return known or Fusion(None, (), "torch.compile or torch.export came before `fuse`")
    signature = _signature(model)
    if known is not None and known.signature == signature:
        return known
    with _LOCK:
        fusion = _rewrite(model, signature)
        model.__dict__[_STATE] = fusion
    return fusion


def _rewrite(model: nn.Module, signature: tuple) -> Fusion:
    try:
        rewriter = Rewriter(model, _trace_unfused(model))
    except ConversionError as error:
        return Fusion(None, (), str(error), signature)
    module = fx.GraphModule(model, rewriter.run())
    module.graph.eliminate_dead_code()
    module.recompile()
    return Fusion(module, tuple(rewriter.layers), "", signature)


def _trace_unfused(model: nn.Module) -> fx.Graph:
    """Traces the forward of the class behind FusedForward."""
    plain = copy.copy(model)
    index = type(model).__mro__.index(FusedForward)
    plain.__class__ = type(model).__mro__[index + 1]
    return trace(plain)


def _signature(model: nn.Module) -> tuple:
    """Whatever a trace depends on: which modules, parameters and buffers there are, and their switches."""
    found: list = []
    for module in model.modules():
        found.append(id(module))
        found += [id(tensor) for tensor in module._parameters.values()]
        found += [id(tensor) for tensor in module._buffers.values()]
        found += [value for value in module.__dict__.values() if isinstance(value, bool | int | float)]
        found.append(bool(module._forward_hooks or module._forward_pre_hooks))
    return tuple(found)
