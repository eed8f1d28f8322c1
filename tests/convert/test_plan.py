"""Planning: ranks, reasons, budgets, and that the model is not touched."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import pydoc

import pytest
import torch
from small_networks import BatchNorm2d, nnunet, residual, snapshot
from torch import nn

from tucker_ops.convert import CompressionConfig, Plan, apply, plan, policy
from tucker_ops.cost import dense_cost, one_pass_cost
from tucker_ops.errors import ConfigError, ConversionError

FULL = CompressionConfig(factor=1.0, only_if_cheaper=False)


def fade(model: nn.Module) -> nn.Module:
    """Give every kernel falling singular values, faster in some layers than in others."""
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Conv3d)]
    with torch.no_grad():
        for i, conv in enumerate(convs):
            for mode in (0, 1):
                n = conv.weight.shape[mode]
                scales = torch.arange(1, n + 1).float() ** (-0.4 * (1 + i % 4))
                conv.weight.copy_((conv.weight.movedim(mode, -1) * scales).movedim(-1, mode))
    return model


def reason(model: nn.Module, name: str, config: CompressionConfig = FULL, **arguments) -> str:
    layers = {layer.name: layer for layer in plan(model, config, **arguments).layers}
    assert layers[name].ranks is None
    return layers[name].reason


@pytest.mark.parametrize("build", [nnunet, residual, BatchNorm2d])
@pytest.mark.parametrize("config", [CompressionConfig(), CompressionConfig(params=0.5), FULL])
def test_is_pure(build, config):
    model = build().train()
    before = snapshot(model)
    assert plan(model, config) == plan(model, config)
    assert snapshot(model) == before


def test_nnunet_by_the_factor_rule():
    model = nnunet()
    decided = plan(model, CompressionConfig(factor=0.5), input_shape=(1, 1, 32, 32, 32))
    layers = {layer.name: layer for layer in decided.layers}
    assert len(layers) == 14
    layer = layers["encoder.stages.1.0.convs.0.conv"]
    assert set(layer.aliases) == {
        "encoder.stages.1.0.convs.0.all_modules.0",
        "decoder.encoder.stages.1.0.convs.0.conv",
        "decoder.encoder.stages.1.0.convs.0.all_modules.0",
    }
    assert layer.ranks == (8, 16)  # 24 * 0.5 = 12 lies between 8 and 16: up
    assert layer.dense == dense_cost(layer.spec, (32, 32, 32))
    assert layer.tucker == one_pass_cost(layer.spec, (8, 16), (32, 32, 32))
    assert 0 < layer.expected_error < 1
    assert "first layer" in layers["encoder.stages.0.0.convs.0.conv"].reason
    assert "not run" in layers["decoder.seg_layers.0"].reason
    assert "head" in layers["decoder.seg_layers.1"].reason
    assert all((layer.ranks is None) == (layer.reason is not None) for layer in decided.layers)
    assert decided.dense.params == sum(p.numel() for p in model.parameters())
    assert decided.dense.macs == sum(layer.dense.macs for layer in decided.layers)


def test_totals_are_those_of_the_converted_model():
    for build in (nnunet, residual, BatchNorm2d):
        model = build()
        decided = plan(model, CompressionConfig(factor=0.5, min_rank=4, align=4))
        apply(model, decided)
        assert decided.compressed.params == sum(p.numel() for p in model.parameters())


def test_heads_of_deep_supervision_stay_dense():
    model = nnunet(deep_supervision=True)
    for i in range(2):
        assert "head" in reason(model, f"decoder.seg_layers.{i}")
    everything = CompressionConfig.weber2024(1.0)
    assert len(plan(model, everything).ranks) == len(plan(model, everything).layers)


class Bench(nn.Module):
    """One layer under test between two plain ones."""

    def __init__(self, middle: nn.Module, channels: int = 16):
        super().__init__()
        self.before = nn.Conv2d(1, channels, 3, padding=1)
        self.middle = middle
        self.after = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.after(self.middle(self.before(x)))


def hooked(kind: str) -> nn.Module:
    conv = nn.Conv2d(16, 16, 3, padding=1)
    getattr(conv, f"register_{kind}")(lambda *_: None)
    return conv


class Subclass(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) * 2


@pytest.mark.parametrize(
    "middle, words",
    [
        (lambda: nn.Conv2d(16, 16, 3, padding=1, groups=4), "grouped"),
        (lambda: nn.Conv2d(16, 16, 3, padding=1, padding_mode="reflect"), "'reflect'"),
        (lambda: nn.Conv2d(16, 16, 4, padding="same"), "unevenly"),
        (lambda: Subclass(16, 16, 3, padding=1), "Subclass"),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(16, 16, 3, padding=1)), "class of its own"),
        (lambda: nn.utils.spectral_norm(nn.Conv2d(16, 16, 3, padding=1)), "parametrization or hook"),
        (lambda: hooked("forward_hook"), "hooks"),
        (lambda: hooked("forward_pre_hook"), "hooks"),
        (lambda: hooked("full_backward_hook"), "hooks"),
    ],
)
def test_what_cannot_be_replaced_says_why(middle, words):
    model = Bench(middle())
    assert words in reason(model, "middle")
    assert set(plan(model, FULL).ranks) == {"after"}


def test_lazy_layers_stay_dense():
    model = Bench(nn.LazyConv2d(16, 3, padding=1))
    decided = plan(model, FULL)
    assert "LazyConv2d" in {layer.name: layer.reason for layer in decided.layers}["middle"]
    assert any("no forward pass could be traced" in note for note in decided.notes)


def test_weights_shared_by_two_modules_stay_dense():
    model = Bench(nn.Conv2d(16, 16, 3, padding=1))
    model.after.weight = model.middle.weight
    assert "shares" in reason(model, "middle")
    assert "shares" in reason(model, "after")


def test_one_dimensional_layers_stay_dense():
    model = nn.Sequential(nn.Conv1d(16, 16, 3), nn.Conv1d(16, 16, 3))
    assert "1D" in reason(model, "1")


def test_first_layer_with_channels_to_reduce_is_factorised():
    model = nn.Sequential(nn.Conv2d(32, 32, 3), nn.Conv2d(32, 32, 3))
    assert set(plan(model, CompressionConfig()).ranks) == {"0", "1"}
    assert "first layer" in reason(
        model, "0", CompressionConfig(factor=1.0, min_rank=32, only_if_cheaper=False)
    )


def test_switches():
    model = nnunet()
    decided = plan(model, CompressionConfig(skip_transposed=True))
    transposed = [layer for layer in decided.layers if layer.spec.transposed]
    assert len(transposed) == 2
    assert all("skip_transposed" in layer.reason for layer in transposed)
    decided = plan(model, dataclasses.replace(FULL, skip_first=False, skip_heads=False))
    assert set(decided.ranks) == {layer.name for layer in decided.layers} - {"decoder.seg_layers.0"}


def test_layers_that_do_not_get_cheaper_say_by_how_much():
    model = nn.Sequential(nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 64, 3))
    config = CompressionConfig(factor=0.5)
    # 16·8 + 8·8 + 8·16 + 16 against 16·16 + 16
    assert "336 parameters against 272" in reason(model, "1", config)
    decided = plan(model, dataclasses.replace(config, only_if_cheaper=False))
    assert set(decided.ranks) == {"0", "1", "2"}


def test_pointwise_layers_in_the_middle_are_factorised_where_that_pays():
    assert plan(BatchNorm2d(), CompressionConfig(factor=0.25)).ranks["point"] == (8, 16)


def test_macs_can_rule_out_what_parameters_would_allow():
    # The reducing 1×1 runs on the 16 times larger input.
    model = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.Conv2d(64, 8, 3, stride=4, padding=1))
    words = reason(model, "1", CompressionConfig(factor=0.5), input_shape=(1, 64, 64, 64))
    assert "MACs" in words and "parameters" not in words


def test_exclude():
    model = nnunet()
    decided = plan(model, CompressionConfig(exclude=("encoder.*", "*.all_modules.0")))
    assert {name.split(".")[1] for name in decided.ranks} == {"transpconvs"}
    with pytest.raises(ConfigError, match=r"'decoder\.nothing\*' matches none of the 14"):
        plan(model, CompressionConfig(exclude=("encoder.*", "decoder.nothing*")))


def test_no_convolution_and_nothing_to_do_are_told_apart():
    with pytest.raises(ConversionError, match="contains no convolution"):
        plan(nn.Linear(3, 3))
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
    decided = plan(model, CompressionConfig())
    assert any("no layer is factorised" in note for note in decided.notes)
    with pytest.raises(ConversionError, match=r"leaves all 2 convolutions dense.*not cheaper"):
        apply(model, decided)


@pytest.mark.parametrize("unit", ["params", "macs"])
@pytest.mark.parametrize("value", [0.3, 0.5, 0.8])
def test_budgets_are_kept_and_used(unit, value):
    model = fade(nnunet((16, 32, 64)))
    decided = plan(model, CompressionConfig(**{unit: value}))
    share = getattr(decided.compressed, unit) / getattr(decided.dense, unit)
    assert 0.95 * value <= share <= value
    for layer in decided.layers:
        if layer.ranks is not None:
            assert layer.tucker.params < layer.dense.params and layer.tucker.macs < layer.dense.macs
            assert all(r % 8 == 0 for r in layer.ranks[:2])
            assert len(layer.ranks) == 2 or (unit == "params" and layer.ranks[2] < 27)


def smooth(model):
    """`model` with kernels like those of images: neighbouring taps alike."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for conv in (m for m in model.modules() if isinstance(m, nn.Conv3d) and max(m.kernel_size) == 3):
            few = torch.randn(4, 27, generator=generator)
            mixed = torch.randn(*conv.weight.shape[:2], 4, generator=generator) @ few
            conv.weight += 3 * conv.weight.std() * mixed.reshape_as(conv.weight) / mixed.std()
    return model


def test_a_rank_of_the_taps_saves_parameters_for_those_of_the_channels():
    model = smooth(fade(nnunet((16, 32, 64))))
    config = CompressionConfig(params=0.15)
    decided, without = (plan(model, c) for c in (config, dataclasses.replace(config, tap_ranks=False)))
    assert all(len(ranks) == 2 for ranks in without.ranks.values())
    assert sum(len(ranks) == 3 for ranks in decided.ranks.values()) > 3
    for made in (decided, without):
        assert 0.95 * 0.15 <= made.compressed.params / made.dense.params <= 0.15

    def lost(made):
        return sum(-math.log(1 - layer.expected_error**2) for layer in made.layers if layer.ranks)

    assert lost(decided) < 0.6 * lost(without)
    assert decided.compressed.macs > without.compressed.macs
    assert Plan.from_dict(json.loads(json.dumps(decided.to_dict()))) == decided
    name, ranks = next((n, r) for n, r in decided.ranks.items() if len(r) == 3)
    assert "{}, {}, {}".format(*ranks) in next(line for line in str(decided).splitlines() if name in line)
    converted = apply(model, decided)
    assert sum(p.numel() for p in converted.parameters()) == decided.compressed.params
    assert converted.get_submodule(name).ranks == ranks


def test_what_no_budget_would_take_is_thrown_out(monkeypatch):
    model = smooth(fade(nnunet((16, 32, 64))))
    config = CompressionConfig(params=0.15, align=2, min_rank=2)
    expected = plan(model, config)
    # In any number of goes, or not at all, the ranks are the same.
    monkeypatch.setattr(policy, "MOST_CHOICES", 100)
    assert plan(model, config) == expected
    monkeypatch.setattr(policy, "_undominated", lambda *lists: lists)
    assert plan(model, config).ranks == expected.ranks


def test_an_absolute_budget_is_the_fraction_it_makes():
    model = fade(nnunet((16, 32, 64)))
    shape = (1, 1, 32, 32, 32)
    total = plan(model, input_shape=shape).dense
    for unit in ("params", "macs"):
        relative = plan(model, CompressionConfig(**{unit: 0.5}), input_shape=shape)
        absolute = plan(model, CompressionConfig(**{unit: 0.5 * getattr(total, unit)}), input_shape=shape)
        assert relative.ranks == absolute.ranks


def test_a_budget_beats_the_factor_rule_of_the_same_size():
    model = fade(nnunet((16, 32, 64)))
    uniform = plan(model, CompressionConfig(factor=0.5))
    shared = plan(model, CompressionConfig(params=uniform.compressed.params))

    def kept(decided):
        return math.prod(1 - layer.expected_error**2 for layer in decided.layers if layer.ranks is not None)

    assert shared.compressed.params <= uniform.compressed.params
    assert kept(shared) > 1.3 * kept(uniform)


def test_a_budget_without_only_if_cheaper_factorises_every_eligible_layer():
    model = nnunet()
    every = set(plan(model, FULL).ranks)
    assert set(plan(model, CompressionConfig(params=0.7, only_if_cheaper=False)).ranks) == every


def test_budget_out_of_reach_names_the_least():
    model = nnunet()
    with pytest.raises(ConfigError, match=r"cannot go below [\d,]+ \(0\.\d+\)") as caught:
        plan(model, CompressionConfig(params=0.001))
    share = float(str(caught.value).split("(")[1].split(")")[0])
    assert plan(model, CompressionConfig(params=share)).ranks, "the share that the message names must do"
    least = int(str(caught.value).split("cannot go below ")[1].split(" ")[0].replace(",", ""))
    assert plan(model, CompressionConfig(params=least)).compressed.params == least
    with pytest.raises(ConfigError, match="cannot go below"):
        plan(model, CompressionConfig(params=least - 1))


def test_energy_keeps_what_it_says():
    model = fade(nnunet())
    low, high = (plan(model, CompressionConfig(energy=e, align=1, min_rank=1)) for e in (0.8, 0.95))
    assert high.compressed.params > low.compressed.params
    for layer in high.layers:
        if layer.ranks is not None:
            # Each mode drops at most 5 %, so both together at most 10 %.
            assert layer.expected_error**2 <= 0.1


class NeedsTwo(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(1, 32, 3), nn.Conv2d(32, 32, 3, stride=2), nn.Conv2d(32, 2, 1)

    def forward(self, x, y):
        return self.head(self.b(self.a(x) + y))


def test_models_that_cannot_be_traced_are_judged_by_structure():
    decided = plan(NeedsTwo(), CompressionConfig())
    assert decided.input_shape is None
    assert any("no forward pass could be traced" in note for note in decided.notes)
    layers = {layer.name: layer for layer in decided.layers}
    assert set(decided.ranks) == {"b"}
    # Per output voxel, four input voxels.
    assert layers["b"].tucker.macs == 4 * 32 * 16 + 9 * 16 * 16 + 16 * 32
    assert "first layer" in layers["a"].reason and "head" in layers["head"].reason
    with pytest.raises(ConfigError, match="input_shape"):
        plan(NeedsTwo(), CompressionConfig(macs=0.5))


def test_absolute_macs_need_an_input_shape():
    model = nnunet()
    with pytest.raises(ConfigError, match="input_shape"):
        plan(model, CompressionConfig(macs=10_000_000))
    assert plan(model, CompressionConfig(macs=0.5)).ranks


@pytest.mark.parametrize(
    "shape, error",
    [((1, 2, 32, 32, 32), ConversionError), ((1, 1), ConfigError), ((1, 1, 0, 8, 8), ConfigError)],
)
def test_input_shapes_that_do_not_fit(shape, error):
    with pytest.raises(error, match="input_shape"):
        plan(nnunet(), input_shape=shape)


def test_meta_weights_are_planned_by_factor_only():
    with torch.device("meta"):
        model = nnunet()
    decided = plan(model)
    assert decided.ranks == plan(nnunet()).ranks
    assert all(layer.expected_error is None for layer in decided.layers)
    with pytest.raises(ConfigError, match="meta"):
        plan(model, CompressionConfig(energy=0.9))


def test_bad_weights_are_named():
    model = nnunet()
    with torch.no_grad():
        model.decoder.stages[0].convs[1].conv.weight[0, 0] = float("nan")
    with pytest.raises(ConversionError, match=r"decoder\.stages\.0\.convs\.1\.conv: .*NaN"):
        plan(model)


@pytest.mark.parametrize("build", [nnunet, BatchNorm2d, NeedsTwo])
def test_survives_json(build):
    decided = plan(build(), CompressionConfig(factor=0.4, exclude=("*a*",) if build is NeedsTwo else ()))
    assert Plan.from_dict(json.loads(json.dumps(decided.to_dict()))) == decided


def test_from_dict_refuses():
    data = plan(nnunet()).to_dict()
    for change, message in [
        ({"version": 9}, "version 9"),
        ({"layers": [{"name": "a"}]}, "not a compression plan"),
        ({"surprise": 1}, "surprise"),
    ]:
        with pytest.raises(ConfigError, match=message):
            Plan.from_dict({**data, **change})
    with pytest.raises(ConfigError, match="layers"):
        Plan.from_dict({k: v for k, v in data.items() if k != "layers"})


def test_prints_every_layer_with_ranks_or_reason():
    decided = plan(nnunet())
    text = str(decided)
    for layer in decided.layers:
        line = next(line for line in text.splitlines() if line.startswith(layer.name + " "))
        assert (
            (layer.reason in line) if layer.ranks is None else (f"{layer.ranks[0]}, {layer.ranks[1]}" in line)
        )
    assert f"{len(decided.ranks)} of {len(decided.layers)} convolutions" in text


def test_table_for_rich():
    console = pytest.importorskip("rich.console").Console(width=300, record=True, file=io.StringIO())
    decided = plan(nnunet())
    console.print(decided)
    text = console.export_text()
    assert all(layer.name in text for layer in decided.layers)


def test_trained_hippocampus_model_at_factor_03(repo_root):
    unet = pytest.importorskip("dynamic_network_architectures.architectures.unet")
    plans = next((repo_root / "examples" / "hippocampus" / "model").glob("*/*/plans.json"))
    architecture = json.loads(plans.read_text())["configurations"]["3d_fullres"]["architecture"]
    arguments = dict(architecture["arch_kwargs"])
    for key in architecture["_kw_requires_import"]:
        arguments[key] = arguments[key] and pydoc.locate(arguments[key])
    with torch.device("meta"):
        network = unet.PlainConvUNet(input_channels=1, num_classes=3, **arguments)
    decided = plan(network, CompressionConfig(factor=0.3), input_shape=(1, 1, 40, 56, 40))
    assert decided.compressed.params <= 0.13 * decided.dense.params
