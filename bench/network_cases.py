"""What `bench.networks` computes: one block and whole networks, dense and compressed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tucker_ops import CompressionConfig, compress
from tucker_ops.nn import TuckerConv3d

SEED = 20240409
OUTPUTS = 25


@dataclass(frozen=True)
class Case:
    """What is computed: one block or a whole network on one patch of `size`, compressed at `factor` or dense."""

    name: str
    size: tuple[int, int, int]
    build: Callable[[], nn.Module]
    channels: int
    factor: float | None

    @property
    def form(self) -> str:
        return "dense" if self.factor is None else f"rank {self.factor:g}"

    def network(self) -> nn.Module:
        if (self.build, self.factor) not in _NETWORKS:
            torch.manual_seed(SEED)
            network = self.build().eval().requires_grad_(False)
            remember(
                self,
                network if self.factor is None else compress(network, CompressionConfig(factor=self.factor)),
            )
        return _NETWORKS[self.build, self.factor]

    def input(self) -> Tensor:
        generator = torch.Generator().manual_seed(SEED)
        return torch.randn(1, self.channels, *self.size, generator=generator)


# Compressing takes longer than many a measurement.
_NETWORKS: dict[tuple, nn.Module] = {}


def remember(case: Case, network: nn.Module) -> None:
    """Makes `network` that of the case from now on."""
    _NETWORKS[case.build, case.factor] = network


def forget_networks() -> None:
    """Frees the networks made so far."""
    _NETWORKS.clear()


def block() -> nn.Module:
    """Norm and activation of the block before, then one of 32 channels: what a fused block computes in one pass.

    The convolution's bias, which the norm cancels and a fused network drops, is zero.
    """
    layers = nn.Sequential(
        nn.InstanceNorm3d(32, affine=True),
        nn.LeakyReLU(0.01),
        nn.Conv3d(32, 32, 3, padding=1),
        nn.InstanceNorm3d(32, affine=True),
        nn.LeakyReLU(0.01),
    )
    nn.init.zeros_(layers[2].bias)
    return layers


def plain_unet() -> nn.Module:
    from dynamic_network_architectures.architectures.unet import PlainConvUNet

    return PlainConvUNet(
        1, 6, (32, 64, 128, 256, 320, 320), nn.Conv3d, 3, (1, 2, 2, 2, 2, 2), 2, OUTPUTS, 2, conv_bias=True,
        norm_op=nn.InstanceNorm3d, norm_op_kwargs={"eps": 1e-5, "affine": True}, nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
    )  # fmt: skip


def residual_unet() -> nn.Module:
    from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet

    return ResidualEncoderUNet(
        1, 6, (32, 64, 128, 256, 320, 320), nn.Conv3d, 3, (1, 2, 2, 2, 2, 2), (1, 3, 4, 6, 6, 6), OUTPUTS, 1,
        conv_bias=True, norm_op=nn.InstanceNorm3d, norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU, nonlin_kwargs={"inplace": True},
    )  # fmt: skip


CASES = (
    Case("unet_128", (128,) * 3, plain_unet, 1, None),
    Case("unet_128", (128,) * 3, plain_unet, 1, 0.5),
)
FULL = (
    *CASES,
    Case("unet_64", (64,) * 3, plain_unet, 1, None),
    Case("unet_64", (64,) * 3, plain_unet, 1, 0.5),
    Case("unet_128", (128,) * 3, plain_unet, 1, 1 / 3),
    Case("unet_128", (128,) * 3, plain_unet, 1, 0.25),
    Case("resenc_m_128", (128,) * 3, residual_unet, 1, None),
    Case("resenc_m_128", (128,) * 3, residual_unet, 1, 0.5),
)


def as_convolutions(network: nn.Module) -> nn.Module:
    """A copy with each TuckerConv3d as three nn.Conv3d, which every runtime knows."""
    network = copy.deepcopy(network)
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, TuckerConv3d):
                setattr(parent, name, _three(child))
    return network


def _three(module: TuckerConv3d) -> nn.Sequential:
    rank_in, rank_out = module.ranks[:2]
    ones = (1, 1, 1)
    layers = nn.Sequential(
        nn.Conv3d(module.in_channels, rank_in, 1, bias=False),
        nn.Conv3d(rank_in, rank_out, module.kernel_size, module.stride, module.padding, bias=False),
        nn.Conv3d(rank_out, module.out_channels, 1, bias=module.bias is not None),
    )
    for layer, weight in zip(layers, (module.u_in, module.spatial_core, module.u_out), strict=True):
        layer.weight.data = weight.data.reshape(*weight.shape, *ones) if weight.dim() == 2 else weight.data
    if module.bias is not None:
        layers[2].bias.data = module.bias.data
    return layers
