"""The training form of a network: its own modules, with norm and activation as one op and activations channels-last.

What changes is what lies between the convolutions on the CPU, where torch spends more time than in the convolutions of
a compressed network, convolutions of one tap, which are products at every voxel, and the layout that dense ones read.
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.instancenorm import _InstanceNorm

from tucker_ops.backends import cpu_derivative
from tucker_ops.backends.select import norm_act_kernels, pointwise_kernels
from tucker_ops.fused.graphs import computes_statistics, has_own_forward, hooked
from tucker_ops.nn import (
    TuckerConv2d,
    TuckerConv3d,
    TuckerConvTranspose2d,
    TuckerConvTranspose3d,
    spatial_core,
)

_WEIGHTS = ("u_in", "core", "u_taps", "u_out", "bias")


def train_form(model: nn.Module, graph: fx.Graph) -> tuple[fx.GraphModule, int]:
    """`graph`, traced from `model`, with each InstanceNorm and the LeakyReLU that alone reads it as `norm_act`.

    Returns the module, which shares all submodules and parameters, and how many norms were replaced.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    replaced = 0
    for node in list(graph.nodes):
        norm = modules.get(node.target) if node.op == "call_module" else None
        if not isinstance(norm, _InstanceNorm) or not computes_statistics(norm) or hooked(norm):
            continue
        if type(norm).forward is not _InstanceNorm.forward or not _holds(norm, ("weight", "bias")):
            continue
        activation = _activation_behind(node, modules)
        slope = 1.0 if activation is None else float(modules[activation.target].negative_slope)
        last = torch.channels_last if isinstance(norm, nn.InstanceNorm2d) else torch.channels_last_3d
        end = node if activation is None else activation
        with graph.inserting_before(end):
            weight, bias = (
                None if getattr(norm, name) is None else graph.get_attr(f"{node.target}.{name}")
                for name in ("weight", "bias")
            )
            value = graph.call_method("contiguous", (node.args[0],), {"memory_format": last})
            call = graph.call_function(
                torch.ops.tucker_ops.norm_act.default, (value, weight, bias, norm.eps, slope)
            )
            values = graph.call_function(operator.getitem, (call, 0))
        end.replace_all_uses_with(values)
        graph.erase_node(end)
        if activation is not None:
            graph.erase_node(node)
        replaced += 1
    for node in list(graph.nodes):
        _join(node, modules, graph)
        _take_pointwise(node, modules, graph)
    for node in list(graph.nodes):
        _hand_over_channels_last(node, modules, graph)
    module = fx.GraphModule(model, graph)
    module.graph.lint()
    return module, replaced


def _join(node: fx.Node, modules: dict[str, nn.Module], graph: fx.Graph) -> None:
    """A Tucker convolution that alone reads a `norm_act`: both as one function, which keeps the norm's input only."""
    conv = modules.get(node.target) if node.op == "call_module" else None
    if not isinstance(conv, TuckerConv2d | TuckerConv3d) or hooked(conv) or not has_own_forward(conv):
        return
    if not _holds(conv, _WEIGHTS):
        return
    values = node.args[0]
    call = values.args[0] if values.target is operator.getitem else None
    if call is None or call.target is not torch.ops.tucker_ops.norm_act.default or len(values.users) != 1:
        return
    with graph.inserting_before(node):
        weights = _tucker_weights(node, conv, graph)
        geometry = [list(v) for v in (conv.stride, conv.padding, conv.dilation)]
        joined = graph.call_function(norm_act_conv, (*call.args, *weights, *geometry))
    node.replace_all_uses_with(joined)
    for old in (node, values, call):
        graph.erase_node(old)


def _take_pointwise(node: fx.Node, modules: dict[str, nn.Module], graph: fx.Graph) -> None:
    """Convolutions of one tap, and the two around a transposed core, as `pointwise_conv`."""
    conv = modules.get(node.target) if node.op == "call_module" else None
    if isinstance(conv, nn.Conv2d | nn.Conv3d):
        dim = len(conv.kernel_size)
        geometry = (conv.kernel_size, conv.stride, conv.padding, conv.groups)
        names, arguments = ("weight", "bias"), ()
        if geometry != ((1,) * dim, (1,) * dim, (0,) * dim, 1):
            return
    elif isinstance(conv, TuckerConvTranspose2d | TuckerConvTranspose3d):
        names = _WEIGHTS
        arguments = (conv.stride, conv.padding, conv.output_padding, conv.dilation)
    else:
        return
    if hooked(conv) or not has_own_forward(conv) or not _holds(conv, names):
        return
    with graph.inserting_before(node):
        weights = _tucker_weights(node, conv, graph) if arguments else _attributes(node, conv, graph, names)
        function = tucker_conv_transpose if arguments else pointwise_conv
        value = graph.call_function(
            function, (node.args[0], *weights, *(list(values) for values in arguments))
        )
    node.replace_all_uses_with(value)
    graph.erase_node(node)


def _attributes(
    node: fx.Node, module: nn.Module, graph: fx.Graph, names: tuple[str, ...]
) -> list[fx.Node | None]:
    return [None if getattr(module, n) is None else graph.get_attr(f"{node.target}.{n}") for n in names]


def _tucker_weights(node: fx.Node, conv: nn.Module, graph: fx.Graph) -> list[fx.Node | None]:
    """u_in, the core that convolves, u_out and bias."""
    u_in, core, u_taps, u_out, bias = _attributes(node, conv, graph, _WEIGHTS)
    if u_taps is not None:
        core = graph.call_function(spatial_core, (core, u_taps, conv.kernel_size))
    return [u_in, core, u_out, bias]


def _hand_over_channels_last(node: fx.Node, modules: dict[str, nn.Module], graph: fx.Graph) -> None:
    """Dense convolutions read channels-last, whose output and gradient nothing then has to turn around."""
    conv = modules.get(node.target) if node.op == "call_module" else None
    if type(conv) in (nn.Conv2d, nn.Conv3d):
        with graph.inserting_before(node):
            node.replace_input_with(node.args[0], graph.call_function(channels_last, (node.args[0],)))


def channels_last(input: Tensor) -> Tensor:
    """`input` in this layout, by its strides too where a single channel fits both, which torch takes for contiguous."""
    if input.shape[1] == 1:
        return input.contiguous().squeeze(1).unsqueeze(-1).movedim(-1, 1)
    return input.contiguous(memory_format=torch.channels_last if input.dim() == 4 else torch.channels_last_3d)


def _holds(module: nn.Module, names: tuple[str, ...]) -> bool:
    """Are these its own parameters or None, not computed from others, of which a graph would keep the first value?"""
    return all(name in module._parameters for name in names)


def norm_act_conv(
    input: Tensor, weight, bias, eps: float, slope: float, u_in, core, u_out, conv_bias, stride, padding, dilation
) -> Tensor:  # fmt: skip
    """`norm_act`, then `tucker_conv`; the activated tensor between them is made again for the gradient."""
    if torch.is_autocast_enabled("cpu"):
        # What autocast does to the arguments of a convolution; inside, the function's own gradient would not see it.
        dtype = torch.get_autocast_dtype("cpu")
        u_in, core, u_out, conv_bias = (
            None if t is None else t.to(dtype) for t in (u_in, core, u_out, conv_bias)
        )
        input = input.to(dtype)
        with torch.autocast("cpu", enabled=False):
            return _NormActConv.apply(
                input, weight, bias, eps, slope, u_in, core, u_out, conv_bias, stride, padding, dilation
            )
    return _NormActConv.apply(
        input, weight, bias, eps, slope, u_in, core, u_out, conv_bias, stride, padding, dilation
    )


class _NormActConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, weight, bias, eps, slope, u_in, core, u_out, conv_bias, *geometry):
        values, mean, rstd = torch.ops.tucker_ops.norm_act(input, weight, bias, eps, slope)
        ctx.save_for_backward(input, mean, rstd, weight, bias, u_in, core, u_out)
        ctx.numbers, ctx.geometry = (eps, slope), geometry
        return torch.ops.tucker_ops.tucker_conv(values, u_in, core, u_out, conv_bias, *geometry)

    @staticmethod
    def backward(ctx, grad):
        input, mean, rstd, weight, bias, u_in, core, u_out = ctx.saved_tensors
        eps, slope = ctx.numbers
        need_input, need_weight, need_bias, _, _, *need_conv = ctx.needs_input_grad[:9]
        below = need_input or need_weight or need_bias
        if torch.is_grad_enabled() or not norm_act_kernels(input):
            # To be differentiated again, or on tensors that the compiled kernels do not take.
            values = torch.ops.tucker_ops.norm_act(input, weight, bias, eps, slope)[0]
        else:
            affine = (None if t is None else t.float().contiguous() for t in (weight, bias))
            values = torch.ops.tucker_ops._norm_act_again_cpu(input, mean, rstd, *affine, slope)
        wanted = [below, *need_conv]
        grads = torch.ops.tucker_ops.tucker_conv_backward(
            grad, values, u_in, core, u_out, *ctx.geometry, wanted
        )
        of_conv = [g if needed else None for g, needed in zip(grads[1:], need_conv, strict=True)]
        of_norm: list[Tensor | None] = [None] * 3
        if below:
            mask = [need_input, need_weight, need_bias]
            found = torch.ops.tucker_ops.norm_act_backward(
                grads[0], input, mean, rstd, weight, bias, eps, slope, mask
            )
            of_norm = [g if needed else None for g, needed in zip(found, mask, strict=True)]
        return *of_norm, None, None, *of_conv, None, None, None


def pointwise_conv(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A convolution of one tap; weight [A, C] or [A, C, 1, …]. Channels-last where our kernels compute it."""
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        input, weight, bias = (None if t is None else t.to(dtype) for t in (input, weight, bias))
        with torch.autocast("cpu", enabled=False):
            return _pointwise(input, weight, bias)
    return _pointwise(input, weight, bias)


def _pointwise(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if pointwise_kernels(input) and weight.dtype == input.dtype:
        return _Pointwise.apply(input, weight, bias)
    conv = F.conv2d if input.dim() == 4 else F.conv3d
    return conv(input, weight.reshape(*weight.shape[:2], *(1,) * (input.dim() - 2)), bias)


class _Pointwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, weight, bias):
        ctx.save_for_backward(input, weight)
        return cpu_derivative.pointwise(input, weight.flatten(1), bias)

    @staticmethod
    def backward(ctx, grad):
        input, weight = ctx.saved_tensors
        needed = list(ctx.needs_input_grad)
        matrix = weight.flatten(1)
        if torch.is_grad_enabled():
            # To be differentiated again.
            grads = (
                torch.einsum("ac,na...->nc...", matrix, grad),
                torch.einsum("nav,ncv->ac", grad.flatten(2), input.flatten(2)),
                grad.flatten(2).sum((0, 2)),
            )
        else:
            grads = cpu_derivative.pointwise_gradient(grad, input, matrix, *needed)
        shapes = (input.shape, weight.shape, (weight.shape[0],))
        return tuple(
            g.reshape(shape) if need else None for g, shape, need in zip(grads, shapes, needed, strict=True)
        )


def tucker_conv_transpose(
    input: Tensor, u_in, core, u_out, bias, stride, padding, output_padding, dilation
) -> Tensor:
    """The forward of TuckerConvTranspose2d and 3d, its outer stages by `pointwise_conv`."""
    transposed = F.conv_transpose2d if input.dim() == 4 else F.conv_transpose3d
    t = pointwise_conv(input, u_in, None)
    z = transposed(t, core, None, stride, padding, output_padding, dilation=dilation)
    return pointwise_conv(z, u_out, bias)


def _activation_behind(node: fx.Node, modules: dict[str, nn.Module]) -> fx.Node | None:
    """The LeakyReLU that is the only reader of `node`, if no hook wants to see what it reads."""
    if len(node.users) != 1:
        return None
    (user,) = node.users
    module = modules.get(user.target) if user.op == "call_module" else None
    return user if type(module) is nn.LeakyReLU and not hooked(module) else None
