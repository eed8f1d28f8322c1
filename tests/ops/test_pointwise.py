"""The CPU's kernels of the gradient, op by op: products at every voxel, their gradient, and the core's weights."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional as F

from tests.ops.problems import relative_rms
from tucker_ops.backends import native
from tucker_ops.backends.cpu_derivative import _readable
from tucker_ops.ops.reference import memory_format

OPS = torch.ops.tucker_ops
# As of the op (tests/ops/problems.py) and its gradient (test_gradient.py).
LIMITS = {torch.float32: 5e-5, torch.bfloat16: 1e-2}
LAYOUTS = (torch.contiguous_format, torch.channels_last_3d)
# Channels in and out, extents: below, at and above the lanes of every vector; one voxel; none; more than a block.
SIZES = (
    (1, 1, (1, 1, 1)),
    (3, 5, (2, 3, 7)),
    (16, 8, (4, 5, 6)),
    (17, 33, (3, 3, 5)),
    (32, 3, (11, 12, 13)),
    (320, 40, (1, 2, 3)),
    (4, 6, (0, 2, 3)),
)


@pytest.fixture(autouse=True)
def compiled():
    if not native.load():
        pytest.skip(native.load().reason)


def normal(*size: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def core_call(grad: torch.Tensor, t: torch.Tensor) -> tuple:
    """Arguments of the core's weights: kernel 3×3×3 within its padding."""
    last = torch.channels_last_3d
    return grad.contiguous(memory_format=last), t.contiguous(memory_format=last), [3] * 3, *([[1] * 3] * 3)


@pytest.mark.parametrize("dtype", list(LIMITS), ids=["fp32", "bf16"])
def test_pointwise_matches_float64(isa, dtype, poisoned):
    for (channels, rows, size), layout, batch in itertools.product(SIZES, LAYOUTS, (1, 2, 0)):
        x = normal(batch, channels, *size, seed=1, dtype=dtype).contiguous(memory_format=layout)
        matrix, bias = normal(rows, channels, seed=2, dtype=dtype), normal(rows, seed=3, dtype=dtype)
        for given in (None, bias):
            found = OPS._pointwise_cpu(x, matrix, given)
            exact = torch.einsum("ac,nc...->na...", matrix.double(), x.double())
            exact = exact if given is None else exact + given.double()[:, None, None, None]
            assert found.dtype == dtype and found.shape == exact.shape
            assert found.numel() == 0 or found.is_contiguous(memory_format=torch.channels_last_3d)
            assert relative_rms(found, exact) <= LIMITS[dtype], (channels, rows, size, layout)


@pytest.mark.parametrize("dtype", list(LIMITS), ids=["fp32", "bf16"])
def test_pointwise_gradient_matches_float64(isa, dtype, poisoned):
    cases = itertools.product(SIZES, LAYOUTS, LAYOUTS, (1, 2, 0))
    for i, ((channels, rows, size), of_x, of_grad, batch) in enumerate(cases):
        x = normal(batch, channels, *size, seed=1, dtype=dtype).contiguous(memory_format=of_x)
        grad = normal(batch, rows, *size, seed=2, dtype=dtype).contiguous(memory_format=of_grad)
        matrix = normal(rows, channels, seed=3, dtype=dtype)
        exact = (
            torch.einsum("ac,na...->nc...", matrix.double(), grad.double()),
            torch.einsum("nadhw,ncdhw->ac", grad.double(), x.double()),
            grad.double().sum((0, 2, 3, 4)),
        )
        needed = [bool(i >> bit & 1) for bit in range(3)] if i % 2 else [True] * 3
        found = OPS._pointwise_gradient_cpu(grad, x, matrix, *needed)
        for value, wanted, need in zip(found, exact, needed, strict=True):
            assert value.dtype == dtype
            if not need:
                assert value.numel() == 0
                continue
            assert value.shape == wanted.shape
            assert relative_rms(value, wanted) <= LIMITS[dtype], (channels, rows, size, of_x, of_grad)
        if needed[0] and x.numel():
            assert found[0].is_contiguous(memory_format=memory_format(x))


@pytest.mark.parametrize("dtype", list(LIMITS), ids=["fp32", "bf16"])
def test_parts_of_channels_last_tensors_are_read_where_they_lie(isa, dtype, poisoned):
    """What the gradient of a concatenation hands down; NaN beside it is not read."""
    last = torch.channels_last_3d
    for channels, rows, before, after, batch in (
        (16, 32, 16, 0, 2),
        (5, 7, 0, 11, 1),
        (1, 3, 2, 2, 2),
        (33, 1, 7, 8, 2),
    ):
        size = (3, 4, 5)
        x, grad = (
            normal(batch, channels, *size, seed=1, dtype=dtype),
            normal(batch, rows, *size, seed=2, dtype=dtype),
        )
        matrix = normal(rows, channels, seed=3, dtype=dtype)
        parts = []
        for values in (x, grad):
            nan = [torch.full((batch, n, *size), torch.nan, dtype=dtype) for n in (before, after)]
            whole = torch.cat([nan[0], values, nan[1]], 1).contiguous(memory_format=last)
            parts.append(whole[:, before : before + values.shape[1]])
            assert _readable(parts[-1]) is parts[-1] and not parts[-1].is_contiguous(memory_format=last)
        found = OPS._pointwise_gradient_cpu(parts[1], parts[0], matrix, True, True, True)
        wanted = OPS._pointwise_gradient_cpu(grad.contiguous(memory_format=last), x, matrix, True, True, True)
        for ours, same in zip(found, wanted, strict=True):
            assert relative_rms(ours, same.double()) <= LIMITS[dtype]
        assert found[0].is_contiguous(memory_format=last)
        out = OPS._pointwise_cpu(parts[0], matrix, None)
        assert relative_rms(out, OPS._pointwise_cpu(x, matrix, None).double()) <= LIMITS[dtype]


def test_anything_else_is_copied_before_it_is_read():
    last = torch.channels_last_3d
    whole = normal(2, 8, 3, 4, 5, seed=1, dtype=torch.float32).contiguous(memory_format=last)
    for x in (
        whole[:, ::2],
        whole[..., ::2],
        whole[:, :, 1:],
        whole[:, :1].expand(2, 8, 3, 4, 5),
        whole.mT,
        whole.flip(0),
    ):
        given = _readable(x)
        OPS._pointwise_cpu(given, torch.eye(x.shape[1]), None)
        assert torch.equal(given, x)
    contiguous = whole.contiguous()
    assert _readable(contiguous) is contiguous and _readable(whole) is whole
    # One channel of several: evenly spaced within an item, but not from one item to the next.
    single = contiguous[:, 3:4]
    assert torch.equal(OPS._pointwise_cpu(_readable(single), torch.eye(1), None), single)


def test_core_weights_match_float64(isa, poisoned):
    problems = (
        # Ranks in and out, extents, kernel, stride, padding, dilation.
        (16, 16, (5, 6, 9), (3, 3, 3), (1, 1, 1), (1, 1, 1), (1, 1, 1)),
        (3, 20, (4, 5, 6), (3, 1, 3), (2, 1, 2), (1, 0, 1), (1, 1, 1)),
        (24, 7, (6, 6, 8), (2, 3, 3), (1, 2, 3), (0, 2, 2), (1, 2, 2)),
        # The kernel reaches further than the input, where oneDNN's own fails with AVX-512.
        (8, 8, (3, 3, 3), (5, 5, 5), (1, 1, 1), (2, 2, 2), (1, 1, 1)),
        (8, 8, (5, 5, 5), (7, 7, 7), (2, 2, 2), (3, 3, 3), (1, 1, 1)),
        (5, 6, (4, 4, 4), (1, 1, 1), (2, 2, 2), (0, 0, 0), (1, 1, 1)),
        (5, 6, (1, 1, 1), (3, 3, 3), (1, 1, 1), (4, 4, 4), (1, 1, 1)),
    )
    last = torch.channels_last_3d
    for rank_in, rank_out, size, kernel, *geometry in problems:
        t = normal(2, rank_in, *size, seed=1, dtype=torch.float32).contiguous(memory_format=last)
        core = torch.zeros(rank_out, rank_in, *kernel, dtype=torch.float64, requires_grad=True)
        out = F.conv3d(t.double(), core, None, *geometry)
        grad = normal(*out.shape, seed=2, dtype=torch.float32).contiguous(memory_format=last)
        (exact,) = torch.autograd.grad(out, core, grad.double())
        found = OPS._core_gradient_cpu(grad, t, list(kernel), *(list(g) for g in geometry))
        assert found.shape == exact.shape
        assert relative_rms(found, exact) <= LIMITS[torch.float32], (rank_in, rank_out, size, kernel)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_sums_do_not_depend_on_the_number_of_threads(threads):
    x, grad = (
        normal(2, 20, 9, 10, 11, seed=1, dtype=torch.float32),
        normal(2, 6, 9, 10, 11, seed=2, dtype=torch.float32),
    )
    matrix = normal(6, 20, seed=3, dtype=torch.float32)
    before = torch.get_num_threads()
    results = []
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            results.append(
                (
                    *OPS._pointwise_gradient_cpu(grad, x, matrix, True, True, True),
                    OPS._core_gradient_cpu(*core_call(grad, x)),
                )
            )
    finally:
        torch.set_num_threads(before)
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_a_large_mean_does_not_spoil_sums():
    """Many voxels of one sign: sums of blocks are added up, not voxel after voxel."""
    x = 100 + normal(1, 8, 64, 64, 64, seed=1, dtype=torch.float32)
    grad = 100 + normal(1, 4, 64, 64, 64, seed=2, dtype=torch.float32)
    found = OPS._pointwise_gradient_cpu(grad, x, torch.ones(4, 8), False, True, True)
    exact = torch.einsum("nadhw,ncdhw->ac", grad.double(), x.double()), grad.double().sum((0, 2, 3, 4))
    assert relative_rms(found[1], exact[0]) <= 1e-6 and relative_rms(found[2], exact[1]) <= 1e-6


def test_opcheck():
    x, grad = (
        normal(1, 5, 3, 4, 5, seed=1, dtype=torch.float32),
        normal(1, 6, 3, 4, 5, seed=2, dtype=torch.float32),
    )
    matrix, bias = normal(6, 5, seed=3, dtype=torch.float32), normal(6, seed=4, dtype=torch.float32)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(OPS._pointwise_cpu.default, (x, matrix, bias), test_utils=tests)
    torch.library.opcheck(
        OPS._pointwise_gradient_cpu.default, (grad, x, matrix, True, True, True), test_utils=tests
    )
    torch.library.opcheck(OPS._core_gradient_cpu.default, core_call(grad, x), test_utils=tests)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x, m: (x[:, ::2], m), "contiguous or channels-last"),
        (lambda x, m: (x.double(), m), "float32 and bfloat16"),
        (lambda x, m: (x, m.T), "matrix"),
        (lambda x, m: (x, m[:, :-1].contiguous()), "matrix"),
        (lambda x, m: (x, m.bfloat16()), "matrix"),
        (lambda x, m: (x, m[0]), "matrix"),
    ],
    ids=["sliced", "double", "transposed", "narrow", "dtype", "vector"],
)
def test_callers_that_reach_past_the_checks_are_told(change, words):
    x, matrix = normal(1, 4, 3, 4, 5, seed=1, dtype=torch.float32), normal(6, 4, seed=2, dtype=torch.float32)
    with pytest.raises(RuntimeError, match=words):
        OPS._pointwise_cpu(*change(x, matrix), None)
