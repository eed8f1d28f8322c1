"""Calibration: the Fisher information of small networks against its definition, and what it does to plans."""

from __future__ import annotations

import math

import pytest
import torch
from small_networks import nnunet, residual
from torch import nn
from torch.nn import functional as F

import tucker_ops
from tucker_ops.convert import Calibration, CompressionConfig, apply, calibrate, plan
from tucker_ops.decompose import Weighting, decompose, spectrum
from tucker_ops.errors import CalibrationError, ConfigError, ConversionError, ShapeError


def tiny(conv=nn.Conv2d, outputs=3, channels=2):
    return nn.Sequential(
        conv(channels, 6, 3, padding=1),
        nn.LeakyReLU(),
        conv(6, 5, 3, padding=1),
        nn.LeakyReLU(),
        conv(5, outputs, 1),
    )


def random_weighting(channels_out=6, channels_in=5, taps=9):
    gradients = torch.randn(40, channels_out, channels_in, taps, dtype=torch.float64)
    gradients *= torch.rand(channels_out, 1, 1) * torch.rand(channels_in, 1) * torch.rand(taps) ** 2
    factors = [torch.einsum(f"n{m},n{o}->{r}", gradients, gradients) / 40 for m, o, r in (
        ("oik", "pik", "op"), ("oik", "ojk", "ij"), ("oik", "oil", "kl"))]  # fmt: skip
    return Weighting(factors[1], factors[0], factors[2], float(factors[0].trace()))


def metric(delta, weighting):
    """½ ||ΔW ×₁ output^½ ×₂ input^½ ×₃ taps^½||² / energy², written out."""
    moved = torch.einsum("op,pik,ij,kl->ojl", weighting.output, delta, weighting.input, weighting.taps)
    return 0.5 * float((moved * delta).sum()) / weighting.energy**2


@pytest.mark.parametrize("transposed", [False, True])
def test_decomposition_is_better_in_the_metric_it_is_asked_for(transposed):
    weighting = random_weighting()
    weight = torch.randn(6, 5, 3, 3, dtype=torch.float64)
    given = weight.transpose(0, 1) if transposed else weight
    plain = decompose(given, (3, 3), transposed=transposed)
    aware = decompose(given, (3, 3), transposed=transposed, weighting=weighting)
    losses = []
    for factors in (plain, aware):
        dense = factors.dense().transpose(0, 1) if transposed else factors.dense()
        losses.append(metric((weight - dense).flatten(2), weighting))
    assert losses[1] < 0.7 * losses[0]
    assert aware.relative_error > plain.relative_error
    # Orthonormal, whatever the metric: half precision holds them.
    assert torch.allclose(aware.u_in @ aware.u_in.T, torch.eye(3, dtype=torch.float64), atol=1e-9)
    assert torch.allclose(aware.u_out.T @ aware.u_out, torch.eye(3, dtype=torch.float64), atol=1e-9)
    # The spectrum foretells the loss of the truncated HOSVD, which HOOI improves on, but for the damping.
    values = spectrum(given, transposed=transposed, weighting=weighting)
    foretold = values.nats * values.relative_error((3, 3)) ** 2
    assert losses[1] < 1.02 * foretold
    assert losses[1] > 0.3 * foretold


def test_full_rank_is_exact_in_any_metric():
    weight = torch.randn(6, 5, 3, 3)
    assert decompose(weight, (5, 6), weighting=random_weighting()).relative_error < 1e-6


def test_a_kernel_that_nothing_depends_on_is_weighted_evenly():
    weight = torch.randn(6, 5, 3, 3)
    none = Weighting(torch.zeros(5, 5).double(), torch.zeros(6, 6).double(), torch.zeros(9, 9).double(), 0.0)
    assert decompose(weight, (3, 3), weighting=none).relative_error == pytest.approx(
        decompose(weight, (3, 3)).relative_error, rel=1e-6
    )
    assert spectrum(weight, weighting=none).nats == 0


def test_bad_weightings():
    good = random_weighting()
    with pytest.raises(ShapeError, match=r"weighting is for .*\(6, 5, 9\).*calibrate the model"):
        decompose(torch.randn(6, 4, 3, 3), (2, 2), weighting=good)
    with pytest.raises(ShapeError, match="square"):
        Weighting(good.input[:3], good.output, good.taps, good.energy)
    with pytest.raises(ConfigError, match="NaN"):
        Weighting(good.input * math.nan, good.output, good.taps, good.energy)
    with pytest.raises(ConfigError, match="trace"):
        Weighting(good.input * 2, good.output, good.taps, good.energy)


@pytest.mark.parametrize("likelihood", ["softmax", "sigmoid"])
def test_fisher_of_a_linear_model_by_its_definition(likelihood):
    """For logits W x the score of a label y is (p - y) xᵀ: E over labels is known, and drawing must converge to it."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(2, 3, 1, bias=False)).double()
    x = torch.randn(1, 2, 1, 1, dtype=torch.float64)
    result = calibrate(model, [x], labels_per_input=4000, likelihood=likelihood).weightings["0"]
    logits = model(x).flatten()
    if likelihood == "softmax":
        p = logits.softmax(0)
        covariance = torch.diag(p) - torch.outer(p, p)
    else:
        p = logits.sigmoid()
        covariance = torch.diag(p * (1 - p))
    v = x.flatten()
    assert torch.allclose(result.output, (covariance * v.dot(v)).detach(), atol=0.05 * float(result.energy))
    assert torch.allclose(result.input, (torch.outer(v, v) * covariance.trace()).detach(), rtol=0.1)
    assert result.taps.shape == (1, 1)
    assert float(result.taps) == pytest.approx(result.energy)


def test_expected_loss_is_the_divergence_of_a_small_change():
    """½ E⟨g, ΔW⟩² without any factorisation, from the same gradients, is the KL divergence of the outputs."""
    torch.manual_seed(0)
    model = tiny().double().eval()
    x = torch.randn(1, 2, 12, 12, dtype=torch.float64)
    delta = 0.02 * torch.randn_like(model[2].weight)
    generator = torch.Generator().manual_seed(0)
    before = model(x).log_softmax(1)
    squares = []
    for _ in range(400):
        labels = torch.multinomial(before.exp().movedim(1, -1).flatten(0, -2), 1, generator=generator)
        loss = F.nll_loss(before.movedim(1, -1).flatten(0, -2), labels[:, 0], reduction="sum")
        (gradient,) = torch.autograd.grad(loss, [model[2].weight], retain_graph=True)
        squares.append(float((gradient * delta).sum()) ** 2)
    with torch.no_grad():
        model[2].weight += delta
        after = model(x).log_softmax(1)
    divergence = float((before.exp() * (before - after)).sum().detach())
    assert 0.5 * sum(squares) / len(squares) == pytest.approx(divergence, rel=0.25)


def test_calibrating_changes_nothing_and_repeats():
    model = tiny(nn.Conv3d).train()
    model[0].weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.randn(2, 2, 6, 6, 6)
    random_state = torch.get_rng_state()
    first, second = (calibrate(model, [x, x + 1]) for _ in range(2))
    assert first.digest == second.digest != calibrate(model, [x, x + 1], seed=1).digest
    assert model.training and not model[0].weight.requires_grad and model[2].weight.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert (first.samples, first.elements) == (4, 2 * x.numel())
    again = Calibration.from_dict(first.to_dict())
    assert again.digest == first.digest
    with pytest.raises(ConfigError, match="not a calibration"):
        Calibration.from_dict({"weightings": {}})


@pytest.mark.parametrize("network", [nnunet, lambda: nnunet(conv=nn.Conv2d), residual])
def test_plan_and_apply_with_a_calibration(network):
    torch.manual_seed(0)
    model = network()
    ndim = (
        2
        if isinstance(next(m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Conv3d)), nn.Conv2d)
        else 3
    )
    x = torch.randn(1, 1, *(16,) * ndim)
    calibration = calibrate(model, [x], labels_per_input=4)
    config = CompressionConfig(params=0.3, min_rank=4, align=4)
    planned = plan(model, config, input_shape=x.shape, calibration=calibration)
    assert planned.compressed.params <= 0.3 * planned.dense.params
    assert planned.calibration == calibration.digest
    assert all(layer.expected_loss > 0 for layer in planned.layers if layer.ranks)
    assert tucker_ops.Plan.from_dict(planned.to_dict()) == planned
    with pytest.raises(ConversionError, match="chosen with a calibration"):
        apply(network(), planned)
    reference = model(x).detach()
    divergences = {}
    for name, used in (("aware", calibration), ("plain", None)):
        torch.manual_seed(0)
        copy = network()
        copy.load_state_dict(model.state_dict())
        small = tucker_ops.compress(copy, config, input_shape=x.shape, calibration=used)
        divergences[name] = float(
            F.kl_div(
                small(x).detach().log_softmax(1), reference.log_softmax(1), reduction="sum", log_target=True
            )
        )
    assert divergences["aware"] < 0.8 * divergences["plain"], divergences


def test_a_calibration_of_another_model_is_refused():
    other = calibrate(tiny(), [torch.randn(1, 2, 8, 8)])
    with pytest.raises(ConfigError, match="knows nothing of"):
        plan(nnunet(), CompressionConfig(params=0.5), calibration=other)
    model = nnunet()
    planned = plan(model, CompressionConfig(factor=0.5, min_rank=4, align=4))
    with pytest.raises(ConversionError, match="knows nothing of"):
        apply(model, planned, calibration=other)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([], "no inputs"),
        ([torch.randn(1, 3, 8, 8)], "does not run on a calibration input of shape"),
        ([torch.full((1, 2, 8, 8), math.nan)], "128 NaN or infinite values"),
        ([torch.randn(8, 8)], r"must be tensors \[N, C"),
        (["image"], "must be tensors"),
    ],
)
def test_inputs_that_cannot_be(inputs, message):
    with pytest.raises(CalibrationError, match=message):
        calibrate(tiny(), inputs)


class NoGradient(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 1)

    @torch.no_grad()
    def forward(self, x):
        return self.conv(x)


def test_other_errors():
    x = torch.randn(1, 2, 8, 8)
    with pytest.raises(ConfigError, match="likelihood"):
        calibrate(tiny(), [x], likelihood="gauss")
    with pytest.raises(ConfigError, match="labels_per_input"):
        calibrate(tiny(), [x], labels_per_input=0)
    with pytest.raises(CalibrationError, match="likelihood='sigmoid'"):
        calibrate(tiny(outputs=1), [x])
    with pytest.raises(CalibrationError, match="gradient is zero"):
        calibrate(nn.Sequential(nn.Conv2d(2, 3, 1, bias=False)), [torch.zeros(1, 2, 4, 4)])
    with pytest.raises(CalibrationError, match="switch gradients off"):
        calibrate(NoGradient(), [x])
    with pytest.raises(CalibrationError, match="contains no convolution"):
        calibrate(nn.Sequential(nn.Linear(2, 2)), [x])
    assert calibrate(tiny(outputs=1), [x], likelihood="sigmoid").samples == 2
