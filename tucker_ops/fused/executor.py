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

from tucker_ops.backends import native
from tucker_ops.backends.base import Verdict
from tucker_ops.backends.select import block_kernels
from tucker_ops.errors import ConfigError, ConversionError
from tucker_ops.fused.graphs import hooked, is_leaf, trace
from tucker_ops.fused.rewrite import Layer, Rewriter
from tucker_ops.fused.training import train_form

FUSE_VARIABLE = "TUCKER_FUSE"
PRECISION_VARIABLE = "TUCKER_PRECISION"
PRECISIONS = ("fp32", "bf16", "auto")
# Relative RMS difference of bf16 and fp32 output on the first input up to which "auto" takes bf16.
LARGEST_DIFFERENCE = 2.5e-2
_STATE = "_tucker_ops_fusion"
_TRAINING = "_tucker_ops_training"


@dataclass(frozen=True)
class Fusion:
    """A rewritten network, what became of each of its layers, and what it was made from.

    ``module`` is None where the network could not be rewritten, for ``reason``.
    """

    module: fx.GraphModule | None
    layers: tuple[Layer, ...]
    reason: str


@dataclass(frozen=True)
class Explanation:
    """What `fuse` makes of a model: print it.

    ``used``: does inference run fused, on the model's device and dtype? ``precision``: in what, and why.
    ``training``: does training run in a form of its own, and why not?
    """

    fusion: Fusion
    used: Verdict
    precision: str
    training: Verdict

    @property
    def layers(self) -> tuple[Layer, ...]:
        return self.fusion.layers

    @property
    def summary(self) -> str:
        """In one line."""
        if self.fusion.module is None:
            return f"runs as it was: {self.fusion.reason}"
        if not self.used:
            return f"runs as it was: {self.used.reason}"
        count = sum(layer.fused for layer in self.layers)
        return f"{count} of {len(self.layers)} layers fused; {self.used.reason}; {self.precision}"

    def __str__(self) -> str:
        width = max((len(layer.name) for layer in self.layers), default=0)
        lines = [self.summary, f"training: {self.training.reason}"]
        for layer in self.layers:
            state = "fused" if layer.fused else "left "
            lines.append(f"  {state} {layer.name:<{width}}  {layer.kind}: {layer.reason}")
        return "\n".join(lines)


class FusedForward:
    """Mixin in front of an nn.Module class: inference runs in blocks, everything else as in that class.

    Blocks run in evaluation mode where nothing requires a gradient and a kernel computes them: in autocast's dtype on a
    GPU, and on the CPU with autocast off; the
    variable TUCKER_FUSE=0 turns them off. ``precision`` (see `fuse`), where it is not set, is that of the variable
    TUCKER_PRECISION, or fp32; ``fused`` set to False turns blocks off for this object. Parameters, their names and
    the state dict stay those of the class, and weights may change or be loaded at any time. A network that cannot be
    traced runs as it was; `tucker_ops.fused.explain` says why.

    Training on the CPU runs channels-last, with each InstanceNorm and the LeakyReLU behind it as one op (`norm_act`),
    and convolutions of one tap as products at every voxel; the rest, and training elsewhere, is the class's own.
    """

    precision: str | None = None
    # False: inference runs as in the class behind this one.
    fused: bool = True

    def forward(self, input: Tensor):
        form = _form_for(self, input)
        if form is not None:
            return form(input)
        if not _may_fuse(self, input):
            return super().forward(input)
        fusion = fusion_of(self, _autocast_dtype(input))
        return super().forward(input) if fusion.module is None else _run(self, fusion, input)

    def __getstate__(self):
        return {name: value for name, value in self.__dict__.items() if name not in (_STATE, _TRAINING)}

    def __reduce_ex__(self, protocol):
        cls = type(self)
        if cls.__dict__.get("_made_by_fuse"):
            # Such a class has no name by which it could be found again.
            return _rebuild, (cls.__bases__[1],), self.__getstate__()
        return super().__reduce_ex__(protocol)


def fuse(model: nn.Module, *, precision: str | None = None) -> nn.Module:
    """`model` with its inference in fused blocks; shares all parameters and buffers with it.

    Takes PlainConvUNet, ResidualEncoderUNet and any other module that torch.fx can trace, compressed or dense, in
    2D and 3D; the output has the input's dtype. Layers that cannot be folded run as they were. Where a gradient is
    required, under autocast on the CPU or torch's global forward hooks, with TUCKER_FUSE=0, and where no kernel
    computes blocks of this dtype on this device, the whole model runs as it was; in training mode on the CPU as
    `tucker_ops.fused.training` makes it, unless told not to. Under autocast on a GPU the blocks of an fp32 model
    compute in autocast's dtype.
    `print(tucker_ops.fused.explain(model))` says what happens and why.

    `precision` is that of the blocks of an fp32 model: "fp32"; "bf16"; or "auto", which is bf16 where the processor
    multiplies it and the first output differs from fp32's by at most LARGEST_DIFFERENCE. None leaves it to the variable
    TUCKER_PRECISION. Accumulation, norms and statistics are fp32 in any case.

    Raises ConversionError for what is not a module or cannot be traced, ConfigError for an unknown precision.
    """
    if not isinstance(model, nn.Module):
        raise ConversionError(f"fuse takes a torch.nn.Module, got {type(model).__name__}")
    if precision is not None:
        _check_precision(precision, "precision")
    fused = copy.copy(model)
    if not isinstance(model, FusedForward):
        fused.__class__ = _fused_class(type(model))
    elif precision in (None, model.precision):
        return model
    fused.precision = precision
    fusion = fusion_of(fused)
    if fusion.module is None:
        raise ConversionError(f"{fusion.reason}; run the model as it is")
    for dtype in _dtypes_to_come(fused):
        # torch.compile finds what there is, and cannot rewrite anything itself.
        fusion_of(fused, dtype)
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
    dtype = dtype or parameter.dtype
    used = _kernels(device or parameter.device.type, dtype)
    if not fused.fused:
        used = Verdict(False, "turned off for this network")
    training = _may_train(fused, device or parameter.device.type) and _train_form(fused).verdict
    return Explanation(fusion, used, _chosen(fused, dtype).reason, training)


def _dtypes_to_come(model: nn.Module) -> tuple[torch.dtype, ...]:
    """In what, beside its own dtype, a model may be asked to compute: by precision, or by autocast on a GPU."""
    parameter = next(model.parameters(), None)
    if parameter is None or parameter.dtype != torch.float32:
        return ()
    if parameter.is_cuda:
        return (torch.float16, torch.bfloat16)
    return (torch.bfloat16,) if model.precision == "bf16" else ()


@cache
def _fused_class(cls: type) -> type:
    names = {"__module__": cls.__module__, "_made_by_fuse": True}
    return type(f"Fused{cls.__name__}", (FusedForward, cls), names)


def _rebuild(cls: type) -> nn.Module:
    """An empty fused model of a class, for copy and pickle to fill."""
    fused = _fused_class(cls)
    return fused.__new__(fused)


def _may_fuse(model: nn.Module, input: Tensor) -> bool:
    if (
        model.training
        or not model.fused
        or not isinstance(input, Tensor)
        or _global_forward_hooks
        or _global_forward_pre_hooks
    ):
        return False
    dtype = _autocast_dtype(input) or input.dtype
    if not torch.compiler.is_compiling() and not _kernels(input.device.type, dtype):
        return False
    if torch.is_autocast_enabled(input.device.type) and _autocast_dtype(input) is None:
        return False
    if not torch.is_grad_enabled():
        return True
    return not (input.requires_grad or any(p.requires_grad for p in model.parameters()))


def _form_for(model: nn.Module, input: Tensor) -> fx.GraphModule | None:
    """What runs in the place of the model's own forward in training, if anything."""
    if (
        not model.training
        or not isinstance(input, Tensor)
        or input.dtype not in (torch.float32, torch.bfloat16)
        or torch.compiler.is_compiling()
        or _global_forward_hooks
        or _global_forward_pre_hooks
        or not _may_train(model, input.device.type)
    ):
        return None
    return _train_form(model).module


def _may_train(model: nn.Module, device: str) -> Verdict:
    """May a training form run on this kind of device, if the network has one? With the reason."""
    if device != "cpu":
        return Verdict(False, f"as it was: its form is made for the CPU, and tensors are on {device}")
    if not model.fused:
        return Verdict(False, "as it was: turned off for this network")
    if os.environ.get(FUSE_VARIABLE) == "0":
        return Verdict(False, f"as it was: {FUSE_VARIABLE}=0")
    if not native.load():
        return Verdict(False, f"as it was: {native.load().reason}")
    return Verdict(True, "on the CPU")


@dataclass(frozen=True)
class _TrainForm:
    """What runs in training, None for the model's own forward, and why."""

    module: fx.GraphModule | None
    verdict: Verdict


def _train_form(model: nn.Module) -> _TrainForm:
    """Made anew when anything it depends on has changed."""
    signature = _signature(model)
    known = model.__dict__.get(_TRAINING)
    if known is None or known[0] != signature:
        known = model.__dict__[_TRAINING] = (signature, _make_train_form(model))
    return known[1]


def _make_train_form(model: nn.Module) -> _TrainForm:
    # Before tracing, which would call such hooks.
    for name, module in model.named_modules():
        if module is not model and hooked(module) and not is_leaf(module):
            return _TrainForm(
                None, Verdict(False, f"as it was: {name} has hooks, which its form would pass by")
            )
    try:
        form, replaced = train_form(model, _trace_unfused(model))
    except ConversionError as error:
        return _TrainForm(None, Verdict(False, f"as it was: {error}"))
    if not replaced:
        return _TrainForm(None, Verdict(False, "as it was: no InstanceNorm without running statistics"))
    text = f"channels-last, {replaced} norms as one op with what stands around them"
    return _TrainForm(form, Verdict(True, text))


def _autocast_dtype(input: Tensor) -> torch.dtype | None:
    """In what a float32 network computes under autocast on a GPU; None without autocast, and elsewhere.

    On the CPU autocast stays torch's own: precision is `fuse`'s there.
    """
    if not input.is_cuda or input.dtype != torch.float32 or not torch.is_autocast_enabled("cuda"):
        return None
    return torch.get_autocast_dtype("cuda")


def _kernels(device: str, dtype: torch.dtype) -> Verdict:
    if os.environ.get(FUSE_VARIABLE) == "0":
        return Verdict(False, f"{FUSE_VARIABLE}=0")
    return block_kernels(device, dtype)


_LOCK = threading.Lock()


@dataclass
class _State:
    """Fusions of a model by the dtype of their blocks, None for the model's own, and what "auto" chose."""

    signature: tuple
    fusions: dict[torch.dtype | None, Fusion]
    automatic: _Choice | None = None


@dataclass(frozen=True)
class _Choice:
    """The dtype in which blocks compute, None for the input's, and why. ``final``: not to be tried out any more."""

    dtype: torch.dtype | None
    reason: str
    final: bool = True


def fusion_of(model: nn.Module, dtype: torch.dtype | None = None) -> Fusion:
    """The fusion of `model` as it is now; made anew when modules, parameters or switches of it have changed."""
    state = model.__dict__.get(_STATE)
    if torch.compiler.is_compiling():
        # Nothing can be rewritten while torch traces; `fuse` has done it already.
        known = state and state.fusions.get(dtype)
        return known or Fusion(None, (), "torch.compile or torch.export came before `fuse`")
    signature = _signature(model)
    if state is not None and state.signature == signature and dtype in state.fusions:
        return state.fusions[dtype]
    with _LOCK:
        if state is None or state.signature != signature:
            state = _State(signature, {})
        state.fusions[dtype] = _rewrite(model, dtype)
        model.__dict__[_STATE] = state
    return state.fusions[dtype]


def _run(model: nn.Module, fusion: Fusion, input: Tensor):
    """`fusion` is that in the model's own dtype, or in autocast's."""
    if _autocast_dtype(input) is not None:
        with torch.autocast("cuda", enabled=False):
            return fusion.module(input)
    choice = _chosen(model, input.dtype)
    if choice.final:
        return (fusion if choice.dtype is None else fusion_of(model, choice.dtype)).module(input)
    exact = fusion.module(input)
    low = fusion_of(model, torch.bfloat16).module(input)
    difference = max(_relative_rms(a, b) for a, b in zip(_tensors(low), _tensors(exact), strict=True))
    good = difference <= LARGEST_DIFFERENCE
    model.__dict__[_STATE].automatic = _Choice(
        torch.bfloat16 if good else None,
        f"{'bf16' if good else 'fp32'}: on the first input bf16 and fp32 differ by {difference:.1e} of the output's "
        f"root mean square, limit {LARGEST_DIFFERENCE}",
    )
    return low if good else exact


def _tensors(output) -> list[Tensor]:
    return list(output) if isinstance(output, list | tuple) else [output]


def _relative_rms(a: Tensor, b: Tensor) -> float:
    return ((a - b).square().mean() / b.square().mean()).sqrt().item()


def _chosen(model: nn.Module, dtype: torch.dtype) -> _Choice:
    """In what the blocks of `model` compute for an input of this dtype, as far as that is known before it has run."""
    if dtype != torch.float32:
        return _Choice(None, f"{str(dtype).removeprefix('torch.')}, the dtype of the model")
    given = model.precision
    if given is None:
        given = _check_precision(os.environ.get(PRECISION_VARIABLE) or PRECISIONS[0], PRECISION_VARIABLE)
    if given == "fp32":
        return _Choice(None, "fp32")
    if given == "bf16":
        return _Choice(torch.bfloat16, "bf16, as asked for")
    if not native.multiplies_bfloat16():
        return _Choice(None, f"fp32: {native.isa()} kernels do not multiply bf16")
    state = model.__dict__.get(_STATE)
    if state is not None and state.automatic is not None:
        return state.automatic
    return _Choice(None, "bf16 or fp32: the first input decides", final=False)


def _check_precision(given: str, name: str) -> str:
    if given not in PRECISIONS:
        raise ConfigError(f"{name} {given!r} given; use one of {', '.join(PRECISIONS)}")
    return given


def _rewrite(model: nn.Module, dtype: torch.dtype | None) -> Fusion:
    try:
        rewriter = Rewriter(model, _trace_unfused(model), dtype)
    except ConversionError as error:
        return Fusion(None, (), str(error))
    module = fx.GraphModule(model, rewriter.run())
    module.graph.eliminate_dead_code()
    module.recompile()
    return Fusion(module, tuple(rewriter.layers), "")


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
        # What pays is another thing on another device.
        found += [str(tensor.device) for tensor in module._parameters.values() if tensor is not None]
        found += [id(tensor) for tensor in module._buffers.values()]
        found += [value for value in module.__dict__.values() if isinstance(value, bool | int | float)]
        found.append((bool(module._forward_hooks or module._forward_pre_hooks), hooked(module)))
    return tuple(found)
