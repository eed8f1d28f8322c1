"""The training form of a network: its own modules, with norm and activation as one op and activations channels-last.

What changes is what lies between the convolutions on the CPU, where torch spends more time than in the convolutions of
a compressed network, convolutions of one tap, which are products at every voxel, dense ones to which Winograd applies,
and the layout that the others read. What stands in the graph instead is in `tucker_ops.fused.differentiable`.
"""

from __future__ import annotations

import operator

import torch
from torch import fx, nn
from torch.nn.modules.instancenorm import _InstanceNorm

from tucker_ops.fused.differentiable import (
    channels_last,
    dense_conv,
    norm_act_conv,
    pointwise_conv,
    tucker_conv_transpose,
)
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
    if type(conv) not in (nn.Conv2d, nn.Conv3d):
        return
    with graph.inserting_before(node):
        node.replace_input_with(node.args[0], graph.call_function(channels_last, (node.args[0],)))
        if hooked(conv) or not _holds(conv, ("weight", "bias")) or not _suits_winograd(conv):
            return
        weights = _attributes(node, conv, graph, ("weight", "bias"))
        value = graph.call_function(dense_conv, (node.args[0], *weights, list(conv.padding)))
    node.replace_all_uses_with(value)
    graph.erase_node(node)


def _suits_winograd(conv: nn.Conv2d | nn.Conv3d) -> bool:
    """3×3 taps in the plane, next to each other, at every voxel, and zeros around."""
    ones = (1,) * len(conv.kernel_size)
    geometry = (conv.kernel_size[-2:], conv.stride, conv.dilation, conv.groups, conv.padding_mode)
    return geometry == ((3, 3), ones, ones, 1, "zeros") and not isinstance(conv.padding, str)


def _holds(module: nn.Module, names: tuple[str, ...]) -> bool:
    """Are these its own parameters or None, not computed from others, of which a graph would keep the first value?"""
    return all(name in module._parameters for name in names)


def _activation_behind(node: fx.Node, modules: dict[str, nn.Module]) -> fx.Node | None:
    """The LeakyReLU that is the only reader of `node`, if no hook wants to see what it reads."""
    if len(node.users) != 1:
        return None
    (user,) = node.users
    module = modules.get(user.target) if user.op == "call_module" else None
    return user if type(module) is nn.LeakyReLU and not hooked(module) else None
