"""The whole network on one patch: as nnU-Net runs it, channels-last, compiled, and fused, dense and at rank 1/2."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from bench import network_cases
from bench.gpu.blocks import FACTOR, LAST, fused_call, networks
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
from bench.gpu.unet import FEATURES, PlainConvUNet
from bench.network_cases import as_convolutions
from bench.operands import relative_rms
from tucker_ops import fuse
from tucker_ops.cost import dense_cost, one_pass_cost
from tucker_ops.nn import TuckerConv3d, spec_of

EXTENT = 128
# Of a whole network in float16, by the bench's gate for bfloat16 (2.5e-2) and what float16 keeps more, rounded up.
GATE = 5e-3
TARGETS = {"dense": 3.0, "dense_compiled": 2.0, "three": 2.5, "three_compiled": 2.0, "ms": 2.5}
# Not of a CUDA graph: it keeps its memory from one replay to the next, so that its peak cannot be seen.
MOST_SHARE_OF_PEAK = {"peak": 0.5}
SECONDS = 4.0


def measure_networks(settings: Settings, features: Sequence[int] = FEATURES) -> Iterator[dict]:
    """One row for each way to run the network."""
    # Each stage but the first halves the extents, and a norm needs more than one voxel.
    extent = max(EXTENT // settings.shrink, 2 ** len(features))
    dense, tucker = networks(partial(PlainConvUNet, features=features), settings)
    x = torch.randn(1, 1, *(extent,) * 3, generator=torch.Generator().manual_seed(network_cases.SEED))
    x = x.to(settings.device, settings.dtype)
    settings.report(f"network: PlainConvUNet of {len(features)} stages at {extent}³, rank {FACTOR:g}")
    expected = {}
    with torch.inference_mode(), without_trials():
        for group, network in ((DENSE, dense), (THREE_CONVS, tucker)):
            expected[group] = copy.deepcopy(network).double()(x.double())
    bytes_moved, macs = floor_of(tucker, x)
    about = {
        "part": "network",
        "case": f"PlainConvUNet {extent}³",
        "layer": f"{len(features)} stages, {min(features)} to {max(features)} channels, rank {FACTOR:g}",
        "kind": str(x.dtype).removeprefix("torch."),
        "gate": GATE,
        "floor_bytes": bytes_moved,
        "floor_macs": macs,
        "copied_bytes": None,
    }
    peers = peers_of(dense, tucker, x, expected)
    longer = replace(settings, seconds=max(settings.seconds, SECONDS / settings.shrink))
    rows = measure(peers, GATE, Clock(settings.device, apart=False), longer, about)
    gc.collect()
    forget_compiled(settings)
    yield from rows


def peers_of(dense: nn.Module, tucker: nn.Module, x: Tensor, expected: dict[str, Tensor]) -> list[Peer]:
    three = as_convolutions(tucker)

    def peer(name: str, layout: str, group: str, form: str, prepare: Callable[[], Call], **kwargs) -> Peer:
        return Peer(
            name, layout, group, prepare, lambda result: relative_rms(result, expected[form]), **kwargs
        )

    return [
        peer("dense, autocast, as nnU-Net runs it", "NCDHW", DENSE, DENSE, lambda: _autocast(dense, x)),
        peer("dense, half", "channels-last", "", DENSE, lambda: _half(dense, x)),
        peer("dense, half, CUDA graph", "channels-last", "", DENSE, lambda: captured(_half(dense, x), x)),
        peer("three convolutions, autocast", "NCDHW", THREE_CONVS, THREE_CONVS, lambda: _autocast(three, x)),
        peer("three convolutions, half", "channels-last", THREE_CONVS, THREE_CONVS, lambda: _half(three, x)),
        peer(
            "fused", "channels-last", OURS, THREE_CONVS, lambda: fused_call(tucker, x), shown=True,
            targets=TARGETS | MOST_SHARE_OF_PEAK,
        ),
        peer(
            "fused, CUDA graph", "channels-last", OURS, THREE_CONVS, lambda: captured(fused_call(tucker, x), x),
            shown=True, targets=TARGETS,
        ),
        peer("fused, autocast", "NCDHW", OURS, THREE_CONVS, lambda: _autocast(fuse(copy.copy(tucker)), x)),
        peer("dense, fused", "channels-last", OURS, DENSE, lambda: fused_call(dense, x)),
        peer(
            "dense, half, torch.compile", "channels-last", DENSE + COMPILED, DENSE,
            lambda: _half(dense, x, torch.compile), slow=True,
        ),
        peer(
            "three convolutions, half, torch.compile", "channels-last", THREE_CONVS + COMPILED, THREE_CONVS,
            lambda: _half(three, x, torch.compile), slow=True,
        ),
    ]  # fmt: skip


def _autocast(network: nn.Module, x: Tensor) -> Call:
    """As nnU-Net predicts: weights and input in float32, rounded where a convolution takes them."""
    network, x = copy.deepcopy(network).float(), x.float()

    def call() -> Tensor:
        with torch.autocast(x.device.type, torch.float16):
            return network(x)

    return call


def _half(network: nn.Module, x: Tensor, wrap: Callable | None = None) -> Call:
    network = copy.deepcopy(network).to(memory_format=LAST)
    run = network if wrap is None else wrap(network)
    return lambda: run(x)


def captured(call: Call, x: Tensor) -> Call:
    """Replays `call` as one CUDA graph; RuntimeError off the GPU."""
    if not x.is_cuda:
        raise RuntimeError("CUDA graphs are captured on a GPU")
    side = torch.cuda.Stream(x.device)
    side.wait_stream(torch.cuda.current_stream(x.device))
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream(x.device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


def floor_of(network: nn.Module, x: Tensor) -> tuple[int, int]:
    """Bytes and multiply-accumulates of one pass per convolution, upsampling folded into the one that reads it.

    Every convolution reads its inputs once and writes its output once; norms and activations move nothing.
    """
    voxels: list[tuple[nn.Module, Tensor, Tensor]] = []
    hooks = [
        module.register_forward_hook(lambda m, args, out: voxels.append((m, args[0], out)))
        for module in network.modules()
        if isinstance(module, nn.Conv3d | nn.ConvTranspose3d | TuckerConv3d)
    ]
    network = copy.deepcopy(network).to("meta")
    for hook in hooks:
        hook.remove()
    with torch.inference_mode():
        network(x.to("meta"))
    elements = macs = weights = 0
    for module, given, out in voxels:
        spec, size = spec_of(module), tuple(given.shape[2:])
        transposed = isinstance(module, nn.ConvTranspose3d)
        # What a convolution reads of an upsampling is the smaller tensor before it.
        elements += given.numel() - out.numel() if transposed else given.numel() + out.numel()
        tucker = isinstance(module, TuckerConv3d)
        cost = one_pass_cost(spec, module.ranks, size) if tucker else dense_cost(spec, size)
        macs, weights = macs + cost.macs, weights + cost.params
    return (elements + weights) * x.element_size(), macs
