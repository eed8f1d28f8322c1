"""Modules against the dense layers they come from."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tucker_ops.errors import ConversionError, RankError, ShapeError
from tucker_ops.nn import (
    TuckerConv2d,
    TuckerConv3d,
    TuckerConvTranspose2d,
    TuckerConvTranspose3d,
    spec_of,
    tucker_class,
)

LAYERS = {
    "2d": (lambda: nn.Conv2d(6, 8, 3, padding=1), (9, 10)),
    "2d 3x1 dilated": (lambda: nn.Conv2d(6, 8, (3, 1), dilation=(2, 1), bias=False), (9, 10)),
    "3d strided": (lambda: nn.Conv3d(6, 8, 3, stride=(1, 2, 2), padding=1), (5, 8, 7)),
    "3d same": (lambda: nn.Conv3d(6, 8, (1, 3, 5), padding="same"), (4, 5, 6)),
    "transposed 2d": (lambda: nn.ConvTranspose2d(6, 8, 2, stride=2), (5, 6)),
    "transposed 3d": (lambda: nn.ConvTranspose3d(6, 8, (1, 2, 2), stride=(1, 2, 2), bias=False), (3, 4, 5)),
    "output padding": (lambda: nn.ConvTranspose3d(6, 8, 3, stride=2, padding=1, output_padding=1), (3, 4, 5)),
}


@pytest.mark.parametrize(("make", "size"), LAYERS.values(), ids=LAYERS.keys())
def test_full_rank_equals_the_dense_layer_and_back(make, size):
    dense = make().double()
    x = torch.randn(2, 6, *size, dtype=torch.float64)
    tucker = tucker_class(spec_of(dense)).from_conv(dense, ranks=(6, 8))
    assert (tucker.bias is None) == (dense.bias is None)
    torch.testing.assert_close(tucker(x), dense(x))
    again = tucker.to_dense()
    assert type(again) is type(dense)
    torch.testing.assert_close(again(x), dense(x))
    torch.testing.assert_close(again.weight, dense.weight)


@pytest.mark.parametrize(("make", "size"), LAYERS.values(), ids=LAYERS.keys())
def test_truncated_ranks_equal_their_own_dense_form(make, size):
    dense = make().double()
    x = torch.randn(2, 6, *size, dtype=torch.float64)
    tucker = tucker_class(spec_of(dense)).from_conv(dense, ranks=(3, 5))
    assert tucker.ranks == (3, 5) and f"ranks={(3, 5)}" in repr(tucker)
    torch.testing.assert_close(tucker(x), tucker.to_dense()(x))
    assert spec_of(tucker) == spec_of(dense)


def test_dtype_device_flags_survive():
    dense = nn.Conv3d(4, 4, 3).to(torch.bfloat16).eval().requires_grad_(False)
    tucker = TuckerConv3d.from_conv(dense, (2, 2))
    assert not tucker.training
    for parameter in tucker.parameters():
        assert parameter.dtype == torch.bfloat16 and not parameter.requires_grad


def test_the_dense_layer_is_not_touched_and_shares_no_memory():
    dense = nn.Conv2d(4, 4, 3)
    before = dense.weight.clone()
    tucker = TuckerConv2d.from_conv(dense, (4, 4))
    with torch.no_grad():
        for parameter in tucker.parameters():
            parameter.zero_()
    assert torch.equal(dense.weight, before) and dense.bias.abs().sum() > 0


@pytest.mark.parametrize(
    ("conv", "error", "words"),
    [
        (nn.Conv3d(4, 4, 3, groups=2), ConversionError, "2 groups"),
        (nn.Conv3d(4, 4, 3, padding=1, padding_mode="reflect"), ConversionError, "reflect"),
        (nn.Conv3d(4, 4, 2, padding="same"), ConversionError, "unevenly"),
        (nn.Conv2d(4, 4, 3), ConversionError, "Conv2d"),
        (nn.Linear(4, 4), ConversionError, "Linear"),
    ],
)
def test_layers_that_cannot_be_factorised(conv, error, words):
    with pytest.raises(error, match=words):
        TuckerConv3d.from_conv(conv, (2, 2))


def test_a_subclass_with_its_own_forward_is_refused():
    class Standardised(nn.Conv3d):
        def forward(self, x):
            return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)

    with pytest.raises(ConversionError, match="forward of its own"):
        TuckerConv3d.from_conv(Standardised(4, 4, 3), (2, 2))


def test_numpy_geometry():
    numpy = pytest.importorskip("numpy")
    conv = nn.Conv3d(4, 4, 3, padding=numpy.int64(1), stride=numpy.int64(2))
    x = torch.randn(1, 4, 6, 6, 6)
    torch.testing.assert_close(TuckerConv3d.from_conv(conv, (4, 4))(x), conv(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ranks", [(5, 2), (2, 0), (2,), "x", (2.7, 2)])
def test_ranks_out_of_range(ranks):
    with pytest.raises(RankError, match="ranks"):
        TuckerConv3d.from_conv(nn.Conv3d(4, 4, 3), ranks)


def test_factors_of_other_ranks_are_refused():
    from tucker_ops.decompose import decompose

    conv = nn.Conv3d(4, 4, 3)
    with pytest.raises(ShapeError, match="u_in"):
        TuckerConv3d.from_conv(conv, (2, 2), factors=decompose(conv.weight, (3, 3)))


def test_fresh_modules_have_the_scale_of_dense_ones():
    x = torch.randn(4, 32, 8, 8, 8)
    fresh, dense = TuckerConv3d(32, 32, 3, (16, 16), padding=1), nn.Conv3d(32, 32, 3, padding=1)
    with torch.no_grad():
        assert 0.5 < fresh(x).std() / dense(x).std() < 2
    for cls in (TuckerConvTranspose2d, TuckerConvTranspose3d):
        assert all(p.isfinite().all() for p in cls(4, 4, 2, (2, 2), stride=2).parameters())
