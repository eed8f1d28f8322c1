"""One block of 32 channels at rank 16: norm and activation of the block before, convolution, and statistics.

A fused network computes it in one op, which reads raw values with a norm pending and leaves raw values and their
statistics. Modules are given what the block before has normed and activated, and norm and activate themselves.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from bench import network_cases
from bench.gpu.clock import Call, Clock
from bench.gpu.turns import (
    COMPILED,
    DENSE,
    OURS,
    THREE_CONVS,
    Peer,
    Settings,
    forget_compiled,
    measure,
    without_trials,
)
from bench.network_cases import as_convolutions
from bench.operands import relative_rms
from tucker_ops import CompressionConfig, fuse, fused
from tucker_ops.convert.apply import substitute
from tucker_ops.convert.plan import plan
from tucker_ops.cost import one_pass_cost
from tucker_ops.fused.arithmetic import instance_norm_affine
from tucker_ops.nn import spec_of

CHANNELS, EXTENT, FACTOR = 32, 128, 0.5
# Twice the op's: a norm is rounded as well.
GATE = 1.2e-3
TARGETS = {"three": 3.5, "dense": 3.0}
LAST = torch.channels_last_3d
LAYOUTS = {"channels-last": LAST, "NCDHW": torch.contiguous_format}


def measure_blocks(settings: Settings) -> Iterator[dict]:
    """Rows of the op against modules behind the norm, and of the five modules fused against themselves."""
    dense, tucker = networks(network_cases.block, settings)
    extent = EXTENT // settings.shrink
    x = torch.randn(1, CHANNELS, *(extent,) * 3, generator=torch.Generator().manual_seed(network_cases.SEED))
    x = x.to(settings.device, settings.dtype)
    for name, measured in (("block", _op), ("block as modules", _modules)):
        settings.report(f"{name}: {CHANNELS} channels at {extent}³, rank {tucker[2].ranks[0]}")
        yield from measured(name, x, dense, tucker, settings)
        forget_compiled(settings)


def networks(build: Callable[[], nn.Module], settings: Settings) -> tuple[nn.Module, nn.Module]:
    """A network, and another of the same structure factorised; random weights both.

    Without decomposing: that needs a package more, and time does not depend on the weights.
    """
    torch.manual_seed(network_cases.SEED)
    dense = build().eval().requires_grad_(False)
    with torch.device("meta"):
        ranks = plan(build(), CompressionConfig(factor=FACTOR)).ranks
    tucker = substitute(copy.deepcopy(dense), ranks).eval().requires_grad_(False)
    return tuple(network.to(settings.device, settings.dtype) for network in (dense, tucker))


def about(name: str, x: Tensor, tucker: nn.Module) -> dict[str, object]:
    conv = tucker[2]
    floor = one_pass_cost(spec_of(conv), conv.ranks, tuple(x.shape[2:]), itemsize=x.element_size())
    return {
        "part": "block",
        "case": name,
        "layer": f"{CHANNELS}→{CHANNELS} 3³ @{x.shape[-1]}³ r{conv.ranks[0]}",
        "kind": str(x.dtype).removeprefix("torch."),
        "gate": GATE,
        "floor_bytes": floor.bytes,
        "floor_macs": floor.macs,
        "copied_bytes": 2 * x.numel() * x.element_size(),
    }


def _op(name: str, x: Tensor, dense: nn.Module, tucker: nn.Module, settings: Settings) -> list[dict]:
    norm, conv, next_norm = dense[0], tucker[2], tucker[3]
    with torch.inference_mode(), without_trials():
        # The norm before belongs to the block before: every peer gets what it makes.
        flat = x.double().flatten(2)
        scale = norm.weight.double() * torch.rsqrt(flat.var(2, correction=0) + norm.eps)
        shift = norm.bias.double() - flat.mean(2) * scale
        exact = _activated(x, scale, shift)
        given = exact.to(x.dtype)
        expected = {
            DENSE: copy.deepcopy(dense[2:]).double()(exact),
            THREE_CONVS: copy.deepcopy(tucker[2:]).double()(exact),
        }
        del exact, flat
    peers = []
    for group, words, modules in (
        (DENSE, "convolution, norm, activation", dense[2:]),
        (THREE_CONVS, "three convolutions, norm, activation", as_convolutions(tucker)[2:]),
    ):
        peers += _peers_of_modules(group, words, modules, given, expected[group])
    last, pending = x.contiguous(memory_format=LAST), [scale.float(), shift.float()]

    def block() -> tuple[Tensor, Tensor, Tensor]:
        ones = [1, 1, 1]
        return torch.ops.tucker_ops.tucker_block(
            [last], [None], [pending[0]], [pending[1]], [0.01], [conv.u_in], None, conv.core, ones, ones, ones,
            conv.u_out, None, "channel", False, backend=settings.backend,
        )  # fmt: skip

    def with_affine() -> tuple[Tensor, Tensor, Tensor]:
        values, mean, m2 = block()
        return values, *instance_norm_affine(
            values, mean, m2, next_norm.weight, next_norm.bias, next_norm.eps
        )

    def error_of_affine(result: tuple[Tensor, Tensor, Tensor]) -> float:
        return relative_rms(_activated(*result), expected[THREE_CONVS])

    def error_of_block(result: tuple[Tensor, Tensor, Tensor]) -> float:
        values, mean, m2 = result
        affine = instance_norm_affine(values, mean, m2, next_norm.weight, next_norm.bias, next_norm.eps)
        return error_of_affine((values, *affine))

    peers += [
        Peer("tucker_block", "channels-last", OURS, lambda: block, error_of_block, shown=True, targets=TARGETS),
        Peer(
            "tucker_block, then scale and shift of the norm", "channels-last", OURS, lambda: with_affine,
            error_of_affine, shown=True,
        ),
    ]  # fmt: skip
    return measure(peers, GATE, Clock(settings.device, apart=True), settings, about(name, x, tucker))


def _modules(name: str, x: Tensor, dense: nn.Module, tucker: nn.Module, settings: Settings) -> list[dict]:
    with torch.inference_mode(), without_trials():
        expected = {
            group: copy.deepcopy(network).double()(x.double())
            for group, network in ((DENSE, dense), (THREE_CONVS, tucker))
        }
    peers = _peers_of_modules(DENSE, "five modules, dense", dense, x, expected[DENSE])
    peers += _peers_of_modules(
        THREE_CONVS, "five modules, three convolutions", as_convolutions(tucker), x, expected[THREE_CONVS]
    )
    last = x.contiguous(memory_format=LAST)
    for words, network, group in (("fuse", tucker, THREE_CONVS), ("fuse, dense", dense, DENSE)):
        peers.append(
            Peer(
                words, "channels-last", OURS, lambda n=network: fused_call(n, last),
                lambda result, g=group: relative_rms(result, expected[g]), shown=network is tucker,
            )
        )  # fmt: skip
    return measure(peers, GATE, Clock(settings.device, apart=True), settings, about(name, x, tucker))


def fused_call(network: nn.Module, x: Tensor) -> Call:
    """A call of the fused network; RuntimeError where no kernel would run it."""
    made = fuse(copy.copy(network))
    used = fused.explain(made).used
    if not used:
        raise RuntimeError(f"not fused: {used.reason}")
    return lambda: made(x)


def _peers_of_modules(group: str, words: str, modules: nn.Module, x: Tensor, expected: Tensor) -> list[Peer]:
    def call(memory_format: torch.memory_format, compiled: bool = False) -> Call:
        laid_out = copy.deepcopy(modules).to(memory_format=memory_format)
        run = torch.compile(laid_out) if compiled else laid_out
        given = x.contiguous(memory_format=memory_format)
        return lambda: run(given)

    def error_of(result: Tensor) -> float:
        return relative_rms(result, expected)

    peers = [
        Peer(words, layout, group, lambda f=memory_format: call(f), error_of)
        for layout, memory_format in LAYOUTS.items()
    ]
    compiled = f"{words}, torch.compile"
    return [
        *peers,
        Peer(compiled, "channels-last", group + COMPILED, lambda: call(LAST, True), error_of, slow=True),
    ]


def _activated(values: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """In float64: scale and shift [N, C] of a norm, then the activation."""
    scale, shift = (t.double()[:, :, None, None, None] for t in (scale, shift))
    return nn.functional.leaky_relu(values.double() * scale + shift, 0.01)
