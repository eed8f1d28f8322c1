"""Rewrites a traced network into blocks.

Every value of the old graph is kept as what it will cost least to read: a tensor, a tensor with a norm and an
activation pending, an upsampling of one, a sum of two, or a concatenation of those. Convolutions read all of them, a
sum once it is computed; for any other reader the value becomes a tensor first.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm

from tucker_ops.backends.cpu import MOST_SOURCES, SIDE_BY_SIDE
from tucker_ops.errors import ConversionError
from tucker_ops.fused import arithmetic, graphs
from tucker_ops.fused.values import Concatenated, Pending, Summed, Upsampled, Value
from tucker_ops.nn import _TuckerConv, spatial_core, spec_of

_BLOCK = torch.ops.tucker_ops.tucker_block.default
_MERGE = torch.ops.tucker_ops.tucker_merge.default
# Rank space saves memory and costs an expansion in every reader, which nothing makes up for where the tensor is in the
# cache anyway. So only tensors of at least this share of the network's largest are kept in it, …
LEAST_SIZE_SHARE = 0.5
# … and only where ranks are at most this share of the channels.
LARGEST_RANK_SHARE = 0.75
_ADDITIONS = (operator.add, operator.iadd, torch.add)


@dataclass(frozen=True)
class Layer:
    """What became of one module: fused, or left as it was, and why."""

    name: str
    kind: str
    fused: bool
    reason: str


@dataclass
class Rewriter:
    """One rewrite of `old`, the graph of `model`, into `new`.

    Blocks compute in `dtype` where it is given, everything else in the dtype of the network's input.
    """

    model: nn.Module
    old: fx.Graph
    dtype: torch.dtype | None = None
    new: fx.Graph = field(default_factory=fx.Graph)
    values: dict[fx.Node, Value] = field(default_factory=dict)
    layers: list[Layer] = field(default_factory=list)
    tensors: dict[Value, fx.Node] = field(default_factory=dict)
    merges: dict[Value, Pending] = field(default_factory=dict)
    sizes: dict[fx.Node, float] = field(default_factory=dict)

    def __post_init__(self):
        self.sizes = graphs.sizes(self.model, self.old)

    def run(self) -> fx.Graph:
        for node in self.old.nodes:
            if node.op == "output":
                self.new.output(fx.map_arg(node.args[0], self.result_of))
            else:
                self.values[node] = self.rewrite(node)
        self.new.lint()
        return self.new

    def rewrite(self, node: fx.Node) -> Value:
        if node.op == "call_module":
            module = self.model.get_submodule(node.target)
            for kinds, rule in _MODULES:
                if isinstance(module, kinds) and not node.kwargs and len(node.args) == 1:
                    if module._forward_hooks or module._forward_pre_hooks:
                        self.left(node, module, "has forward hooks, which would not run")
                        break
                    value = rule(self, node, module, self.values[node.args[0]])
                    if value is not None:
                        return value
                    break
        elif node.op == "call_function" and node.target in (torch.cat, torch.concat):
            value = self.concatenate(node)
            if value is not None:
                return value
        elif node.op == "call_function" and node.target in _ADDITIONS:
            value = self.add(node)
            if value is not None:
                return value
        copied = self.new.node_copy(node, self.tensor_of)
        return Pending(copied)

    # Readers that need a tensor.

    def result_of(self, node: fx.Node) -> fx.Node:
        value, tensor = self.values[node], self.tensor_of(node)
        if not (isinstance(value, Summed) or (isinstance(value, Pending) and value.from_block)):
            return tensor
        return self.call(arithmetic.laid_out_like, tensor, self.input)

    @property
    def input(self) -> fx.Node:
        return next(iter(self.new.nodes))

    def tensor_of(self, node: fx.Node) -> fx.Node:
        return self.materialise(self.values[node])

    def materialise(self, value: Value) -> fx.Node:
        if value not in self.tensors:
            self.tensors[value] = self._materialise(value)
        return self.tensors[value]

    def _materialise(self, value: Value) -> fx.Node:
        if isinstance(value, Upsampled):
            return self.new.call_module(value.target, (self.materialise(value.below),))
        if isinstance(value, Concatenated):
            return self.call(torch.cat, tuple(self.materialise(part) for part in value.parts), 1)
        result = self.merged(value)
        if result.from_block and self.dtype is not None and not result.is_result:
            return self.call(arithmetic.in_dtype_of, result.values, self.input)
        return result.values

    def merged(self, value: Pending | Summed) -> Pending:
        """As values with nothing pending; computed once, however many read it."""
        if isinstance(value, Pending) and value.is_raw:
            return value
        if value not in self.merges:
            parts = value.parts if isinstance(value, Summed) else (replace(value, slope=1.0),)
            from_block = all(part.from_block for part in parts)
            values = [self.channels_of(part, from_block) for part in parts]
            slopes = [float(part.slope) for part in parts]
            scale, shift = [part.scale for part in parts], [part.shift for part in parts]
            node = self.call(_MERGE, values, scale, shift, slopes, float(value.slope))
            self.merges[value] = Pending(node, from_block=from_block)
        return self.merges[value]

    def call(self, function: Callable, *args) -> fx.Node:
        return self.new.call_function(function, args)

    def product(self, function: Callable, *args) -> fx.Node:
        """A function of weights alone, computed when they change."""
        return self.call(arithmetic.Remembered(function), *args)

    def attribute(self, target: str, name: str) -> fx.Node | None:
        """A parameter or buffer of a module, or None where it has none."""
        if getattr(self.model.get_submodule(target), name, None) is None:
            return None
        return self.new.get_attr(f"{target}.{name}")

    def weight(self, target: str, name: str) -> fx.Node | None:
        """A parameter in the dtype in which blocks compute."""
        return self.in_block_dtype(self.attribute(target, name))

    def spatial_core(self, target: str) -> fx.Node:
        """The core with which a factorised layer convolves, as `weight`: multiplied out before it is rounded."""
        core, u_taps = (self.attribute(target, name) for name in ("core", "u_taps"))
        if u_taps is not None:
            kernel_size = self.model.get_submodule(target).kernel_size
            core = self.product(spatial_core, core, u_taps, kernel_size)
        return self.in_block_dtype(core)

    def in_block_dtype(self, weight: fx.Node | None) -> fx.Node | None:
        if weight is None or self.dtype is None:
            return weight
        return self.call(torch.Tensor.to, weight, self.dtype)

    def block_values(self, value: Pending) -> fx.Node:
        if value.from_block or self.dtype is None:
            return value.values
        return self.call(torch.Tensor.to, value.values, self.dtype)

    def channels_of(self, value: Pending, in_block_dtype: bool) -> fx.Node:
        values = self.block_values(value) if in_block_dtype else value.values
        return values if value.expand is None else self.call(arithmetic.expanded, values, value.expand)

    def left(self, node: fx.Node, module: nn.Module, reason: str) -> None:
        self.layers.append(Layer(node.target, type(module).__name__, False, reason))

    def fused(self, node: fx.Node, module: nn.Module, reason: str) -> None:
        self.layers.append(Layer(node.target, type(module).__name__, True, reason))

    # Modules.

    def convolution(self, node: fx.Node, module: nn.Module, value: Value) -> Value | None:
        try:
            spec = spec_of(module)
        except ConversionError as error:
            return self.left(node, module, str(error))
        if spec.groups != 1:
            return self.left(node, module, f"{spec.groups} groups")
        if not graphs.has_own_forward(module):
            return self.left(node, module, "has a forward or a weight of another class")
        tucker = isinstance(module, _TuckerConv)
        core = self.spatial_core(node.target) if tucker else self.weight(node.target, "weight")
        u_in = self.weight(node.target, "u_in") if tucker else None
        u_out = self.weight(node.target, "u_out") if tucker else None
        readers = [self.model.get_submodule(u.target) for u in node.users if u.op == "call_module"]
        normed = any(graphs.computes_statistics(reader) for reader in readers)
        # A bias cancels in a norm of the convolution's own output.
        only_normed = normed and len(node.users) == 1
        bias = None if only_normed else self.weight(node.target, "bias")
        in_rank_space = tucker and only_normed and self._pays_in_rank_space(node, module)

        if isinstance(value, Concatenated) and len(value.parts) > MOST_SOURCES:
            value = Pending(self.materialise(value))
        parts = value.parts if isinstance(value, Concatenated) else (value,)
        parts = tuple(self.merged(part) if isinstance(part, Summed) else part for part in parts)
        widths = value.channels if isinstance(value, Concatenated) else (spec.in_channels,)
        side_by_side = u_in is None and all(width % SIDE_BY_SIDE == 0 for width in widths[:-1])
        if u_in is None and not side_by_side:
            u_in = self.product(arithmetic.identity, core)
        reads = [part.below if isinstance(part, Upsampled) else part for part in parts]
        reduce, in_bias = self._reduced(parts, widths, u_in)
        stats = "covariance" if in_rank_space else "channel" if normed else "none"
        returned = all(user.op == "output" for user in node.users)
        # Of a result in 16 bits the input's dtype, float32, would be made at once.
        as_input = returned and self.dtype in (torch.bfloat16, torch.float16)
        result = self.call(
            _BLOCK,
            [self.block_values(read) for read in reads],
            [read.expand for read in reads],
            [read.scale for read in reads],
            [read.shift for read in reads],
            [float(read.slope) for read in reads],
            reduce,
            in_bias,
            core,
            list(spec.stride),
            list(spec.padding),
            list(spec.dilation),
            None if in_rank_space else u_out,
            bias,
            stats,
            returned,
            as_input,
        )
        folded = [f"{len(parts)} sources"] if len(parts) > 1 else []
        if any(isinstance(part, Upsampled) for part in parts):
            folded.append("upsampling and cat")
        if not all(read.is_raw for read in reads):
            folded.append("norm and activation before it")
        if in_rank_space:
            folded.append(f"output kept in rank space, {module.ranks[1]} of {spec.out_channels} channels")
        if normed:
            folded.append("statistics for the norm after it")
        self.fused(node, module, ", ".join(folded) or "one pass")
        values, mean, m2 = (self.call(operator.getitem, result, i) for i in range(3))
        if not normed:
            return Pending(values, from_block=True, is_result=as_input)
        return Pending(values, mean=mean, m2=m2, expand=u_out if in_rank_space else None, from_block=True)

    def _reduced(
        self, parts: tuple[Pending | Upsampled, ...], widths: tuple[int, ...], u_in: fx.Node | None
    ) -> tuple[list[fx.Node | None], fx.Node | None]:
        """For every part the matrix that makes the core's input of it, upsampling multiplied in, and the in_bias."""
        matrices, in_bias, begin = [], None, 0
        for part, width in zip(parts, widths, strict=True):
            end, matrix = begin + width, u_in
            if isinstance(part, Upsampled):
                weight, bias = self.transposed_weight(part), self.weight(part.target, "bias")
                matrix = self.product(arithmetic.upsampling, u_in, begin, end, weight)
                if bias is not None:
                    place = (begin, end, sum(widths))
                    in_bias = self.product(arithmetic.carried_bias, u_in, *place, bias, in_bias)
            elif len(parts) > 1 and u_in is not None:
                matrix = self.product(arithmetic.columns, u_in, begin, end)
            matrices.append(matrix)
            begin = end
        return matrices, in_bias

    def _pays_in_rank_space(self, node: fx.Node, module: nn.Module) -> bool:
        """Does it save memory at the peak, and is every reader behind the norm a convolution that can expand it?"""
        if module.core.is_cuda:
            # The GPU's kernels write a source in rank space out before they read it.
            return False
        if module.ranks[1] > LARGEST_RANK_SHARE * module.out_channels:
            return False
        size = self.sizes.get(node, 0)
        if size < LEAST_SIZE_SHARE * max(self.sizes.values(), default=0):
            return False
        return all(self._is_wide_convolution(user) for user in self._readers_behind_norm(node))

    def _readers_behind_norm(self, node: fx.Node) -> list[fx.Node]:
        readers: list[fx.Node] = []
        for user in graphs.readers_behind_cat(node):
            if user.op == "call_module" and isinstance(self.model.get_submodule(user.target), _POINTWISE):
                readers += self._readers_behind_norm(user)
            else:
                readers.append(user)
        return readers

    def transposed_weight(self, part: Upsampled) -> fx.Node:
        if isinstance(part.module, _TuckerConv):
            u_in, u_out = (self.weight(part.target, name) for name in ("u_in", "u_out"))
            return self.product(arithmetic.tucker_weight, u_in, self.spatial_core(part.target), u_out)
        return self.weight(part.target, "weight")

    def transposed_convolution(self, node: fx.Node, module: nn.Module, value: Value) -> Value | None:
        if isinstance(value, Concatenated | Upsampled):
            return self.left(node, module, "reads an upsampling or a concatenation")
        if isinstance(value, Summed):
            value = self.merged(value)
        spec = spec_of(module)
        if (
            spec.kernel_size != spec.stride
            or any((*spec.padding, *spec.output_padding))
            or any(d != 1 for d in spec.dilation)
            or spec.groups != 1
        ):
            return self.left(
                node, module, "its kernel is not its stride, so its outputs overlap or leave gaps"
            )
        if not graphs.has_own_forward(module):
            return self.left(node, module, "has a forward or a weight of another class")
        if not all(self._is_wide_convolution(user) for user in graphs.readers_behind_cat(node)):
            return self.left(node, module, "read by something else than convolutions of the same network")
        self.fused(node, module, "multiplied into the convolution that reads it")
        return Upsampled(value, module, node.target, spec.out_channels)

    def _is_wide_convolution(self, node: fx.Node) -> bool:
        if node.op != "call_module":
            return False
        module = self.model.get_submodule(node.target)
        return isinstance(module, nn.Conv2d | nn.Conv3d) or (
            isinstance(module, _TuckerConv) and not module.transposed
        )

    def concatenate(self, node: fx.Node) -> Value | None:
        tensors, dim = node.args[0], node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        if dim != 1 or not isinstance(tensors, list | tuple):
            return None
        parts, channels = [], []
        for old in tensors:
            value = self.values[old]
            width = self.width_of(old)
            if isinstance(value, Concatenated) or width is None:
                return None
            parts.append(value)
            channels.append(width)
        return Concatenated(tuple(parts), tuple(channels))

    def add(self, node: fx.Node) -> Value | None:
        """A residual addition of two tensors of a block's making, of one shape."""
        if len(node.args) != 2 or node.kwargs or not all(isinstance(arg, fx.Node) for arg in node.args):
            return None
        if node.target is operator.iadd and len(node.args[0].users) > 1:
            return None
        values = [self.values[arg] for arg in node.args]
        values = [self.merged(value) if isinstance(value, Summed) else value for value in values]
        widths = {self.width_of(arg) for arg in node.args}
        if (
            not all(isinstance(v, Pending) and v.from_block for v in values)
            or len(widths) != 1
            or None in widths
        ):
            return None
        self.layers.append(
            Layer(node.name, "addition", True, "norms before and activation behind it in one pass")
        )
        return Summed(tuple(values))

    def width_of(self, node: fx.Node) -> int | None:
        """Channels of a value of the old graph, where the modules behind it tell."""
        if node.op == "call_function" and node.target in _ADDITIONS and isinstance(node.args[0], fx.Node):
            return self.width_of(node.args[0])
        if node.op != "call_module" or not node.args:
            return None
        module = self.model.get_submodule(node.target)
        for name in ("out_channels", "num_features"):
            if isinstance(getattr(module, name, None), int):
                return getattr(module, name)
        if isinstance(module, (*_PASSED_ON, nn.LeakyReLU)):
            return self.width_of(node.args[0])
        return None

    def instance_norm(self, node: fx.Node, module: nn.Module, value: Value) -> Value | None:
        if module.track_running_stats:
            return self.left(node, module, "normalises by running statistics")
        if not isinstance(value, Pending) or value.mean is None or value.is_normed:
            return self.left(node, module, "does not follow a convolution directly")
        weight, bias = self.attribute(node.target, "weight"), self.attribute(node.target, "bias")
        statistics = (value.values, value.mean, value.m2)
        if value.expand is None:
            affine = self.call(arithmetic.instance_norm_affine, *statistics, weight, bias, module.eps)
        else:
            affine = self.call(
                arithmetic.rank_norm_affine, *statistics, value.expand, weight, bias, module.eps
            )
        return self._normed(node, module, value, affine)

    def batch_norm(self, node: fx.Node, module: nn.Module, value: Value) -> Value | None:
        if not isinstance(value, Pending) or not value.is_raw or module.running_mean is None:
            return self.left(
                node, module, "does not follow a convolution directly, or has no running statistics"
            )
        names = ("running_mean", "running_var", "weight", "bias")
        tensors = (self.attribute(node.target, name) for name in names)
        return self._normed(
            node, module, value, self.call(arithmetic.batch_norm_affine, value.values, *tensors, module.eps)
        )

    def _normed(self, node: fx.Node, module: nn.Module, value: Pending, affine: fx.Node) -> Pending:
        self.fused(node, module, "applied where its output is read")
        scale, shift = self.call(operator.getitem, affine, 0), self.call(operator.getitem, affine, 1)
        return Pending(value.values, scale, shift, expand=value.expand, from_block=value.from_block)

    def leaky_relu(self, node: fx.Node, module: nn.Module, value: Value) -> Value | None:
        folds = isinstance(value, Summed) or (isinstance(value, Pending) and value.from_block)
        if not folds or value.slope != 1.0:
            return self.left(node, module, "does not follow a convolution or norm that is folded")
        if module.inplace and len(node.args[0].users) > 1:
            return self.left(node, module, "changes in place what something else reads too")
        self.fused(node, module, "applied where its output is read")
        return replace(value, slope=float(module.negative_slope))

    def passed_on(self, node: fx.Node, module: nn.Module, value: Value) -> Value:
        return value


_PASSED_ON = (nn.Identity, _DropoutNd)
_POINTWISE = (*_PASSED_ON, _InstanceNorm, nn.LeakyReLU)
_MODULES: tuple[tuple[type | tuple[type, ...], Callable], ...] = (
    ((nn.ConvTranspose2d, nn.ConvTranspose3d), Rewriter.transposed_convolution),
    (
        (nn.Conv2d, nn.Conv3d, _TuckerConv),
        lambda self, node, module, value: (
            self.transposed_convolution(node, module, value)
            if getattr(module, "transposed", False)
            else self.convolution(node, module, value)
        ),
    ),
    (_InstanceNorm, Rewriter.instance_norm),
    (_BatchNorm, Rewriter.batch_norm),
    (nn.LeakyReLU, Rewriter.leaky_relu),
    (_PASSED_ON, Rewriter.passed_on),
)
