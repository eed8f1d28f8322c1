"""Small networks of the shapes that occur: nnU-Net's aliases, residual blocks, BatchNorm, odd kernels."""

from __future__ import annotations

import pytest
import torch
from torch import nn


def nnunet(features=(16, 24, 32), conv=nn.Conv3d, outputs=3, channels=1, deep_supervision=False, **changes):
    """nnU-Net's own PlainConvUNet: each convolution registered twice, the encoder twice more."""
    unet = pytest.importorskip("dynamic_network_architectures.architectures.unet")
    norm = nn.InstanceNorm3d if conv is nn.Conv3d else nn.InstanceNorm2d
    arguments = {
        "kernel_sizes": 3,
        "strides": [1] + [2] * (len(features) - 1),
        "n_conv_per_stage": 2,
        "n_conv_per_stage_decoder": 2,
        "conv_bias": True,
        "norm_op_kwargs": {"affine": True, "eps": 1e-5},
        "nonlin_kwargs": {"inplace": True},
        **changes,
    }
    network = unet.PlainConvUNet(
        channels,
        len(features),
        features,
        conv,
        num_classes=outputs,
        norm_op=norm,
        nonlin=nn.LeakyReLU,
        deep_supervision=deep_supervision,
        **arguments,
    )
    return network.eval()


def residual(features=(16, 24, 32)):
    """nnU-Net's ResidualEncoderUNet."""
    unet = pytest.importorskip("dynamic_network_architectures.architectures.unet")
    network = unet.ResidualEncoderUNet(
        1,
        len(features),
        features,
        nn.Conv3d,
        3,
        [1] + [2] * (len(features) - 1),
        2,
        3,
        1,
        conv_bias=True,
        norm_op=nn.InstanceNorm3d,
        norm_op_kwargs={"affine": True},
        nonlin=nn.LeakyReLU,
    )
    return network.eval()


class BatchNorm2d(nn.Module):
    """A 2D network with BatchNorm, kernels 3×1 and 1×3, a pointwise layer in the middle and no biases."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 3, padding=1, bias=False)
        self.down = nn.Conv2d(24, 32, 3, stride=2, padding="valid", bias=False)
        self.wide = nn.Conv2d(32, 32, (1, 3), padding=(0, 1), bias=False)
        self.tall = nn.Conv2d(32, 32, (3, 1), padding="same", dilation=(2, 1))
        self.point = nn.Conv2d(32, 48, 1, bias=False)
        self.up = nn.ConvTranspose2d(48, 24, 3, stride=2, padding=1, output_padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(n) for n in (24, 32, 32, 32, 48, 24))
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Conv2d(24, 2, 1)

    def forward(self, x):
        for conv, norm in zip(
            (self.stem, self.down, self.wide, self.tall, self.point, self.up), self.norms, strict=True
        ):
            x = torch.relu(norm(conv(x)))
        return torch.sigmoid(self.head(self.dropout(x)))


def snapshot(model: nn.Module):
    """All that conversion could disturb: objects by name, values, flags, hooks, and the random state."""
    return (
        [(name, id(module), module.training) for name, module in model.named_modules(remove_duplicate=False)],
        [
            (name, id(p), p.requires_grad, p._version)
            for name, p in model.named_parameters(remove_duplicate=False)
        ],
        [(name, id(b), b._version) for name, b in model.named_buffers(remove_duplicate=False)],
        [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        torch.get_rng_state().tolist(),
        {key: value.sum().item() for key, value in model.state_dict().items()},
    )
