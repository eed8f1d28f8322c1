"""Which convolutions one forward pass runs, in what order and at what size, without computing anything."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._pytree import tree_leaves

from tucker_ops.cost import Voxels

# Extents that survive the poolings of common networks; InstanceNorm needs more than one voxel at the bottom.
_PROBE_EXTENTS = (64, 128, 96, 256, 160, 192, 320, 512, 32)


@dataclass(frozen=True)
class Call:
    """One run of a module: shapes of its first input and of its output, and its place among all runs."""

    order: int
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    reads_input: bool
    returned: bool

    def voxels(self, ndim: int) -> Voxels:
        return Voxels(math.prod(self.input_shape[-ndim:]), math.prod(self.output_shape[-ndim:]))


@dataclass(frozen=True)
class Trace:
    """Runs of the watched modules, by id of the module; those that never ran have no entry."""

    input_shape: tuple[int, ...]
    calls: dict[int, tuple[Call, ...]]
    norm_elements: int

    @property
    def last(self) -> int | None:
        """id of the watched module that ran last."""
        return max(self.calls, key=lambda key: self.calls[key][-1].order, default=None)


def trace(model: nn.Module, watched: Sequence[nn.Module], input_shape: Sequence[int]) -> Trace:
    """Run `model` on an input of `input_shape` on the meta device and record the runs of `watched` modules.

    Parameters and buffers are replaced by meta tensors for the time of the call, so that nothing is computed,
    allocated or updated (running statistics included), and the random state is put back. Hooks that the user
    registered do run, on meta tensors. Raises whatever the model raises.
    """
    state = {
        f"{name}.{key}".lstrip("."): torch.empty_like(tensor, device="meta")
        for name, module in model.named_modules()
        for key, tensor in (*module._parameters.items(), *module._buffers.items())
        if tensor is not None
    }
    dtype = next((t.dtype for t in state.values() if t.is_floating_point()), torch.float32)
    probe = torch.empty(tuple(input_shape), device="meta", dtype=dtype)
    runs: list[tuple[int, Tensor, Tensor]] = []
    norm_elements = 0

    def record(module, args, kwargs, output):
        runs.append((id(module), args[0] if args else kwargs["input"], output))

    def count(module, args, output):
        nonlocal norm_elements
        norm_elements += output.numel()

    with ExitStack() as stack:
        for module in watched:
            stack.callback(module.register_forward_hook(record, with_kwargs=True).remove)
        for module in model.modules():
            if isinstance(module, _NormBase | nn.GroupNorm | nn.LayerNorm):
                stack.callback(module.register_forward_hook(count).remove)
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(torch.no_grad())
        # Each module object is named once above. Were torch to tie the names of a module registered twice, it
        # would swap its tensors twice and leave the meta ones behind.
        output = torch.func.functional_call(model, state, (probe,), tie_weights=False)

    returned = {id(leaf) for leaf in tree_leaves(output)}
    calls: dict[int, list[Call]] = {}
    for order, (key, x, y) in enumerate(runs):
        call = Call(order, tuple(x.shape), tuple(y.shape), x is probe, id(y) in returned)
        calls.setdefault(key, []).append(call)
    return Trace(tuple(input_shape), {key: tuple(value) for key, value in calls.items()}, norm_elements)


def probe_and_trace(model: nn.Module, watched: Sequence[nn.Module]) -> tuple[Trace | None, str]:
    """Trace on the first guessed input shape that the model accepts; (None, why not) if it accepts none.

    The guess is one image with the channels of the first registered convolution, and equal extents.
    """
    first = watched[0]
    problem = ""
    for extent in _PROBE_EXTENTS:
        shape = (1, first.in_channels) + (extent,) * len(first.kernel_size)
        try:
            return trace(model, watched, shape), ""
        # Any model may come in here, and raise anything when fed a guess.
        except Exception as error:
            problem = problem or f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return None, problem
