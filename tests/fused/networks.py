"""nnU-Net's networks, small, with weights whose norms and biases matter."""

from __future__ import annotations

import pytest
import torch
from torch import nn


def plain_unet(
    features=(6, 10, 16),
    strides=(1, 2, 2),
    kernels=3,
    classes=3,
    conv=nn.Conv3d,
    norm=nn.InstanceNorm3d,
    norm_kwargs=None,
    channels=1,
    bias=True,
    **kwargs,
) -> nn.Module:
    """PlainConvUNet in evaluation mode."""
    unet = pytest.importorskip("dynamic_network_architectures.architectures.unet")
    norm_kwargs = {"eps": 1e-5, "affine": True} if norm_kwargs is None else norm_kwargs
    network = unet.PlainConvUNet(
        channels,
        len(features),
        features,
        conv,
        kernels,
        strides,
        2,
        classes,
        2,
        conv_bias=bias,
        norm_op=norm,
        norm_op_kwargs=norm_kwargs,
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
        **kwargs,
    )
    return randomised(network)


def residual_unet(
    features=(6, 10, 16), strides=(1, 2, 2), classes=3, conv=nn.Conv3d, norm=nn.InstanceNorm3d
) -> nn.Module:
    """ResidualEncoderUNet in evaluation mode."""
    unet = pytest.importorskip("dynamic_network_architectures.architectures.unet")
    network = unet.ResidualEncoderUNet(
        1,
        len(features),
        features,
        conv,
        3,
        strides,
        (1, 2, 2),
        classes,
        1,
        conv_bias=True,
        norm_op=norm,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
    )
    return randomised(network)


def randomised(network: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for module in network.modules():
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is None or not tensor.is_floating_point():
                    continue
                fan_in = max(1, tensor[0].numel()) if tensor.dim() > 1 else 1
                tensor.copy_(torch.randn(tensor.shape, generator=generator) / fan_in**0.5)
                if name in ("running_var", "weight") and tensor.dim() == 1:
                    tensor.abs_().add_(0.3)
    return network.eval()
