"""`norm_act` against float64: values, statistics, gradients, layouts, torch's machinery."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional as F

import tucker_ops  # noqa: F401
from tests.ops.problems import relative_rms, tolerance
from tests.ops.test_gradient import LIMITS, ON_CPU
from tucker_ops.backends.select import norm_act_kernels
from tucker_ops.errors import DtypeError, ShapeError
from tucker_ops.ops.norm_act import reference
from tucker_ops.ops.reference import memory_format

norm_act = torch.ops.tucker_ops.norm_act
EPS = 1e-5
SIZES = [
    (2, 5, 3, 4, 5),
    (1, 32, 8, 9, 10),
    (3, 7, 17, 33),
    (1, 1, 1, 1, 7),
    (0, 4, 3, 3, 3),
    (2, 320, 4, 4, 4),
    (1, 3, 3, 5),
]


def operands(size, dtype, layout="channels_last", affine=True, mean=0.5):
    generator = torch.Generator().manual_seed(len(size) + sum(size))
    x = (mean + torch.randn(size, generator=generator)).to(dtype)
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last if len(size) == 4 else torch.channels_last_3d)
    elif layout == "sliced":
        x = torch.cat((x, x), -1)[..., : size[-1]]
    weight, bias = (torch.randn(size[1], generator=generator) for _ in range(2))
    return x, weight if affine else None, bias if affine else None


def test_the_reference_is_torchs_norm_and_activation():
    for size, affine in itertools.product([(2, 5, 3, 4, 5), (3, 7, 6, 4)], [True, False]):
        x, weight, bias = operands(size, torch.float64, affine=affine)
        w, b = (None if t is None else t.double() for t in (weight, bias))
        expected = F.leaky_relu(F.instance_norm(x, weight=w, bias=b, eps=EPS), 0.01)
        torch.testing.assert_close(reference(x, w, b, EPS, 0.01)[0], expected)


@pytest.mark.filterwarnings("ignore:var_mean.*degrees of freedom")
@pytest.mark.parametrize("layout", ["channels_last", "contiguous", "sliced"])
@pytest.mark.parametrize("dtype", ON_CPU, ids=["fp32", "bf16"])
def test_values_and_gradients_match_float64(dtype, layout, poisoned):
    for size, affine, slope in itertools.product(SIZES, [True, False], [0.01, 1.0]):
        x, weight, bias = operands(size, dtype, layout, affine)
        given = [t.requires_grad_() for t in (x, weight, bias) if t is not None]
        exact = [t.detach().double().requires_grad_() for t in given]
        values, mean, rstd = norm_act(x, weight, bias, EPS, slope)
        w, b = exact[1:] if affine else (None, None)
        wanted = reference(exact[0], w, b, EPS, slope)
        assert values.dtype == dtype and mean.dtype == rstd.dtype == torch.float32
        assert values.is_contiguous(memory_format=memory_format(x))
        assert relative_rms(values, wanted[0]) <= tolerance(dtype, values.numel())
        for found, true in ((mean, wanted[1]), (rstd, wanted[2])):
            assert relative_rms(found, true) <= tolerance(torch.float32, found.numel())
        grad = torch.randn(size, generator=torch.Generator().manual_seed(3)).to(dtype)
        found = torch.autograd.grad(values, given, grad)
        true = torch.autograd.grad(wanted[0], exact, grad.double())
        for ours, theirs in zip(found, true, strict=True):
            error = relative_rms(ours, theirs)
            # One voxel's norm is 0 whatever it is: its gradient is rounding alone.
            if theirs.numel() and theirs.abs().max() > 1e-9:
                assert error <= tolerance(dtype, theirs.numel(), LIMITS), (size, affine, slope, error)


def test_statistics_survive_a_large_mean():
    x, weight, bias = operands((1, 16, 12, 13, 14), torch.float32, mean=1000.0)
    assert norm_act_kernels(x), norm_act_kernels(x).reason
    _, mean, rstd = norm_act(x, weight, bias, EPS, 0.01)
    _, true_mean, true_rstd = reference(x.double(), None, None, EPS, 1.0)
    torch.testing.assert_close(mean.double(), true_mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(rstd.double(), true_rstd, rtol=1e-4, atol=0)


def test_results_do_not_depend_on_the_number_of_threads():
    x, weight, bias = operands((2, 32, 16, 17, 18), torch.float32)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            values, mean, rstd = norm_act(x, weight, bias, EPS, 0.01)
            grads = torch.ops.tucker_ops.norm_act_backward(
                x, x, mean, rstd, weight, bias, EPS, 0.01, [True] * 3
            )
            results.append((values, mean, rstd, *grads))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_again_is_the_same():
    x, weight, bias = operands((2, 13, 5, 6, 7), torch.float32)
    values, mean, rstd = norm_act(x, weight, bias, EPS, 0.01)
    again = torch.ops.tucker_ops._norm_act_again_cpu(x, mean, rstd, weight, bias, 0.01)
    assert torch.equal(values, again) and again.stride() == values.stride()


def test_nan_stays_in_its_channel():
    x, weight, bias = operands((1, 8, 3, 4, 5), torch.float32)
    x[0, 3, 1, 1, 1] = float("nan")
    values, _, _ = norm_act(x, weight, bias, EPS, 0.01)
    assert values[0, 3].isnan().all() and values[0, [0, 1, 2, 4, 5, 6, 7]].isfinite().all()


@pytest.mark.parametrize("op", ["forward", "backward"])
def test_opcheck(op):
    x, weight, bias = operands((2, 5, 3, 4, 5), torch.float32)
    tensors = [t.requires_grad_() for t in (x, weight, bias)]
    if op == "forward":
        torch.library.opcheck(torch.ops.tucker_ops.norm_act.default, (*tensors, EPS, 0.01))
        torch.library.opcheck(
            torch.ops.tucker_ops._norm_act_cpu.default, (*(t.detach() for t in tensors), EPS, 0.01)
        )
        return
    _, mean, rstd = (t.detach() for t in norm_act(*tensors, EPS, 0.01))
    grad = torch.randn_like(x, requires_grad=True)
    arguments = (grad, x, mean, rstd, weight, bias, EPS, 0.01, [True] * 3)
    torch.library.opcheck(torch.ops.tucker_ops.norm_act_backward.default, arguments)
    private = [t.detach() for t in arguments[:6]]
    torch.library.opcheck(torch.ops.tucker_ops._norm_act_again_cpu.default, (*private[1:], 0.01))
    torch.library.opcheck(torch.ops.tucker_ops._norm_act_backward_cpu.default, (*private, 0.01, True))


@pytest.mark.parametrize("slope", [0.2, 1.0])
def test_gradcheck_first_and_second_order(slope):
    x, weight, bias = (t.double().requires_grad_() for t in operands((2, 2, 2, 3), torch.float64))

    def call(*args):
        return norm_act(*args, EPS, slope)[0]

    assert torch.autograd.gradcheck(call, (x, weight, bias))
    assert torch.autograd.gradgradcheck(call, (x, weight, bias))


def test_compile_fullgraph():
    x, weight, bias = (t.requires_grad_() for t in operands((2, 5, 3, 4, 5), torch.float32))

    def loss(*args):
        return norm_act(*args, EPS, 0.01)[0].square().sum()

    expected = torch.autograd.grad(loss(x, weight, bias), (x, weight, bias))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for found, wanted in zip(
        torch.autograd.grad(compiled(x, weight, bias), (x, weight, bias)), expected, strict=True
    ):
        torch.testing.assert_close(found, wanted)


def test_bad_arguments_are_named():
    x, weight, bias = operands((2, 5, 3, 4, 5), torch.float32)
    with pytest.raises(ShapeError, match=r"\[C\] = \[5\]"):
        norm_act(x, weight[:-1], bias, EPS, 0.01)
    with pytest.raises(ShapeError, match="2 or 3 spatial axes"):
        norm_act(x[0, 0], weight, bias, EPS, 0.01)
    with pytest.raises(ShapeError, match="more than 1 spatial element"):
        norm_act(x[..., :0], weight, bias, EPS, 0.01)
    with pytest.raises(DtypeError, match="not computed"):
        norm_act(x.int(), weight, bias, EPS, 0.01)
