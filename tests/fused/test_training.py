"""The training form: outputs, gradients and what is kept, against the network in float64 and as torch runs it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from bench.network_cases import as_convolutions
from tests.fused.test_fuse import FORMS, NETWORKS, made, outputs
from tests.ops.problems import relative_rms
from tests.ops.test_gradient import LIMITS, ON_CPU, saved_bytes
from tucker_ops import fuse
from tucker_ops.backends import native
from tucker_ops.backends.select import dense_kernels
from tucker_ops.fused import differentiable, executor, explain
from tucker_ops.fused.differentiable import (
    channels_last,
    dense_conv,
    norm_act_conv,
    pointwise_conv,
    tucker_conv_transpose,
)
from tucker_ops.nn import TuckerConvTranspose3d

norm_act = torch.ops.tucker_ops.norm_act


@pytest.fixture(autouse=True)
def _needs_the_extension():
    if not native.load():
        pytest.skip(native.load().reason)


def step(network: nn.Module, x: torch.Tensor) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Outputs, and the gradients of a loss that weighs every one of their elements."""
    network.zero_grad()
    found = outputs(network(x))
    generator = torch.Generator().manual_seed(11)
    loss = sum((out * torch.randn(out.shape, generator=generator).to(out)).mean() for out in found)
    loss.backward()
    return found, {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


def uses_the_form(network: nn.Module) -> bool:
    form = executor._train_form(network).module
    targets = (norm_act.default, norm_act_conv)
    return form is not None and any(node.target in targets for node in form.graph.nodes)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "dropout"])
def test_outputs_and_gradients_match_float64(name, form):
    network, x = made(name, *FORMS[form])
    exact = copy.deepcopy(network).double().train()
    fused = fuse(network).train()
    assert uses_the_form(fused) == (name not in ("batch-norm", "group-norm", "running-statistics"))
    found, grads = step(fused, x)
    wanted, true = step(exact, x.double())
    for ours, theirs in zip(found, wanted, strict=True):
        assert relative_rms(ours, theirs) <= 2e-5
    assert grads.keys() == true.keys()
    size = {name: grad.square().mean().sqrt() for name, grad in true.items()}
    for name, grad in grads.items():
        error = (grad.double() - true[name]).square().mean().sqrt()
        # That of a bias before a norm is 0, but for rounding: measured 6e-7 of the largest gradient, torch's as ours.
        rounding = 5e-6 * max(size.values()) if size[name] < 1e-9 * max(size.values()) else 0
        assert error <= max(LIMITS[torch.float32] * size[name], rounding), name


def test_convolutions_without_a_bias_are_joined_too():
    def joined(name):
        graph = executor._train_form(fuse(made(name, True)[0]).train()).module.graph
        return sum(node.target is norm_act_conv for node in graph.nodes)

    assert joined("no-bias") == joined("plain") > 0


def test_gradcheck_of_norm_and_convolution_first_and_second_order():
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, 2, 3, 4, 3), (2,), (2,), (2, 2), (2, 2, 2, 3, 1), (3, 2), (3,))
    tensors = [
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes
    ]

    def call(x, weight, bias, *conv):
        return norm_act_conv(x, weight, bias, 1e-5, 0.2, *conv, [1, 2, 1], [1, 1, 0], [1, 1, 1])

    assert torch.autograd.gradcheck(call, tensors)
    assert torch.autograd.gradgradcheck(call, tensors, fast_mode=True)


@pytest.mark.parametrize("dtype", ON_CPU, ids=["fp32", "bf16"])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels-last"])
def test_pointwise_convolution_first_and_second_order(last, dtype):
    """Against torch in float64, gradients of gradients included, which the kernels do not compute."""
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(shape, generator=generator).to(dtype)
        for shape in ((2, 5, 3, 4, 6), (7, 5, 1, 1, 1), (7,))
    )
    if last:
        x = x.contiguous(memory_format=torch.channels_last_3d)

    def results(convolution, *tensors):
        tensors = [t.detach().requires_grad_() for t in tensors]
        out = convolution(*tensors)
        first = torch.autograd.grad(out.square().sum(), tensors, retain_graph=True)
        grads = torch.autograd.grad(out.square().sum(), tensors, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in grads), tensors)
        return out, *first, *grads, *second

    ours = results(pointwise_conv, x, weight, bias)
    exact = results(nn.functional.conv3d, *(t.double() for t in (x, weight, bias)))
    assert pointwise_conv(x, weight, bias).is_contiguous(memory_format=torch.channels_last_3d)
    for i, (found, wanted) in enumerate(zip(ours, exact, strict=True)):
        assert found.dtype == dtype and found.shape == wanted.shape
        # Of bfloat16 each step of the second order is rounded, as torch's is.
        assert relative_rms(found, wanted) <= LIMITS[dtype] * (1 if i < 7 else 3)


def test_convolutions_of_one_tap_and_transposed_ones_are_taken():
    network, _ = made("plain", True)
    form = executor._train_form(fuse(network).train()).module
    taken = [node.target for node in form.graph.nodes]
    heads = [m for m in network.modules() if isinstance(m, nn.Conv3d) and set(m.kernel_size) == {1}]
    transposed = [m for m in network.modules() if isinstance(m, TuckerConvTranspose3d)]
    # Without deep supervision the last head alone runs.
    assert taken.count(pointwise_conv) == 1
    assert taken.count(tucker_conv_transpose) == len(transposed) > 0
    heads[-1].register_forward_hook(lambda *_: None)
    form = executor._train_form(fuse(copy.deepcopy(network)).train()).module
    assert [node.target for node in form.graph.nodes].count(pointwise_conv) == 0


@pytest.mark.parametrize("channels", [1, 2])
def test_dense_convolutions_write_channels_last(channels):
    """Of a single channel torch takes an image for contiguous, and turns output and gradient around."""
    x = torch.randn(2, channels, 4, 5, 6, requires_grad=True)
    given = channels_last(x)
    assert torch.equal(given, x) and given.stride(1) == 1
    assert channels != 1 or given.data_ptr() == x.data_ptr()
    conv = nn.Conv3d(channels, 8, 3, padding=1)
    out = conv(given)
    assert out.is_contiguous(memory_format=torch.channels_last_3d)
    (grad,) = torch.autograd.grad(out.sum(), x)
    (wanted,) = torch.autograd.grad(conv(x).sum(), x)
    assert relative_rms(grad, wanted.double()) <= 2e-5
    network, _ = made("plain", True)
    form = executor._train_form(fuse(network).train()).module
    kernels = [m for m in network.modules() if type(m) is nn.Conv3d and set(m.kernel_size) != {1}]
    assert [node.target for node in form.graph.nodes].count(channels_last) == len(kernels) > 0


DENSE = {
    # input, weight, padding
    "3d": ((2, 5, 6, 7, 9), (7, 5, 3, 3, 3), [1, 1, 1]),
    "flat": ((1, 4, 3, 8, 7), (6, 4, 1, 3, 3), [0, 1, 1]),
    "unpadded": ((1, 3, 4, 6, 5), (4, 3, 3, 3, 3), [0, 0, 0]),
    "wide-padding": ((1, 3, 4, 6, 5), (4, 3, 3, 3, 3), [3, 4, 3]),
    "one-channel": ((2, 1, 5, 6, 7), (4, 1, 3, 3, 3), [1, 1, 1]),
    "long-rows": ((1, 16, 3, 4, 65), (17, 16, 3, 3, 3), [1, 1, 1]),
    "tiny": ((1, 4, 1, 1, 2), (3, 4, 3, 3, 3), [1, 1, 1]),
    "2d": ((3, 5, 9, 11), (4, 5, 3, 3), [1, 1]),
    "2d-long-rows": ((2, 16, 5, 70), (16, 16, 3, 3), [1, 1]),
}


@pytest.mark.parametrize("dtype", ON_CPU, ids=["fp32", "bf16"])
@pytest.mark.parametrize("layout", ["contiguous", "channels-last", "every-second-row"])
@pytest.mark.parametrize("case", DENSE)
def test_dense_convolution_first_and_second_order(case, layout, dtype, monkeypatch):
    """On our kernels, whatever the sizes, against torch in float64."""
    monkeypatch.setattr(differentiable, "dense_kernels", lambda *_: True)
    shape, weights, padding = DENSE[case]
    generator = torch.Generator().manual_seed(0)
    last = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    double = (*shape[:2], 2 * shape[2], *shape[3:])
    x = torch.randn(double, generator=generator).to(dtype)
    x = x[:, :, ::2] if layout == "every-second-row" else x[:, :, : shape[2]].contiguous()
    x = x.contiguous(memory_format=last) if layout == "channels-last" else x
    weight = (torch.randn(weights, generator=generator) / weights[1]).to(dtype)
    bias = torch.randn(weights[0], generator=generator).to(dtype)

    def results(convolution, *tensors):
        tensors = [t.detach().requires_grad_() for t in tensors]
        out = convolution(*tensors, padding=padding)
        first = torch.autograd.grad(out.square().sum(), tensors, retain_graph=True)
        grads = torch.autograd.grad(out.square().sum(), tensors, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in grads), tensors)
        return out, *first, *grads, *second

    conv = nn.functional.conv2d if len(shape) == 4 else nn.functional.conv3d
    ours = results(dense_conv, x, weight, bias)
    exact = results(conv, *(t.double() for t in (x, weight, bias)))
    assert ours[0].is_contiguous(memory_format=last)
    for i, (found, wanted) in enumerate(zip(ours, exact, strict=True)):
        assert found.dtype == dtype and found.shape == wanted.shape
        assert relative_rms(found, wanted) <= LIMITS[dtype] * (1 if i < 7 else 3), i


def test_dense_convolution_computes_only_the_gradients_asked_for(monkeypatch):
    monkeypatch.setattr(differentiable, "dense_kernels", lambda *_: True)
    x, weight, bias = torch.randn(1, 3, 4, 5, 6), torch.randn(2, 3, 3, 3, 3), torch.randn(2)
    for chosen in range(3):
        given = [t.detach().requires_grad_(i == chosen) for i, t in enumerate((x, weight, bias))]
        (grad,) = torch.autograd.grad(dense_conv(*given, [1, 1, 1]).square().sum(), given[chosen])
        exact = [t.double().detach().requires_grad_(i == chosen) for i, t in enumerate((x, weight, bias))]
        out = nn.functional.conv3d(*exact, padding=1)
        assert relative_rms(grad, torch.autograd.grad(out.square().sum(), exact[chosen])[0]) <= 2e-5
    weight.requires_grad_()
    (grad,) = torch.autograd.grad(dense_conv(x, weight, None, [1, 1, 1]).sum(), weight)
    assert grad.shape == weight.shape


def test_dense_convolutions_are_taken_where_winograd_applies():
    """And left to torch where it does not, or where a hook wants to see them."""
    taken = nn.Conv3d(2, 3, 3, padding=1)
    others = [
        nn.Conv3d(3, 3, 3, padding=1, stride=(2, 1, 1)),
        nn.Conv3d(3, 3, 3, padding=1, dilation=(2, 1, 1)),
        nn.Conv3d(3, 3, 3, padding=1, groups=3),
        nn.Conv3d(3, 3, 3, padding=1, padding_mode="replicate"),
        nn.Conv3d(3, 3, 3, padding="same"),
        nn.Conv3d(3, 3, (3, 3, 1)),
        nn.Conv3d(3, 3, 3, padding=1),
    ]
    network = nn.Sequential(taken, *others, nn.InstanceNorm3d(3, affine=True))
    form = executor._train_form(fuse(network).train()).module
    # The last of the others as well: nothing is hooked yet.
    assert [node.target for node in form.graph.nodes].count(dense_conv) == 2
    others[-1].register_forward_hook(lambda *_: None)
    form = executor._train_form(fuse(network).train()).module
    assert [node.target for node in form.graph.nodes].count(dense_conv) == 1
    x = torch.randn(1, 2, 12, 9, 10)
    assert relative_rms(form(x), copy.deepcopy(network).double()(x.double())) <= 2e-5


def test_the_choice_of_dense_kernels_falls_back_to_torch():
    weight = torch.randn(4, 4, 3, 3, 3)
    few, many = torch.randn(2, 4, 4, 4, 4), torch.randn(2, 4, 24, 24, 24)
    assert dense_kernels(many, weight, [1, 1, 1]) and not dense_kernels(few, weight, [1, 1, 1])
    assert "float64" in dense_kernels(many.double(), weight.double(), [1, 1, 1]).reason
    # No output at all is torch's to refuse, as ever.
    with pytest.raises(RuntimeError, match="Kernel size can't be greater than actual input size"):
        dense_conv(torch.randn(1, 4, 1, 5, 5), weight, None, [0, 0, 0])
    assert dense_conv(torch.randn(0, 4, 5, 5, 5), weight, None, [1, 1, 1]).shape == (0, 4, 5, 5, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = dense_conv(many.requires_grad_(), weight.requires_grad_(), None, [1, 1, 1])
    assert out.dtype == torch.bfloat16
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(out.float().sum(), (many, weight)))


def test_transposed_tucker_convolution_matches_its_module():
    generator = torch.Generator().manual_seed(0)
    module = TuckerConvTranspose3d(6, 5, (1, 2, 2), (3, 4), stride=(1, 2, 2))
    x = torch.randn((2, 6, 3, 4, 5), generator=generator)
    exact = copy.deepcopy(module).double()(x.double())
    weights = (module.u_in, module.core, module.u_out, module.bias)
    geometry = (module.stride, module.padding, module.output_padding, module.dilation)
    assert relative_rms(tucker_conv_transpose(x, *weights, *geometry), exact) <= 2e-5


def test_frozen_parts_get_no_gradient():
    """Each of the network's parameters alone."""
    network, x = made("plain", True)
    fused = fuse(network).train()
    _, whole = step(fused, x)
    for name, parameter in list(fused.named_parameters())[:12]:
        fused.requires_grad_(False)
        parameter.requires_grad_()
        _, alone = step(fused, x)
        assert list(alone) == [name] * (name in whole)
        if alone:
            torch.testing.assert_close(alone[name], whole[name], rtol=1e-4, atol=1e-7)


def test_dropout_stays_dropout():
    network, x = made("dropout", True)
    fused = fuse(network).train()
    assert uses_the_form(fused)
    with torch.no_grad():
        assert not torch.equal(fused(x), fused(x))


def test_what_is_kept_for_backward():
    """Compressed to half the ranks: of what the same network of three convolutions a layer keeps, as torch runs it."""
    network, x = made("plain", True)
    x = torch.cat((x, x), 2)
    three = as_convolutions(network).train()
    ours = saved_bytes(lambda: fuse(network).train()(x))
    theirs = saved_bytes(lambda: three(x))
    assert ours <= 0.7 * theirs, ours / theirs


def test_hooks_run():
    """A hook on a norm keeps that norm; one on a container the whole forward as it was."""
    for target, form_used in (("encoder.stages.0.0.convs.0.norm", True), ("encoder.stages.0", False)):
        network, x = made("plain", True)
        fused, seen = fuse(network).train(), []
        fused.get_submodule(target).register_forward_hook(lambda *_, seen=seen: seen.append(1))
        fused(x)
        assert seen and uses_the_form(fused) == form_used
    network, x = made("plain", True)
    fused, seen = fuse(network).train(), []
    fused.encoder.stages[0].register_full_backward_hook(lambda *_: seen.append(1))
    step(fused, x)
    assert seen


def test_computed_parameters_are_computed_on_every_call():
    network, x = made("plain", True)
    other = network.encoder.stages[0][0].convs[1].norm
    torch.nn.utils.parametrize.register_parametrization(other, "weight", nn.Softplus(), unsafe=True)
    exact = copy.deepcopy(network).double().train()
    fused = fuse(network).train()
    assert uses_the_form(fused)
    step(fused, x)
    with torch.no_grad():
        for n in (network, exact):
            n.encoder.stages[0][0].convs[1].norm.parametrizations.weight.original.add_(1)
    for ours, theirs in zip(outputs(fused(x)), outputs(exact(x.double())), strict=True):
        assert relative_rms(ours, theirs) <= 2e-5


def test_changes_of_the_model_are_seen():
    network, x = made("plain", True)
    fused = fuse(network).train()
    first = fused(x)
    with torch.no_grad():
        fused.encoder.stages[0][0].convs[0].norm.weight.mul_(2)
    assert not torch.allclose(first, fused(x))
    fused.encoder.stages[0][0].convs[0].norm.weight = nn.Parameter(torch.ones(6))
    again = copy.deepcopy(fused).double()
    again.fused = False
    assert relative_rms(fused(x), again(x.double())) <= 2e-5


@pytest.mark.parametrize("switch", ["variable", "attribute"])
def test_it_can_be_turned_off(switch, monkeypatch):
    network, x = made("plain", True)
    fused = fuse(network).train()
    if switch == "variable":
        monkeypatch.setenv(executor.FUSE_VARIABLE, "0")
    else:
        fused.fused = False
    assert "as it was" in explain(fused).training.reason
    monkeypatch.setattr(executor, "_train_form", None)
    fused(x)


def test_explain_says_what_training_does():
    network, _ = made("plain", True)
    assert "norms as one op" in str(explain(fuse(network)))
    network.encoder.stages[0].register_forward_hook(print)
    assert "encoder.stages.0 has hooks" in explain(network).training.reason
    assert "no InstanceNorm" in explain(made("batch-norm", True)[0]).training.reason
    assert "made for the CPU" in explain(network, device="cuda").training.reason


def test_autocast_trains_in_bf16():
    network, x = made("plain", True)
    exact = copy.deepcopy(network).double().train()
    fused = fuse(network).train()
    with torch.autocast("cpu", torch.bfloat16):
        found = fused(x)
    found.float().square().mean().backward()
    assert found.dtype == torch.bfloat16
    assert all(p.grad is None or p.grad.isfinite().all() for p in fused.parameters())
    assert relative_rms(found.float(), exact(x.double())) <= 5e-2


def test_copies_and_pickles_leave_the_form_behind():
    network, x = made("plain", True)
    fused = fuse(network).train()
    expected = fused(x)
    assert executor._TRAINING in fused.__dict__
    other = copy.deepcopy(fused)
    assert executor._TRAINING not in other.__dict__
    torch.testing.assert_close(other(x), expected)
