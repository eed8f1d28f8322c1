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


@pytest.mark.parametrize("ranks", [(3, 5), (3, 5, 2)], ids=["channels", "taps too"])
@pytest.mark.parametrize(("make", "size"), LAYERS.values(), ids=LAYERS.keys())
def test_truncated_ranks_equal_their_own_dense_form(make, size, ranks):
    dense = make().double()
    x = torch.randn(2, 6, *size, dtype=torch.float64)
    tucker = tucker_class(spec_of(dense)).from_conv(dense, ranks=ranks)
    assert tucker.ranks == ranks and f"ranks={ranks}" in repr(tucker)
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


@pytest.mark.parametrize(("make", "size"), LAYERS.values(), ids=LAYERS.keys())
def test_all_taps_equal_the_layer_without_a_rank_of_them(make, size):
    dense = make().double()
    x = torch.randn(2, 6, *size, dtype=torch.float64)
    cls, taps = tucker_class(spec_of(dense)), dense.weight[0, 0].numel()
    without, every = (cls.from_conv(dense, ranks=ranks) for ranks in ((3, 5), (3, 5, taps)))
    torch.testing.assert_close(every(x), without(x))
    assert set(every.state_dict()) - set(without.state_dict()) == {"u_taps"}
    fresh = cls._of_spec(spec_of(dense), (3, 5, taps), dtype=torch.float64)
    fresh.load_state_dict(every.state_dict())
    assert torch.equal(fresh(x), every(x))


@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_with_a_rank_of_the_taps(transposed):
    dense = (nn.ConvTranspose3d(2, 3, 2, stride=2) if transposed else nn.Conv3d(2, 3, (1, 3, 2))).double()
    tucker = tucker_class(spec_of(dense)).from_conv(dense, (2, 2, 3))
    weights = dict(tucker.named_parameters())

    def call(x, *values):
        return torch.func.functional_call(tucker, dict(zip(weights, values, strict=True)), (x,))

    x = torch.randn(1, 2, 2, 4, 3, dtype=torch.float64, requires_grad=True)
    assert list(weights) == ["u_in", "core", "u_taps", "u_out", "bias"]
    assert torch.autograd.gradcheck(call, (x, *weights.values()))
    assert torch.autograd.gradgradcheck(call, (x, *weights.values()), fast_mode=True)


def test_a_rank_of_the_taps_compiles_exports_and_keeps_its_core_under_autocast():
    tucker = TuckerConv3d.from_conv(nn.Conv3d(6, 8, 3, padding=1), (3, 5, 7))
    x = torch.randn(1, 6, 5, 6, 7)
    with torch.no_grad():
        expected, core = tucker(x), tucker.spatial_core
        compiled = torch.compile(tucker, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), expected)
        exported = torch.export.export(tucker, (x,)).module()
        torch.testing.assert_close(exported(x), expected)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(tucker.spatial_core, core)
        last = tucker.to(memory_format=torch.channels_last_3d)
        torch.testing.assert_close(last(x), expected)
    flat = TuckerConvTranspose2d.from_conv(nn.ConvTranspose2d(6, 8, 3), (3, 5, 7))
    x = torch.randn(1, 6, 5, 6)
    torch.testing.assert_close(flat.to(memory_format=torch.channels_last)(x), flat.to_dense()(x))
    half = TuckerConv3d.from_conv(nn.Conv3d(6, 8, 3).half(), (3, 5, 7))
    exact = (half.core.double() @ half.u_taps.double()).reshape(half.spatial_core.shape)
    # One rounding, of half a unit in the last place.
    torch.testing.assert_close(half.spatial_core.double(), exact, rtol=2**-11 * 1.01, atol=1e-7)


@pytest.mark.parametrize("rank", [0, 28])
def test_ranks_of_the_taps_out_of_range(rank):
    with pytest.raises(RankError, match=f"R_taps = {rank} must lie between 1 and the 27 taps"):
        TuckerConv3d.from_conv(nn.Conv3d(4, 4, 3), (2, 2, rank))
    with pytest.raises(RankError, match="or three"):
        TuckerConv3d(4, 4, 3, (2, 2, 2, 2))


@pytest.mark.parametrize("ranks", [(5, 2), (2, 0), (2,), "x", (2.7, 2)])
def test_ranks_out_of_range(ranks):
    with pytest.raises(RankError, match="ranks"):
        TuckerConv3d.from_conv(nn.Conv3d(4, 4, 3), ranks)


def test_factors_of_other_ranks_are_refused():
    from tucker_ops.decompose import decompose

    conv = nn.Conv3d(4, 4, 3)
    with pytest.raises(ShapeError, match="u_in"):
        TuckerConv3d.from_conv(conv, (2, 2), factors=decompose(conv.weight, (3, 3)))
    with pytest.raises(ShapeError, match="core"):
        TuckerConv3d.from_conv(conv, (2, 2), factors=decompose(conv.weight, (2, 2, 5)))


def test_fresh_modules_have_the_scale_of_dense_ones():
    x = torch.randn(4, 32, 8, 8, 8)
    dense = nn.Conv3d(32, 32, 3, padding=1)
    for ranks in ((16, 16), (16, 16, 9)):
        with torch.no_grad():
            assert 0.5 < TuckerConv3d(32, 32, 3, ranks, padding=1)(x).std() / dense(x).std() < 2
    for cls in (TuckerConvTranspose2d, TuckerConvTranspose3d):
        assert all(p.isfinite().all() for p in cls(4, 4, 2, (2, 2), stride=2).parameters())
