"""`reference`: three torch convolutions. Runs wherever torch convolves; the last choice."""

from __future__ import annotations

import torch
from torch import Tensor

from tucker_ops.backends.base import Backend, Derivative, Verdict
from tucker_ops.ops.block import block_memory_format
from tucker_ops.ops.reference import (
    block,
    memory_format,
    three_convs,
    three_convs_backward,
    three_stages,
)


def _run(input: Tensor, *args) -> Tensor:
    # torch's own choice of layout depends on the library it calls; ours depends on the input alone.
    return three_convs(input, *args).contiguous(memory_format=memory_format(input))


def _run_block(*args) -> tuple[Tensor, Tensor, Tensor]:
    *call, contiguous, float32_values = args
    values, mean, m2 = block(*call, values_dtype=torch.float32 if float32_values else None)
    return values.contiguous(memory_format=block_memory_format(values.dim() - 2, contiguous)), mean, m2


def _stages(input: Tensor, *args) -> tuple[Tensor, Tensor, Tensor]:
    values, t, z = three_stages(input, *args)
    last = block_memory_format(input.dim() - 2, False)
    return (
        values.contiguous(memory_format=memory_format(input)),
        t.contiguous(memory_format=last),
        z.contiguous(memory_format=last),
    )


REFERENCE = Backend(
    name="reference",
    device=None,
    available=lambda: Verdict(True, "plain PyTorch"),
    supports=lambda problem: Verdict(True, "runs every problem"),
    prefers=lambda problem: Verdict(True, "the fallback"),
    run=_run,
    describe=lambda problem: "torch's convolution, three times",
    supports_block=lambda problem: Verdict(True, "runs every block"),
    run_block=_run_block,
    derivative=Derivative(
        supports=lambda problem: Verdict(True, "runs every problem"),
        prefers=lambda problem: Verdict(True, "the fallback"),
        run=three_convs_backward,
        stages=_stages,
    ),
)
