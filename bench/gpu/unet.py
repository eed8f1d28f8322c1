"""nnU-Net's PlainConvUNet in plain torch, for machines without its package.

The same modules under the same names as in dynamic_network_architectures, so that weights of one load into the other;
`tests/test_bench_gpu.py` compares the two.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

FEATURES = (32, 64, 128, 256, 320, 320)
OUTPUTS = 25
CONVS_A_STAGE = 2


class ConvNormReLU(nn.Module):
    def __init__(self, channels: int, features: int, stride: int):
        super().__init__()
        self.conv = nn.Conv3d(channels, features, 3, stride, padding=1)
        self.norm = nn.InstanceNorm3d(features, eps=1e-5, affine=True)
        self.nonlin = nn.LeakyReLU(0.01, inplace=True)
        self.all_modules = nn.Sequential(self.conv, self.norm, self.nonlin)

    def forward(self, x: Tensor) -> Tensor:
        return self.all_modules(x)


class Stage(nn.Module):
    def __init__(self, channels: int, features: int, stride: int):
        super().__init__()
        inputs = [channels] + [features] * (CONVS_A_STAGE - 1)
        strides = [stride] + [1] * (CONVS_A_STAGE - 1)
        self.convs = nn.Sequential(
            *(ConvNormReLU(c, features, s) for c, s in zip(inputs, strides, strict=True))
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.convs(x)


class Encoder(nn.Module):
    def __init__(self, channels: int, features: Sequence[int]):
        super().__init__()
        inputs = [channels, *features[:-1]]
        self.stages = nn.Sequential(
            *(
                nn.Sequential(Stage(c, f, 2 if s else 1))
                for s, (c, f) in enumerate(zip(inputs, features, strict=True))
            )
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        skips = []
        for stage in self.stages:
            x = stage(x)
            skips.append(x)
        return skips


class Decoder(nn.Module):
    """Its heads of the lower stages are for training and do not run."""

    def __init__(self, encoder: Encoder, features: Sequence[int], outputs: int):
        super().__init__()
        self.encoder = encoder
        pairs = list(zip(features[:0:-1], features[-2::-1], strict=True))
        self.stages = nn.ModuleList(Stage(2 * skip, skip, 1) for _, skip in pairs)
        self.transpconvs = nn.ModuleList(nn.ConvTranspose3d(below, skip, 2, 2) for below, skip in pairs)
        self.seg_layers = nn.ModuleList(nn.Conv3d(skip, outputs, 1) for _, skip in pairs)

    def forward(self, skips: list[Tensor]) -> Tensor:
        x = skips[-1]
        for s, stage in enumerate(self.stages):
            x = stage(torch.cat((self.transpconvs[s](x), skips[-(s + 2)]), 1))
        return self.seg_layers[-1](x)


class PlainConvUNet(nn.Module):
    """Six stages of two convolutions by default; each stage but the first halves the extents."""

    def __init__(self, channels: int = 1, features: Sequence[int] = FEATURES, outputs: int = OUTPUTS):
        super().__init__()
        self.encoder = Encoder(channels, features)
        self.decoder = Decoder(self.encoder, features, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))
