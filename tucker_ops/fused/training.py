"""The training form of a network: its own modules, with norm and activation as one op and activations channels-last.

The convolutions stay the modules they were, hooks and all; what changes is what lies between them on the CPU, where
torch spends more time than in the convolutions of a compressed network.
"""

from __future__ import annotations

import operator

import torch
from torch import fx, nn
from torch.nn.modules.instancenorm import _InstanceNorm

from tucker_ops.fused.graphs import computes_statistics, hooked


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
    module = fx.GraphModule(model, graph)
    module.graph.lint()
    return module, replaced


def _activation_behind(node: fx.Node, modules: dict[str, nn.Module]) -> fx.Node | None:
    """The LeakyReLU that is the only reader of `node`, if no hook wants to see what it reads."""
    if len(node.users) != 1:
        return None
    (user,) = node.users
    module = modules.get(user.target) if user.op == "call_module" else None
    return user if isinstance(module, nn.LeakyReLU) and not hooked(module) else None
