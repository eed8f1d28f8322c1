"""The op against float64: values, gradients, layouts, every backend and instruction set."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import tucker_ops
from tests.ops.problems import (
    GRADIENT_TOLERANCE,
    TOLERANCE,
    Case,
    random_cases,
    reference,
    relative_rms,
    tolerance,
)
from tucker_ops.backends import native
from tucker_ops.ops.reference import memory_format

CASES = random_cases(240)
WINOGRAD_CASES = random_cases(120, seed=1, winograd=True)
SMALL = Case(0, 2, (5, 4, 3, 6), (4, 5, 6), (3, 3, 3), (1, 2, 1), (1, 1, 1), (1, 1, 1), True, "contiguous")


def check(case: Case, dtype: torch.dtype, backend: str | None) -> None:
    tensors = case.tensors(dtype)
    expected = reference(tensors, case.geometry)
    actual = tucker_ops.tucker_conv(*tensors, *case.geometry, backend=backend)
    assert actual.shape == expected.shape
    assert actual.dtype == dtype
    assert actual.is_contiguous(memory_format=memory_format(tensors[0]))
    assert relative_rms(actual, expected) <= tolerance(dtype, expected.numel())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_cpu_kernels_match_float64(isa, dtype, poisoned):
    for case in CASES:
        try:
            check(case, dtype, "cpu")
        except AssertionError as error:
            raise AssertionError(f"{isa} on {case}: {error}") from error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_every_core_matches_float64(isa, core, dtype, poisoned):
    for case in WINOGRAD_CASES:
        try:
            check(case, dtype, "cpu")
        except AssertionError as error:
            raise AssertionError(f"{isa}, {core} on {case}: {error}") from error


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_reference_backend_matches_float64(dtype):
    # fp16 is compared on fewer problems: torch convolves it slowly on most processors.
    for case in CASES[::20]:
        check(case, dtype, "reference")


def test_the_error_measure_sees_an_unwritten_element(poisoned):
    expected = torch.ones(100, dtype=torch.float64)
    assert not relative_rms(torch.empty(100), expected) <= 1.0


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_gradients_match_float64(backend):
    if not tucker_ops.backends()[backend].ok:
        pytest.skip(tucker_ops.backends()[backend].reason)
    for case in CASES:
        tensors = case.tensors(torch.float32, requires_grad=True)
        exact = [None if t is None else t.detach().double().requires_grad_() for t in tensors]
        out = tucker_ops.tucker_conv(*tensors, *case.geometry, backend=backend)
        weight = torch.randn(out.shape)
        (out * weight).sum().backward()
        expected = tucker_ops.ops.reference.three_convs(*exact, *(list(g) for g in case.geometry))
        (expected * weight.double()).sum().backward()
        for actual, wanted in zip(tensors, exact, strict=True):
            if actual is not None:
                assert actual.grad.shape == actual.shape
                limit = tolerance(torch.float32, wanted.numel(), GRADIENT_TOLERANCE)
                assert relative_rms(actual.grad, wanted.grad) <= limit, f"{case}, {tuple(wanted.shape)}"


def test_gradcheck_first_and_second_order():
    case = Case(0, 1, (2, 2, 2, 3), (3, 4, 3), (2, 3, 1), (1, 2, 1), (1, 1, 0), (1, 1, 1), True, "contiguous")
    tensors = case.tensors(torch.float64, requires_grad=True)

    def call(*args):
        return tucker_ops.tucker_conv(*args, *case.geometry)

    assert torch.autograd.gradcheck(call, tensors)
    assert torch.autograd.gradgradcheck(call, tensors, fast_mode=True)


def test_only_the_gradients_asked_for_are_computed():
    x, u_in, core, u_out, bias = SMALL.tensors(torch.float32)
    core.requires_grad_()
    tucker_ops.tucker_conv(x, u_in, core, u_out, bias, *SMALL.geometry).sum().backward()
    assert core.grad is not None
    assert x.grad is None and u_in.grad is None and u_out.grad is None and bias.grad is None


def test_equals_a_dense_convolution_at_full_rank():
    weight, x = (
        torch.randn(6, 5, 3, 3, 3, dtype=torch.float64),
        torch.randn(2, 5, 7, 6, 5, dtype=torch.float64),
    )
    eye_in, eye_out = torch.eye(5, dtype=torch.float64), torch.eye(6, dtype=torch.float64)
    actual = tucker_ops.tucker_conv(x, eye_in, weight, eye_out, None, 2, 1)
    torch.testing.assert_close(actual, F.conv3d(x, weight, None, 2, 1))


def test_unbatched_input_as_in_torch():
    x, u_in, core, u_out, bias = SMALL.tensors(torch.float32)
    whole = tucker_ops.tucker_conv(x, u_in, core, u_out, bias, padding=1)
    # By another core algorithm, perhaps: which is chosen depends on the batch.
    alone = tucker_ops.tucker_conv(x[0], u_in, core, u_out, bias, padding=1)
    assert relative_rms(alone, whole[0].double()) <= tolerance(torch.float32, alone.numel())


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_nan_reaches_exactly_the_outputs_that_read_it(backend):
    if not tucker_ops.backends()[backend].ok:
        pytest.skip(tucker_ops.backends()[backend].reason)
    x, u_in, core, u_out, bias = SMALL.tensors(torch.float32)
    x[0, 2, 1, 2, 3] = float("nan")
    out = tucker_ops.tucker_conv(x, u_in, core, u_out, bias, 1, 1, backend=backend)
    expected = F.max_pool3d(torch.nan_to_num(x.isnan().float()), 3, 1, 1).amax(1, keepdim=True).bool()
    assert torch.equal(out.isnan(), expected.expand_as(out))


@pytest.mark.parametrize("block", [2, 4])
def test_nan_stays_in_the_blocks_that_read_it(block, monkeypatch):
    if not native.load():
        pytest.skip(native.load().reason)
    monkeypatch.setenv(native.CORE_VARIABLE, f"winograd{block}")
    x, u_in, core, u_out, bias = Case(
        0, 1, (2, 5, 4, 3), (5, 23, 24), (3, 3, 3), (1,) * 3, (1,) * 3, (1,) * 3, True, "contiguous"
    ).tensors(torch.float32)
    x[0, 1, 2, 11, 12] = float("nan")
    out = tucker_ops.tucker_conv(x, u_in, core, u_out, bias, 1, 1, backend="cpu")
    lost = out.isnan().any(1)[0].nonzero()
    assert (lost.amin(0) >= torch.tensor([1, 11 - block, 12 - block])).all()
    assert (lost.amax(0) <= torch.tensor([3, 11 + block, 12 + block])).all()
    assert out[:, :, 1:4, 10:13, 11:14].isnan().all()


def test_weights_in_any_layout():
    x, u_in, core, u_out, bias = SMALL.tensors(torch.float32)
    plain = tucker_ops.tucker_conv(x, u_in, core, u_out, bias)
    strided = tucker_ops.tucker_conv(
        x,
        u_in.t().contiguous().t(),
        core.to(memory_format=torch.channels_last_3d),
        u_out.t().contiguous().t(),
        torch.stack((bias, bias), 1)[:, 0],
    )
    torch.testing.assert_close(strided, plain)


@pytest.mark.parametrize("size", [(17, 19, 23), (19, 150)], ids=["volume", "slice"])
def test_results_do_not_depend_on_the_number_of_threads(isa, core, size):
    """Threads share a slice by tiles, so their number decides on the tiles."""
    ones = (1,) * len(size)
    case = Case(3, 1, (8, 40, 40, 8), size, (3,) * len(size), ones, ones, ones, True, "contiguous")
    tensors = case.tensors(torch.float32)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 3, 16):
            torch.set_num_threads(threads)
            results.append(tucker_ops.tucker_conv(*tensors, *case.geometry, backend="cpu"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_tiles_in_height_and_width(isa, core):
    """A plane of 160 channels in float32 of this extent is 20 MB: more than any tile, so seams are inside."""
    case = Case(
        5, 1, (8, 160, 16, 8), (3, 60, 500), (3, 3, 3), (1,) * 3, (1,) * 3, (1,) * 3, True, "contiguous"
    )
    check(case, torch.float32, "cpu")


@pytest.mark.parametrize("dilation", [4, 12, 18])
def test_wide_dilation(isa, dilation):
    case = Case(
        6, 1, (24, 16, 16, 9), (32, 37), (3, 3), (1, 1), (dilation,) * 2, (dilation,) * 2, True, "contiguous"
    )
    check(case, torch.float32, "cpu")


def test_forward_mode_derivative():
    tensors = SMALL.tensors(torch.float64)
    tangents = [torch.randn_like(t) for t in tensors]

    def call(*args):
        return tucker_ops.tucker_conv(*args, *SMALL.geometry)

    _, actual = torch.func.jvp(call, tuple(tensors), tuple(tangents))
    step = 1e-6
    moved = [[t + sign * step * d for t, d in zip(tensors, tangents, strict=True)] for sign in (1, -1)]
    torch.testing.assert_close(actual, (call(*moved[0]) - call(*moved[1])) / (2 * step), rtol=1e-5, atol=1e-6)
