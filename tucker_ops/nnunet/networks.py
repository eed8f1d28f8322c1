"""nnU-Net's networks with factorised convolutions, to be named in plans.json.

nnU-Net resolves ``architecture.network_class_name`` by import, passes ``arch_kwargs`` on, and loads the
checkpoint strictly. The names differ from those of dynamic_network_architectures on purpose: where
tucker_ops is not installed nnU-Net looks for the same name there, and must fail rather than build the dense
network.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from torch import nn

from tucker_ops import convert
from tucker_ops.errors import ConfigError, TuckerOpsError, UnsupportedArchitectureError
from tucker_ops.fused import FusedForward
from tucker_ops.types import Ranks

# Version 1 of the description, for networks without a rank of the taps, is what an older tucker_ops reads.
VERSIONS = (1, 2)


class TuckerPlainConvUNet(FusedForward, PlainConvUNet):
    """PlainConvUNet whose layers in ``tucker["ranks"]`` are Tucker convolutions; other arguments as there.

    Inference runs fused (`tucker_ops.fuse`) where that is possible.
    """

    def __init__(self, *args: Any, tucker: Mapping[str, Any], **kwargs: Any):
        super().__init__(*args, **kwargs)
        _substitute(self, tucker)


class TuckerResidualEncoderUNet(FusedForward, ResidualEncoderUNet):
    """ResidualEncoderUNet whose layers in ``tucker["ranks"]`` are Tucker convolutions; other arguments as
    there. Inference runs fused (`tucker_ops.fuse`) where that is possible.
    """

    def __init__(self, *args: Any, tucker: Mapping[str, Any], **kwargs: Any):
        super().__init__(*args, **kwargs)
        _substitute(self, tucker)


TUCKER_CLASSES = {"PlainConvUNet": TuckerPlainConvUNet, "ResidualEncoderUNet": TuckerResidualEncoderUNet}


def _substitute(network: nn.Module, tucker: Mapping[str, Any]) -> None:
    if tucker.get("version") not in VERSIONS:
        raise ConfigError(
            f"plans.json holds a Tucker description of version {tucker.get('version')}, this tucker_ops reads "
            f"versions {VERSIONS[0]} to {VERSIONS[-1]}; install the tucker_ops that wrote the model"
        )
    convert.substitute(network, {name: tuple(map(int, ranks)) for name, ranks in tucker["ranks"].items()})


def tucker_architecture(architecture: Mapping[str, Any], ranks: Mapping[str, Ranks]) -> dict[str, Any]:
    """nnU-Net's architecture block of the same network with factorised layers.

    `ranks` maps layer names to (R_in, R_out) or (R_in, R_out, R_taps). Raises UnsupportedArchitectureError for a
    network that tucker_ops does not rebuild.
    """
    cls = TUCKER_CLASSES[check_architecture(architecture["network_class_name"])]
    version = max((len(of_layer) - 1 for of_layer in ranks.values()), default=1)
    tucker = {"version": version, "ranks": {name: list(of_layer) for name, of_layer in ranks.items()}}
    return {
        "network_class_name": f"{cls.__module__}.{cls.__qualname__}",
        "arch_kwargs": {**architecture["arch_kwargs"], "tucker": tucker},
        "_kw_requires_import": list(architecture["_kw_requires_import"]),
    }


def check_architecture(network_class_name: str) -> str:
    """Last component of a class name that can be compressed; UnsupportedArchitectureError for any other."""
    package, _, name = network_class_name.rpartition(".")
    if name not in TUCKER_CLASSES or package.split(".")[0] not in ("dynamic_network_architectures", ""):
        raise UnsupportedArchitectureError(
            f"plans.json names the network {network_class_name}; tucker_ops rebuilds "
            f"{' and '.join(TUCKER_CLASSES)} of dynamic_network_architectures. Other torch modules can be "
            "compressed in Python with tucker_ops.compress"
        )
    return name


def build_network(
    architecture: Mapping[str, Any], input_channels: int, num_outputs: int, *, deep_supervision: bool = False
) -> nn.Module:
    """The network of an architecture block, built by nnU-Net's own `get_network_from_plans`, weights
    random. Raises UnsupportedArchitectureError where it cannot be built.
    """
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

    try:
        return get_network_from_plans(
            architecture["network_class_name"],
            architecture["arch_kwargs"],
            architecture["_kw_requires_import"],
            input_channels,
            num_outputs,
            allow_init=False,
            deep_supervision=deep_supervision,
        )
    except TuckerOpsError:
        raise
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, AssertionError) as error:
        raise UnsupportedArchitectureError(
            f"the network {architecture['network_class_name']} cannot be built from the arch_kwargs of plans.json "
            f"({type(error).__name__}: {error}); restore plans.json from the trained model"
        ) from error
