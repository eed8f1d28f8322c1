"""Substitution: everywhere, once, all or nothing, and equal at full rank."""

from __future__ import annotations

import copy

import pytest
import torch
from small_networks import BatchNorm2d, nnunet, residual, snapshot
from torch import nn

import tucker_ops
from tucker_ops.convert import (
    CompressionConfig,
    apply,
    apply_with_report,
    check_runs,
    compress,
    plan,
    substitute,
)
from tucker_ops.errors import ConversionError, RankError
from tucker_ops.nn import (
    TuckerConv2d,
    TuckerConv3d,
    TuckerConvTranspose2d,
    TuckerConvTranspose3d,
)

TUCKER = (TuckerConv2d, TuckerConv3d, TuckerConvTranspose2d, TuckerConvTranspose3d)
FULL = CompressionConfig(factor=1.0, only_if_cheaper=False)
HALF = CompressionConfig(factor=0.5, min_rank=4, align=4)


def anisotropic():
    return nnunet(
        (16, 24, 32),
        kernel_sizes=[[1, 3, 3], [3, 3, 3], [3, 3, 1]],
        strides=[[1, 1, 1], [1, 2, 2], [2, 2, 1]],
        conv_bias=False,
    )


def plain_2d():
    return nnunet((16, 24, 32), conv=nn.Conv2d)


NETWORKS = {
    nnunet: (1, 1, 16, 24, 16),
    residual: (1, 1, 16, 16, 16),
    anisotropic: (2, 1, 8, 24, 16),
    plain_2d: (2, 1, 32, 24),
    BatchNorm2d: (2, 3, 29, 34),
}


def relative(a, b):
    return (torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b)).item()


def modules_by_alias(model):
    groups: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        groups.setdefault(id(module), []).append(name)
    return sorted(map(tuple, groups.values()))


@pytest.mark.parametrize("build, shape", NETWORKS.items())
def test_full_rank_equals_the_dense_model(build, shape):
    model = build().eval()
    x = torch.randn(shape)
    with torch.no_grad():
        expected = model(x)
        decided = plan(model, FULL)
        aliases = modules_by_alias(model)
        converted, errors = apply_with_report(model, decided)
        assert converted is model
        assert relative(model(x), expected) < 1e-4
    assert len(decided.ranks) >= 5
    assert modules_by_alias(model) == aliases
    assert set(errors) == set(decided.ranks)
    assert max(errors.values()) < 1e-6


@pytest.mark.parametrize("build, shape", NETWORKS.items())
def test_every_replaced_module_runs_once_and_no_parameter_is_orphaned(build, shape):
    model = build().train()
    decided = plan(model, HALF)
    old = {name: model.get_submodule(name) for name in decided.ranks}
    apply(model, decided)
    assert set(check_runs(model, decided, torch.randn(shape)).values()) == {1}
    replaced = [m for m in model.modules() if isinstance(m, TUCKER)]
    assert len(replaced) == len(decided.ranks) >= 4
    left = {id(p) for p in model.parameters()}
    assert not left & {id(p) for conv in old.values() for p in conv.parameters()}
    out = model(torch.randn(shape))
    out.square().mean().backward()
    idle = {layer.name for layer in decided.layers if layer.calls == 0}
    without = {n for n, p in model.named_parameters() if p.grad is None and n.rsplit(".", 1)[0] not in idle}
    assert not without


def test_matches_the_product_of_its_factors_below_full_rank():
    model = nnunet()
    x = torch.randn(1, 1, 16, 16, 16)
    compress(model, HALF)
    dense = copy.deepcopy(model)
    with torch.no_grad():
        for name, module in list(dense.named_modules()):
            if isinstance(module, TUCKER):
                parent, _, key = name.rpartition(".")
                dense.get_submodule(parent).add_module(key, module.to_dense())
                if key == "conv":
                    dense.get_submodule(parent).all_modules[0] = dense.get_submodule(name)
        assert not any(isinstance(m, TUCKER) for m in dense.modules())
        assert relative(model(x), dense(x)) < 1e-4


def test_aliases_are_decomposed_once_and_shared():
    model = nnunet()
    calls = []
    decided = plan(model, HALF)
    apply(model, decided, progress=lambda done, total, name: calls.append((done, total, name)))
    assert [name for *_, name in calls] == list(decided.ranks)
    assert calls[-1][:2] == (len(decided.ranks), len(decided.ranks))
    block = model.encoder.stages[1][0].convs[0]
    assert isinstance(block.conv, TuckerConv3d)
    assert block.conv is block.all_modules[0]
    assert block.conv is model.decoder.encoder.stages[1][0].convs[0].conv


def test_achieved_error_is_no_worse_than_expected():
    model = nnunet()
    decided = plan(model, HALF)
    _, errors = apply_with_report(model, decided)
    for layer in decided.layers:
        if layer.ranks is not None:
            assert 0 < errors[layer.name] <= layer.expected_error + 1e-6


def test_one_plan_serves_several_folds():
    first, second = nnunet(), nnunet()
    decided = plan(first, HALF)
    _, errors = apply_with_report(first, decided)
    _, others = apply_with_report(second, decided)
    assert errors != others
    assert {k: v.shape for k, v in first.state_dict().items()} == {
        k: v.shape for k, v in second.state_dict().items()
    }


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("output_padding", [0, 1])
def test_transposed_layers_keep_bias_and_output_padding(bias, output_padding):
    model = nn.Sequential(
        nn.Conv3d(1, 16, 3),
        nn.ConvTranspose3d(16, 24, 3, 2, padding=1, output_padding=output_padding, bias=bias),
        nn.Conv3d(24, 16, 3),
    )
    x = torch.randn(1, 1, 7, 6, 5)
    expected = model(x)
    compress(model, FULL)
    assert isinstance(model[1], TuckerConvTranspose3d)
    assert model[1].output_padding == (output_padding,) * 3
    assert (model[1].bias is not None) == bias
    assert model(x).shape == expected.shape
    assert relative(model(x), expected) < 1e-4


def test_grouped_layers_are_left_alone():
    grouped = nn.Conv2d(16, 32, 3, groups=4, bias=False)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), grouped, nn.Conv2d(32, 16, 3))
    x = torch.randn(1, 3, 12, 12)
    expected = model(x)
    compress(model, FULL)
    assert model[1] is grouped
    assert relative(model(x), expected) < 1e-4


def test_a_convolution_alone_is_replaced_by_return():
    conv = nn.Conv3d(16, 24, 3)
    converted = compress(conv, FULL)
    x = torch.randn(1, 16, 5, 5, 5)
    assert isinstance(converted, TuckerConv3d)
    assert relative(converted(x), conv(x)) < 1e-5


def test_a_layer_run_twice_keeps_running_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.conv = nn.Conv2d(1, 16, 3), nn.Conv2d(16, 16, 3, padding=1)

        def forward(self, x):
            return self.conv(self.conv(self.first(x)))

    model = Twice()
    decided = plan(model, HALF, input_shape=(1, 1, 12, 12))
    assert decided.layers[1].dense.macs == 2 * 16 * 16 * 9 * 100
    assert decided.layers[1].dense.params == 16 * 16 * 9 + 16
    apply(model, decided)
    assert check_runs(model, decided, torch.randn(1, 1, 12, 12)) == {"conv": 2}


def test_dtype_flags_and_buffers_carry_over():
    model = nnunet().to(torch.bfloat16).train()
    model.encoder.requires_grad_(False)
    compress(model, HALF)
    inner = model.encoder.stages[1][0].convs[0].conv
    outer = model.decoder.stages[0].convs[0].conv
    assert isinstance(inner, TuckerConv3d) and isinstance(outer, TuckerConv3d)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in inner.parameters())
    assert all(p.requires_grad for p in outer.parameters())
    assert inner.training


def broken_last(model):
    with torch.no_grad():
        model.decoder.stages[1].convs[1].conv.weight.fill_(float("inf"))
    return model


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda: broken_last(nnunet()), r"decoder\.stages\.1\.convs\.1\.conv: .*NaN or infinite"),
        (lambda: nnunet((16, 24, 40)), "made for another model"),
        (lambda: nnunet((16, 24, 32, 32)), "does not know"),
        (lambda: nnunet((16, 24)), "has no convolution"),
        (lambda: nnunet(n_conv_per_stage=3), "another model"),
        (lambda: nnunet(conv_bias=False), "another model"),
        (lambda: nnunet().to("meta"), "meta"),
    ],
)
def test_what_cannot_be_applied_leaves_the_model_as_it_was(change, message):
    decided = plan(nnunet(), HALF)
    model = change()
    if next(model.parameters()).is_meta:
        with pytest.raises(ConversionError, match=message):
            apply(model, decided)
        return
    before = snapshot(model)
    with pytest.raises(ConversionError, match=message):
        apply(model, decided)
    after = snapshot(model)
    # NaN and infinity do not equal themselves, so sums are compared as text.
    assert repr(after) == repr(before)


def test_layers_reached_behind_the_back_of_the_module_tree_undo_the_conversion():
    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.conv = nn.Conv2d(1, 16, 3), nn.Conv2d(16, 16, 3)
            self.hidden = [self.conv]

        def forward(self, x):
            return self.hidden[0](self.first(x))

    model = Hidden()
    decided = plan(model, HALF)
    before = snapshot(model)
    with pytest.raises(ConversionError, match=r"'conv' ran 1 time.*0 time"):
        apply(model, decided)
    assert snapshot(model) == before


def test_compressing_twice_says_that_nothing_is_left():
    model = nn.Sequential(nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3))
    compress(model, HALF)
    with pytest.raises(ConversionError, match="already converted"):
        compress(model, HALF)


def test_check_runs_notices_a_layer_that_is_passed_by():
    model = nnunet()
    decided = plan(model, HALF)
    apply(model, decided)
    block = model.encoder.stages[1][0].convs[0]
    block.all_modules[0] = copy.deepcopy(block.conv)
    with pytest.raises(ConversionError, match=r"encoder\.stages\.1\.0\.convs\.0\.conv"):
        check_runs(model, decided, torch.randn(1, 1, 16, 16, 16))


@pytest.mark.parametrize("build, shape", NETWORKS.items())
def test_substitute_gives_the_structure_to_load_weights_into(build, shape):
    model = build().eval()
    fresh = build().eval()
    decided = plan(model, HALF)
    apply(model, decided)
    # Any alias will do as a name.
    names = {layer.name: (layer.aliases or (layer.name,))[-1] for layer in decided.layers}
    assert substitute(fresh, {names[n]: ranks for n, ranks in decided.ranks.items()}) is fresh
    assert modules_by_alias(fresh) == modules_by_alias(model)
    fresh.load_state_dict(model.state_dict(), strict=True)
    x = torch.randn(shape)
    with torch.no_grad():
        assert torch.equal(fresh(x), model(x))


def test_substitute_keeps_dtype_device_and_flags():
    model = nnunet().half().to("meta").train()
    substitute(model, {"decoder.stages.0.convs.0.conv": (8, 8)})
    module = model.decoder.stages[0].convs[0].all_modules[0]
    assert (module.ranks, module.core.dtype, module.core.is_meta) == ((8, 8), torch.float16, True)
    assert module.training


@pytest.mark.parametrize(
    "ranks, error, message",
    [
        ({"decoder.stages.0.convs.0.conv": (8, 8), "nowhere": (8, 8)}, ConversionError, "'nowhere'"),
        (
            {"decoder.stages.0.convs.0.conv": (8, 8), "decoder.stages.0": (8, 8)},
            ConversionError,
            "decoder.stages.0'",
        ),
        (
            {"decoder.stages.0.convs.0.conv": (8, 8), "decoder.stages.0.convs.0.all_modules.0": (8, 8)},
            ConversionError,
            "twice",
        ),
        (
            {"decoder.stages.0.convs.0.conv": (8, 8), "decoder.stages.1.convs.0.conv": (8, 99)},
            RankError,
            "99",
        ),
    ],
)
def test_substitute_refuses_and_leaves_the_model_as_it_was(ranks, error, message):
    model = nnunet()
    before = [(n, id(m)) for n, m in model.named_modules(remove_duplicate=False)]
    with pytest.raises(error, match=message):
        substitute(model, ranks)
    assert [(n, id(m)) for n, m in model.named_modules(remove_duplicate=False)] == before


def test_public_names():
    assert tucker_ops.compress is compress
    assert tucker_ops.plan is plan
    assert tucker_ops.apply is apply
    assert tucker_ops.CompressionConfig is CompressionConfig
    assert tucker_ops.decompose(torch.randn(8, 8, 3, 3), (4, 4)).ranks == (4, 4)
