"""The cost model against the published size table and against figures worked out by hand."""

from __future__ import annotations

from decimal import ROUND_HALF_UP, Decimal

import pytest
import torch
from torch import nn

from tucker_ops.convert import CompressionConfig, plan
from tucker_ops.cost import Cost, Voxels, dense_cost, fvcore_flops, one_pass_cost, three_conv_cost
from tucker_ops.errors import ShapeError
from tucker_ops.types import ConvSpec


def cube(channels_in, channels_out, kernel=3, **changes):
    fields = {"stride": (1,) * 3, "padding": (kernel // 2,) * 3, "dilation": (1,) * 3, "bias": False}
    return ConvSpec(channels_in, channels_out, (kernel,) * 3, **{**fields, **changes})


def test_a_rank_of_the_taps_saves_parameters_alone():
    for transposed in (False, True):
        spec = cube(40, 48, transposed=transposed, output_padding=(0,) * 3 if transposed else ())
        for cost in (one_pass_cost, three_conv_cost):
            pair, three = (cost(spec, ranks, (5, 6, 7)) for ranks in ((16, 24), (16, 24, 9)))
            assert (three.macs, three.bytes) == (pair.macs, pair.bytes)
            assert pair.params == 16 * 40 + 16 * 24 * 27 + 24 * 48
            assert three.params == 16 * 40 + 16 * 24 * 9 + 9 * 27 + 24 * 48


# Radiology: Artificial Intelligence 2025, ryai.240353: millions of parameters / fvcore G.
SIZES = {
    "1.5 mm": {
        None: ("31.195", "480.6"),
        0.9: ("27.93", "444.0"),
        0.7: ("17.36", "281.5"),
        0.5: ("9.25", "149.2"),
        0.4: ("6.18", "103.1"),
        0.3: ("3.70", "65.0"),
        0.2: ("1.85", "37.8"),
        0.1: ("0.628", "25.7"),
    },
    "3 mm": {
        None: ("16.551", "369.1"),
        0.9: ("14.88", "360.0"),
        0.7: ("9.26", "230.9"),
        0.5: ("4.92", "125.0"),
        0.4: ("3.31", "87.7"),
        0.3: ("1.98", "56.3"),
        0.2: ("1.00", "33.2"),
        0.1: ("0.345", "21.6"),
    },
}
# 24 classes a part at 1.5 mm; all 117 in one network at 3 mm; the background on top.
NETWORKS = {
    "1.5 mm": ((32, 64, 128, 256, 320, 320), 25, (128, 128, 128)),
    "3 mm": ((32, 64, 128, 256, 320), 118, (112, 112, 128)),
}


@pytest.fixture(scope="module", params=NETWORKS)
def published(request):
    unet = pytest.importorskip("dynamic_network_architectures.architectures.unet")
    features, outputs, extents = NETWORKS[request.param]
    with torch.device("meta"):
        network = unet.PlainConvUNet(
            1,
            len(features),
            features,
            nn.Conv3d,
            3,
            [1] + [2] * (len(features) - 1),
            2,
            outputs,
            2,
            conv_bias=True,
            norm_op=nn.InstanceNorm3d,
            norm_op_kwargs={"affine": True},
            nonlin=nn.LeakyReLU,
        )
    return network, (1, 1, *extents), SIZES[request.param]


def as_printed(value: float, printed: str) -> str:
    """`value` to the decimals of `printed` by way of three: it was rounded twice (9.2447, 9.245, 9.25)."""
    three = Decimal(repr(value)).quantize(Decimal("0.001"), ROUND_HALF_UP)
    return str(three.quantize(Decimal(printed), ROUND_HALF_UP))


def test_size_table_of_the_paper(published):
    network, shape, table = published
    for factor, (params, gflops) in table.items():
        decided = plan(network, CompressionConfig.weber2024(factor or 1.0), input_shape=shape)
        cost = decided.dense if factor is None else decided.compressed
        # Heads of the lower resolutions are there to be trained with, and not part of the published count.
        heads = [layer for layer in decided.layers if layer.calls == 0]
        assert len(heads) == len(network.decoder.stages) - 1
        used = cost.params - sum(layer.dense.params for layer in heads)
        assert as_printed(used / 1e6, params) == params, factor
        flops = fvcore_flops(cost.macs, decided.norm_elements)
        assert as_printed(flops / 1e9, gflops) == gflops, factor
        if factor is not None:
            assert len(decided.ranks) == len(decided.layers) - len(heads)


@pytest.mark.parametrize(
    "channels, extent, dense, tucker",
    [(32, 128, 116, 33.3), (64, 64, 58, 16.6), (128, 32, 29, 8.3), (256, 16, 14.5, 4.2), (320, 8, 2.8, 0.81)],
)
def test_gflop_of_the_layers_of_nnunet(channels, extent, dense, tucker):
    spec, size = cube(channels, channels), (extent,) * 3
    assert 2e-9 * dense_cost(spec, size).macs == pytest.approx(dense, rel=0.02)
    halved = (channels // 2, channels // 2)
    assert 2e-9 * one_pass_cost(spec, halved, size).macs == pytest.approx(tucker, rel=0.02)


def test_by_hand():
    spec = ConvSpec(6, 10, (1, 3), (1, 2), (0, 1), (1, 1))
    # Input 2 × [6, 4, 8], output 2 × [10, 4, 4]; ranks 2 and 5.
    dense = dense_cost(spec, (4, 8), batch=2, itemsize=2)
    assert dense == Cost(params=190, macs=2 * 16 * 180, bytes=2 * (2 * (192 + 160) + 190))
    one = one_pass_cost(spec, (2, 5), (4, 8), batch=2, itemsize=2)
    assert one.params == 6 * 2 + 2 * 5 * 3 + 5 * 10 + 10
    assert one.macs == 2 * (32 * 12 + 16 * 30 + 16 * 50)
    assert one.bytes == 2 * (2 * (192 + 160) + one.params)
    three = three_conv_cost(spec, (2, 5), (4, 8), batch=2, itemsize=2)
    assert (three.params, three.macs) == (one.params, one.macs)
    assert three.bytes - one.bytes == 2 * 2 * 2 * (32 * 2 + 16 * 5)


def test_transposed_layers_count_the_core_by_input_voxels():
    spec = cube(8, 4, 2, stride=(2,) * 3, padding=(0,) * 3, transposed=True, output_padding=(0,) * 3)
    assert dense_cost(spec, (3, 3, 3)).macs == 27 * 8 * 4 * 8
    assert one_pass_cost(spec, (3, 2), (3, 3, 3)).macs == 27 * 8 * 3 + 27 * 3 * 2 * 8 + 216 * 2 * 4


def test_grouped_layers_count_their_own_channels_only():
    spec = ConvSpec(8, 8, (3, 3), (1, 1), (1, 1), (1, 1), groups=4, bias=False)
    assert dense_cost(spec, (5, 5)).params == 8 * 2 * 9


def test_macs_agree_with_parameters_of_a_real_layer():
    conv = nn.ConvTranspose3d(5, 7, (1, 2, 2), (1, 2, 2))
    spec = ConvSpec(5, 7, (1, 2, 2), (1, 2, 2), (0,) * 3, (1,) * 3, transposed=True, output_padding=(0,) * 3)
    assert dense_cost(spec, (2, 3, 4)).params == sum(p.numel() for p in conv.parameters())
    assert Voxels.of(spec, (2, 3, 4)).output == conv(torch.zeros(1, 5, 2, 3, 4))[0, 0].numel()


def test_costs_add_up():
    assert sum([Cost(1, 2, 3), Cost(10, 20, 30)]) == Cost(11, 22, 33)
    with pytest.raises(TypeError):
        Cost() + 1


def test_extents_must_fit_the_kernel():
    with pytest.raises(ShapeError, match="3 extents"):
        dense_cost(cube(1, 1), (4, 4))
