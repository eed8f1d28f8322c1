"""Refining: a compressed network comes nearer to the dense one, and gets its weights back where it does not."""

from __future__ import annotations

import copy
import importlib
import re

import pytest
import torch
from small_networks import nnunet, snapshot
from torch import nn
from torch.nn import functional as F

import tucker_ops
from tests.ops.problems import relative_rms
from tests.ops.test_gradient import LIMITS
from tucker_ops.convert import CompressionConfig, compress, divergence, refine
from tucker_ops.convert.divergence import SLAB, distance
from tucker_ops.convert.refine import JUDGED
from tucker_ops.errors import CalibrationError, ConfigError, ShapeError


@pytest.fixture
def pair():
    """A compressed network, and the dense one."""
    dense = nnunet(conv=nn.Conv2d).eval()
    return compress(copy.deepcopy(dense), CompressionConfig(factor=0.3, min_rank=2, align=1)), dense


def patches(count=4, size=16):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 1, size, size, generator=generator) for _ in range(count)]


@torch.no_grad()
def mean_distance(model, dense, inputs, likelihood="softmax"):
    values = [distance(model(x), dense(x), likelihood=likelihood) for x in inputs]
    return float(torch.stack(values).mean())


@pytest.mark.parametrize("likelihood", ["softmax", "sigmoid"])
def test_distance_is_the_divergence_written_out(likelihood):
    student, teacher = torch.randn(2, 2, 3, 4, 5, dtype=torch.float64).unbind()
    if likelihood == "softmax":
        p, q = teacher.softmax(1), student.softmax(1)
        expected = (p * (p / q).log()).sum(1).mean()
    else:
        p, q = teacher.sigmoid(), student.sigmoid()
        expected = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum(1).mean()
    torch.testing.assert_close(
        distance(student, teacher, likelihood=likelihood).double(), expected, rtol=1e-5, atol=1e-7
    )
    assert distance(teacher, teacher, likelihood=likelihood).abs() < 1e-6


@pytest.mark.parametrize("likelihood", ["softmax", "sigmoid"])
@pytest.mark.parametrize(
    "layout", [torch.contiguous_format, torch.channels_last_3d], ids=["contiguous", "last"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("slab", [1, 300, SLAB], ids=["a-row", "rows-left-over", "all"])
def test_distance_by_slabs_is_that_of_autograd(likelihood, layout, dtype, slab, monkeypatch):
    """Value and gradient; a teacher that wants a gradient makes it the plain formula, here in float64."""
    monkeypatch.setattr(divergence, "SLAB", slab)
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(2, 3, 5, 2, 3, generator=generator) for _ in range(2))
    student = student.to(dtype).contiguous(memory_format=layout).requires_grad_()
    found = distance(student, teacher, likelihood=likelihood)
    (gradient,) = torch.autograd.grad(5 * found, student)
    exact = student.detach().double().requires_grad_()
    formula = {"softmax": divergence._softmax, "sigmoid": divergence._sigmoid}[likelihood]
    wanted = formula(exact, teacher.double()).sum(1).mean()
    (true,) = torch.autograd.grad(5 * wanted, exact)
    assert found.dtype == torch.float32 and gradient.dtype == dtype
    assert float(found.detach()) == pytest.approx(float(wanted.detach()), rel=1e-6)
    assert relative_rms(gradient, true) <= LIMITS[dtype]
    both = teacher.clone().requires_grad_()
    plain = distance(student, both, likelihood=likelihood)
    assert float(plain.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    assert torch.autograd.grad(plain, both)[0].abs().sum() > 0
    with torch.no_grad():
        assert float(distance(student, teacher, likelihood=likelihood)) == float(found.detach())
    for other in (teacher[:1], teacher[:, :, :4], teacher[:, :, :, :1]):
        with pytest.raises(ShapeError, match="not of one shape"):
            distance(student, other, likelihood=likelihood)


@pytest.mark.parametrize("likelihood", ["softmax", "sigmoid"])
def test_nearer_on_inputs_seen_and_unseen(pair, likelihood):
    model, dense = pair
    untouched = snapshot(dense)
    seen, unseen = patches(12)[:8], patches(12)[8:]
    before = [mean_distance(model, dense, part, likelihood) for part in (seen, unseen)]
    steps = []
    outcome = refine(
        model, dense, seen, steps=40, likelihood=likelihood, progress=lambda *done: steps.append(done)
    )
    after = [mean_distance(model, dense, part, likelihood) for part in (seen, unseen)]
    assert outcome.kept and outcome.reason == ""
    # All eight are judged, in whatever order.
    assert len(seen) == JUDGED
    assert outcome.before == pytest.approx(before[0], rel=1e-4)
    assert outcome.after == pytest.approx(after[0], rel=1e-4)
    assert after[0] < 0.8 * before[0] and after[1] < 0.9 * before[1]
    assert steps[0] == (1, 40, "") and steps[-1] == (40, 40, "") and len(steps) == 40
    assert snapshot(dense) == untouched
    assert all(p.grad is None for p in model.parameters())


def test_the_same_twice(pair):
    model, dense = pair
    twin = copy.deepcopy(model)
    outcomes = [refine(m, dense, patches(), steps=5) for m in (model, twin)]
    assert outcomes[0] == outcomes[1]
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("what", ["too fast", "interrupted", "broken input"])
def test_weights_come_back(pair, what):
    model, dense = pair
    before = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    if what == "too fast":
        outcome = refine(model, dense, patches(), steps=3, learning_rate=3.0)
        assert not outcome.kept and "came no nearer to the dense model" in outcome.reason
    elif what == "interrupted":

        def stop(done, total, name):
            if done == 3:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            refine(model, dense, patches(), steps=5, progress=stop)
    else:
        inputs = patches(40)
        for number, x in enumerate(inputs):
            # Those that are judged first stay whole.
            if number not in torch.randperm(40, generator=torch.Generator().manual_seed(0))[:JUDGED]:
                x[..., 0, 0] = float("nan")
        with pytest.raises(CalibrationError, match="holds NaN or infinite values; repair"):
            refine(model, dense, inputs, steps=40)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())


def test_running_statistics_and_dropout_stay_as_in_evaluation():
    """Batch norm in training mode would move its statistics, and dropout would make noise of the distance."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm = nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16)
            self.drop, self.second = nn.Dropout2d(0.9), nn.Conv2d(16, 16, 3, padding=1)
            self.head = nn.Conv2d(16, 3, 1)

        def forward(self, x):
            x = self.drop(F.relu(self.norm(self.first(x))))
            return self.head(F.relu(self.second(x)))

    dense = Net().eval()
    model = compress(copy.deepcopy(dense), CompressionConfig(factor=0.25, min_rank=2, align=1))
    before = copy.deepcopy(dict(model.named_buffers()))
    outcome = refine(model, dense, patches(2), steps=10)
    assert outcome.kept
    assert outcome.after == pytest.approx(mean_distance(model.eval(), dense, patches(2)), rel=1e-4)
    assert all(torch.equal(before[name], value) for name, value in model.named_buffers())


def test_frozen_parameters_stay(pair):
    model, dense = pair
    frozen = {name for name, p in model.named_parameters() if "norm" in name}
    for name, p in model.named_parameters():
        p.requires_grad_(name not in frozen)
    before = copy.deepcopy(model.state_dict())
    assert refine(model, dense, patches(), steps=10).kept
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed and not changed & frozen


def test_refusals(pair):
    model, dense = pair
    with pytest.raises(ConfigError, match="steps must be a whole number of at least 1, got 0"):
        refine(model, dense, patches(), steps=0)
    with pytest.raises(ConfigError, match="learning_rate must be a number above 0"):
        refine(model, dense, patches(), learning_rate=float("nan"))
    with pytest.raises(ConfigError, match="likelihood must be one of softmax, sigmoid"):
        refine(model, dense, patches(), likelihood="argmax")
    with pytest.raises(ConfigError, match="precision must be one of auto, fp32, bf16, got 'fp16'"):
        refine(model, dense, patches(), precision="fp16")
    with pytest.raises(CalibrationError, match="no inputs to refine on"):
        refine(model, dense, [])
    with pytest.raises(CalibrationError, match="the same shape for both; got"):
        refine(model, nnunet(conv=nn.Conv2d, outputs=5).eval(), patches())
    broken = copy.deepcopy(model)
    next(broken.parameters()).data.fill_(float("nan"))
    with pytest.raises(CalibrationError, match="its output is not finite"):
        refine(broken, dense, patches())
    with pytest.raises(ConfigError, match=r"no parameter of .* requires a gradient"):
        refine(model.requires_grad_(False), dense, patches())


class Dtypes:
    """Of what a convolution of `model` gives, with and without gradients asked for."""

    def __init__(self, model):
        self.stepping, self.judging = set(), set()
        conv = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
        conv.register_forward_hook(self._note)

    def _note(self, module, arguments, output):
        (self.stepping if torch.is_grad_enabled() else self.judging).add(output.dtype)


@pytest.mark.parametrize(
    ("asked", "able", "rounding", "low", "words"),
    [
        ("fp32", True, 0.1, False, r"fp32, as asked for"),
        ("bf16", False, 0.1, True, r"bf16, as asked for"),
        ("auto", False, 0.1, False, r"fp32: the processor does not multiply bf16"),
        (
            "auto",
            True,
            0.5,
            True,
            r"bf16: on the first input the distance is \S+ nats a voxel in fp32 and \S+ in bf16",
        ),
        ("auto", True, 0.0, False, r"fp32: on the first input .* in bf16, which may be off by 0%"),
    ],
)
def test_steps_in_bf16(pair, monkeypatch, asked, able, rounding, low, words):
    """Where they are in bf16 the network comes as near, by distances that are still those in float32."""
    model, dense = pair
    module = importlib.import_module("tucker_ops.convert.refine")
    monkeypatch.setattr(module, "processor_multiplies_bf16", lambda: able)
    monkeypatch.setattr(module, "ROUNDING", rounding)
    twin, seen = copy.deepcopy(model), Dtypes(model)
    outcome = refine(model, dense, patches(), steps=20, precision=asked)
    assert re.match(words, outcome.precision), outcome.precision
    assert seen.stepping == ({torch.bfloat16} if low else {torch.float32})
    assert torch.float32 in seen.judging
    assert outcome.after == pytest.approx(mean_distance(model.eval(), dense, patches()), rel=1e-4)
    exact = refine(twin, dense, patches(), steps=20, precision="fp32")
    assert outcome.before == exact.before
    assert outcome.after < exact.before - 0.9 * (exact.before - exact.after)
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_other_weights_keep_their_precision(pair):
    model, dense = (network.double() for network in pair)
    inputs = [x.double() for x in patches()]
    with pytest.raises(ConfigError, match="bf16 is a precision for weights in float32; these are in float64"):
        refine(model, dense, inputs, steps=2, precision="bf16")
    outcome = refine(model, dense, inputs, steps=10)
    assert outcome.kept and outcome.precision == "float64, as the weights are"


def test_nothing_to_gain(pair):
    dense = pair[1]
    outcome = refine(copy.deepcopy(dense), dense, patches(2), steps=2)
    assert (outcome.before, outcome.kept) == (0.0, False)
    assert tucker_ops.refine is refine


def test_dense_outputs_are_kept_while_there_is_room(pair, monkeypatch):
    """The dense network runs once for each input whose output is kept, and what is learned does not depend on it."""
    model, dense = pair
    inputs = patches()
    output_bytes = dense(inputs[0]).nbytes
    weights, runs = [], []
    for room in (4, 2, 0):
        monkeypatch.setattr(importlib.import_module("tucker_ops.convert.refine"), "KEPT", room * output_bytes)
        calls = []
        hook = dense.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        twin = copy.deepcopy(model)
        assert refine(twin, dense, inputs, steps=8, precision="fp32").kept
        hook.remove()
        weights.append(twin.state_dict())
        runs.append(len(calls))
    # Four inputs judged before, eight steps, four judged after.
    assert runs == [4, 2 + 2 * 4, 16]
    assert all(torch.equal(weights[0][name], other[name]) for other in weights[1:] for name in other)
