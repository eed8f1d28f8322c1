"""`fuse` against the network it was made from, and against that network in float64."""

from __future__ import annotations

import copy
import math
import pickle
import threading
from dataclasses import replace

import pytest
import torch
from torch import nn

import tucker_ops
from tests.fused.networks import plain_unet, residual_unet
from tests.ops.problems import relative_rms
from tucker_ops import CompressionConfig, fuse
from tucker_ops.backends import native
from tucker_ops.backends.base import Verdict
from tucker_ops.convert import LayerPlan
from tucker_ops.errors import ConfigError, ConversionError
from tucker_ops.fused import arithmetic, executor, explain

block_op = torch.ops.tucker_ops.tucker_block
CONFIG = CompressionConfig(factor=0.5, min_rank=4, align=4)


def two_groups(channels: int, **_) -> nn.Module:
    return nn.GroupNorm(2, channels)


# Networks, and the size of an input they accept.
NETWORKS = {
    "plain": (plain_unet, {}, (2, 1, 8, 12, 20)),
    "side-by-side": (plain_unet, {"features": (16, 32, 32)}, (1, 1, 8, 8, 12)),
    "plain-2d": (
        plain_unet,
        {"conv": nn.Conv2d, "norm": nn.InstanceNorm2d, "channels": 3},
        (2, 3, 24, 20),
    ),
    "anisotropic": (
        plain_unet,
        {"kernels": [(1, 3, 3), (3, 3, 3), (3, 3, 3)], "strides": [(1, 1, 1), (1, 2, 2), (2, 2, 2)]},
        (1, 1, 6, 20, 12),
    ),
    "batch-norm": (plain_unet, {"norm": nn.BatchNorm3d}, (2, 1, 8, 12, 20)),
    "group-norm": (plain_unet, {"norm": two_groups}, (1, 1, 8, 8, 8)),
    "no-affine": (plain_unet, {"norm_kwargs": {}}, (1, 1, 8, 8, 8)),
    "running-statistics": (
        plain_unet,
        {"norm_kwargs": {"affine": True, "track_running_stats": True}},
        (1, 1, 8, 8, 8),
    ),
    "no-bias": (plain_unet, {"bias": False}, (1, 1, 8, 8, 8)),
    "norm-last": (plain_unet, {"nonlin_first": True}, (1, 1, 8, 8, 8)),
    "deep-supervision": (plain_unet, {"deep_supervision": True}, (1, 1, 8, 8, 8)),
    "dropout": (plain_unet, {"dropout_op": nn.Dropout3d, "dropout_op_kwargs": {"p": 0.5}}, (1, 1, 8, 8, 8)),
    "residual": (residual_unet, {}, (2, 1, 8, 12, 20)),
    "residual-2d": (residual_unet, {"conv": nn.Conv2d, "norm": nn.InstanceNorm2d}, (1, 1, 24, 20)),
}


FORMS = {"dense": (False, False), "compressed": (True, False), "taps": (True, True)}


def made(name: str, compressed: bool, tap_ranks: bool = False) -> tuple[nn.Module, torch.Tensor]:
    """A network and an input; `tap_ranks`: every factorised layer also has a rank of its kernel's taps."""
    build, arguments, size = NETWORKS[name]
    network = build(**arguments)
    if compressed:
        decided = tucker_ops.plan(network, CONFIG)
        if tap_ranks:
            decided = replace(decided, layers=tuple(map(_with_tap_rank, decided.layers)))
        network = tucker_ops.apply(network, decided)
    return network, torch.randn(size, generator=torch.Generator().manual_seed(0))


def _with_tap_rank(layer: LayerPlan) -> LayerPlan:
    if layer.ranks is None:
        return layer
    return replace(layer, ranks=(*layer.ranks, (math.prod(layer.spec.kernel_size) + 1) // 2))


def outputs(result) -> list[torch.Tensor]:
    return list(result) if isinstance(result, list | tuple) else [result]


def in_float64(network: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    with torch.no_grad():
        return outputs(copy.deepcopy(network).double()(x.double()))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NETWORKS)
def test_equals_the_network_in_float64(name, form):
    network, x = made(name, *FORMS[form])
    expected = in_float64(network, x)
    with torch.no_grad():
        actual = outputs(fuse(network)(x))
        again = outputs(network(x))
    for fused, plain, exact in zip(actual, again, expected, strict=True):
        assert fused.dtype == torch.float32 and fused.shape == exact.shape and fused.is_contiguous()
        assert relative_rms(fused, exact) <= max(2e-5, 4 * relative_rms(plain, exact))


@pytest.mark.parametrize(
    ("name", "dtype"),
    # Torch pools no bfloat16 on the CPU, so not the residual network.
    [(name, torch.bfloat16) for name in ("plain", "anisotropic")]
    + [(name, torch.float64) for name in ("plain", "anisotropic", "residual")],
)
@pytest.mark.parametrize("tap_ranks", [False, True], ids=["channels", "taps"])
def test_other_dtypes(name, dtype, tap_ranks, monkeypatch):
    # float64 has no kernel and would run as it was: here its blocks run on the reference.
    monkeypatch.setattr(executor, "block_kernels", lambda *_: Verdict(True, ""))
    network, x = made(name, True, tap_ranks)
    network, x = network.to(dtype), x.to(dtype)
    (expected,) = in_float64(network, x)
    with torch.no_grad():
        actual, plain = fuse(network)(x), network(x)
    assert actual.dtype == dtype
    assert relative_rms(actual, expected) <= max(1e-12, 1.1 * relative_rms(plain, expected))


def test_without_a_kernel_it_runs_as_it_was(monkeypatch):
    network, x = made("plain", True)
    fused, half = fuse(network), fuse(copy.deepcopy(network).half())
    assert "float16" in str(explain(half)) and "as it was" in str(explain(half))
    monkeypatch.setenv("TUCKER_FUSE", "0")
    assert "TUCKER_FUSE=0" in str(explain(fused))
    with torch.no_grad():
        assert torch.equal(fused(x), network(x))
        monkeypatch.delenv("TUCKER_FUSE")
        assert not torch.equal(fused(x), network(x))


@pytest.mark.parametrize("name", ["plain", "residual", "batch-norm", "group-norm"])
def test_bf16_blocks_in_an_fp32_network(name, isa):
    network, x = made(name, True)
    (expected,) = in_float64(network, x)
    with torch.no_grad():
        plain = copy.deepcopy(network).bfloat16() if name == "plain" else None
        fused = fuse(network, precision="bf16")(x)
        assert fused.dtype == torch.float32 and fused.is_contiguous()
        limit = 2.5e-2 if plain is None else 1.1 * relative_rms(plain(x.bfloat16()), expected)
        assert 1e-4 < relative_rms(fused, expected) <= limit


def test_precision_by_variable(monkeypatch):
    network, x = made("plain", True)
    fused = fuse(network)
    with torch.no_grad():
        exact, low = fused(x), fuse(network, precision="bf16")(x)
        monkeypatch.setenv("TUCKER_PRECISION", "bf16")
        assert torch.equal(fused(x), low) and "; bf16, as asked for" in str(explain(fused))
        monkeypatch.setenv("TUCKER_PRECISION", "fp32")
        assert torch.equal(fused(x), exact)
        monkeypatch.setenv("TUCKER_PRECISION", "half")
        with pytest.raises(ConfigError, match="TUCKER_PRECISION 'half' given; use one of fp32, bf16, auto"):
            fused(x)
    with pytest.raises(ConfigError, match="precision 'int8' given"):
        fuse(network, precision="int8")


@pytest.mark.parametrize(("limit", "taken"), [(2.5e-2, "bf16"), (1e-4, "fp32")])
def test_automatic_precision(monkeypatch, limit, taken):
    if not native.load():
        pytest.skip(native.load().reason)
    network, x = made("plain", True)
    fused = fuse(network, precision="auto")
    monkeypatch.setenv(native.ISA_VARIABLE, "baseline")
    assert "fp32: baseline kernels do not multiply bf16" in str(explain(fused))
    monkeypatch.setenv(native.ISA_VARIABLE, "wide_bf16")
    monkeypatch.setattr(executor, "LARGEST_DIFFERENCE", limit)
    assert "the first input decides" in str(explain(fused))
    with torch.no_grad():
        results = fused(x), fused(x), fuse(network, precision=taken)(x)
    assert all(torch.equal(r, results[0]) for r in results)
    assert f"{taken}: on the first input" in str(explain(fused))


def test_every_instruction_set(isa):
    network, x = made("plain", True)
    (expected,) = in_float64(network, x)
    with torch.no_grad():
        assert relative_rms(fuse(network)(x), expected) <= 2e-5


@pytest.mark.parametrize("compressed", [False, True], ids=["dense", "compressed"])
def test_every_layer_of_a_plain_unet_is_folded(compressed):
    network, _ = made("plain", compressed)
    fusion = explain(network)
    assert all(layer.fused for layer in fusion.layers), str(fusion)
    kinds = [
        layer.kind.removeprefix("Tucker").removesuffix("3d").removesuffix("Norm") for layer in fusion.layers
    ]
    assert kinds.count("LeakyReLU") == kinds.count("Instance") == 10
    assert kinds.count("Conv") + kinds.count("ConvTranspose") == 13


def test_the_largest_tensors_are_kept_in_rank_space():
    """The first stage's, whose maps are largest: its first layer is dense, the rest keeps 4 of 6 channels."""
    # More outputs than any hidden layer has channels: a result does not count.
    network = tucker_ops.compress(plain_unet(classes=20), CONFIG)
    kept = {layer.name for layer in explain(network).layers if "rank space, 4 of 6 channels" in layer.reason}
    assert kept == {
        "encoder.stages.0.0.convs.1.conv",
        "decoder.stages.1.convs.0.conv",
        "decoder.stages.1.convs.1.conv",
    }
    assert not any("rank space" in layer.reason for layer in explain(made("plain", False)[0]).layers)


def test_a_reader_that_is_left_as_it_was_gets_all_channels():
    network, x = made("plain", True)
    expected, seen = in_float64(network, x)[0], []
    reader = network.decoder.stages[1].convs[1].conv
    reader.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape[1]))
    fused = fuse(network)
    assert "4 of 6 channels" in str(explain(network)) and "has forward hooks" in str(explain(network))
    with torch.no_grad():
        assert relative_rms(fused(x), expected) <= 2e-5
    assert seen == [6]


@pytest.mark.parametrize("ratio", [0, 30, 1000])
def test_norms_in_rank_space_survive_a_large_mean(ratio):
    """Channels whose mean is `ratio` standard deviations, and one that the expansion makes of two that cancel."""
    generator = torch.Generator().manual_seed(2)
    values = torch.randn(2, 3, 9, 21, 30, generator=generator, dtype=torch.float64) + ratio
    u_out = torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0], [1, -1, 0.02], [0.3, 2, -0.7]], dtype=torch.float64)
    core = torch.eye(3, dtype=torch.float64).reshape(3, 3, 1, 1, 1)
    ones, affine = [1] * 3, (torch.rand(4) + 0.5, torch.randn(4))
    norm = nn.InstanceNorm3d(4, affine=True).double()
    norm.weight.data, norm.bias.data = (t.double() for t in affine)
    expected = norm(arithmetic.expanded(values, u_out))

    pointwise = (ones, [0] * 3, ones)
    single, single_u, single_core = values.float(), u_out.float(), core.float()
    z, mean, m2 = block_op(
        [single], [None], [None], [None], [1.0], [None], None, single_core, *pointwise, None, None, "covariance", False
    )  # fmt: skip
    scale, shift = arithmetic.rank_norm_affine(z, mean, m2, single_u, *affine, 1e-5)
    read = [z], [single_u], [scale], [shift], [1.0], [None], None
    actual, _, _ = block_op(*read, torch.eye(4).reshape(4, 4, 1, 1, 1), *pointwise, None, None, "none", False)
    plain = norm.float()(arithmetic.expanded(single, single_u))
    assert relative_rms(actual, expected) <= max(1e-6, 4 * relative_rms(plain, expected))


def test_residual_additions_are_folded():
    network, _ = made("residual", True)
    fusion = explain(network)
    assert all(layer.fused for layer in fusion.layers), str(fusion)
    assert sum(layer.kind == "addition" for layer in fusion.layers) == 5


def test_the_profile_has_no_norm_activation_cat_or_copy():
    if not native.load():
        pytest.skip(native.load().reason)
    network, x = made("plain", True)
    fused = fuse(network)
    banned = ("norm", "leaky_relu", "aten::cat", "aten::clone", "convolution", "contiguous")

    def found(model):
        with torch.no_grad(), torch.profiler.profile(record_shapes=True) as profile:
            model(x)
        events = [e for e in profile.events() if any(word in e.name for word in banned)]
        # Weights multiplied together are small; what counts is whatever has a volume. Lists have no shape here.
        volume = [any(len(s) == 5 and s[2] > 3 for s in e.input_shapes) or "cat" in e.name for e in events]
        return {e.name for e, large in zip(events, volume, strict=True) if large}

    assert found(fused) == set()
    assert {"aten::leaky_relu_", "aten::cat", "aten::instance_norm"} <= found(network)


@pytest.mark.parametrize(
    ("name", "kind", "reason"),
    [
        ("group-norm", "LeakyReLU", "does not follow a convolution or norm that is folded"),
        ("running-statistics", "InstanceNorm3d", "running statistics"),
        ("norm-last", "InstanceNorm3d", "does not follow a convolution directly"),
    ],
)
def test_what_is_left_has_a_reason(name, kind, reason):
    network, _ = made(name, True)
    left = {(layer.kind, layer.reason) for layer in explain(network).layers if not layer.fused}
    assert any(k == kind and reason in why for k, why in left), left
    assert reason in str(explain(network))


def test_it_is_still_the_model():
    network, x = made("plain", True)
    fused = fuse(network)
    assert isinstance(fused, type(network)) and fuse(fused) is fused
    assert list(fused.state_dict()) == list(network.state_dict())
    assert {id(p) for p in fused.parameters()} == {id(p) for p in network.parameters()}
    other, _ = made("plain", True)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
        before = fused(x)
        fused.load_state_dict(other.state_dict())
        assert relative_rms(fused(x), in_float64(other, x)[0]) <= 2e-5
        assert relative_rms(fused(x), before.double()) > 1e-2
        expected = fused(x)
        for clone in (copy.copy(fused), copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
            assert type(clone) is type(fused) and torch.equal(clone(x), expected)


def test_parameters_and_switches_may_change():
    network, x = made("plain", False)
    fused = fuse(network)
    with torch.no_grad():
        fused(x)
        conv = network.encoder.stages[0][0].convs[0].conv
        conv.weight = nn.Parameter(conv.weight * 3)
        network.decoder.deep_supervision = True
        actual, expected = fused(x), in_float64(network, x)
    assert len(actual) == len(expected) == 2
    assert all(relative_rms(a, e) <= 2e-5 for a, e in zip(actual, expected, strict=True))


def test_a_change_of_the_taps_is_seen():
    network, x = made("plain", True, tap_ranks=True)
    fused = fuse(network)
    with torch.no_grad():
        before = fused(x)
        changed = [m.u_taps for m in network.modules() if getattr(m, "u_taps", None) is not None]
        assert len(changed) > 3
        for u_taps in changed:
            u_taps.data.mul_(1.1)
        after = fused(x)
    (expected,) = in_float64(network, x)
    assert not torch.equal(before, after)
    assert relative_rms(after, expected) <= 2e-5


def test_training_gradients_and_autocast_take_the_ordinary_path():
    network, x = made("plain", True)
    fused = fuse(network)
    fused(x).sum().backward()
    assert all(p.grad is not None for p in network.decoder.seg_layers[-1].parameters())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert fused(x).dtype == torch.bfloat16
    fused.train()
    assert network.encoder.training
    with torch.no_grad():
        assert fused(x).shape == network(x).shape


def test_hooks_run():
    network, x = made("plain", False)
    seen = []
    network.encoder.stages[0][0].convs[0].norm.register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        actual = fuse(network)(x)
    assert seen and relative_rms(actual, in_float64(network, x)[0]) <= 2e-5


def test_a_single_voxel_is_torchs_own_error():
    network, _ = made("plain", True)
    with torch.no_grad():
        for model in (network, fuse(network)):
            with pytest.raises(ValueError, match="more than 1 spatial element"):
                model(torch.zeros(1, 1, 4, 4, 4))


def test_nan_stays_where_it_was():
    """A norm spreads a NaN over its channel, and the next convolution over all channels."""
    network, x = made("plain", True)
    x[0, 0, 1, 2, 3] = float("nan")
    with torch.no_grad():
        actual, expected = fuse(network)(x), network(x)
    assert actual[0].isnan().all() and torch.equal(actual.isnan(), expected.isnan())


def test_two_threads_at_once():
    network, x = made("plain", True)
    fused = fuse(network)
    with torch.no_grad():
        expected = fused(x)
    results = []

    def work():
        with torch.no_grad():
            results.extend(fused(x) for _ in range(5))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 10 and all(torch.equal(r, expected) for r in results)


@pytest.mark.parametrize("tap_ranks", [False, True], ids=["channels", "taps"])
def test_compile_and_export(tap_ranks):
    network, x = made("plain", True, tap_ranks)
    fused = fuse(network).requires_grad_(False)
    with torch.no_grad():
        expected = fused(x)
        compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")(x)
        exported = torch.export.export(fused, (x,))
    torch.testing.assert_close(compiled, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(exported.module()(x), expected, rtol=1e-4, atol=1e-4)
    assert "tucker_block" in str(exported.graph) and "instance_norm" not in str(exported.graph)


def test_what_cannot_be_fused_says_so():
    with pytest.raises(ConversionError, match=r"takes a torch.nn.Module, got int"):
        fuse(3)

    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(ConversionError, match=r"torch\.fx cannot follow the forward of Branching"):
        fuse(Branching().eval())
    assert "runs as it was: torch.fx cannot follow" in str(explain(Branching().eval()))


def test_compile_in_another_precision_needs_no_eager_call_first():
    """torch.compile cannot rewrite anything: what precision and autocast ask for is there from the start."""
    network = plain_unet()
    fused = fuse(network.requires_grad_(False), precision="bf16")
    x = torch.randn(1, 1, 8, 8, 8)
    with torch.no_grad():
        compiled = torch.compile(fused, backend="eager", fullgraph=True)(x)
        assert compiled.dtype == torch.float32
        torch.testing.assert_close(compiled, fused(x))
