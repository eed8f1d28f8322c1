"""`tucker_block` against float64: sources, pending norms, statistics, every instruction set."""

from __future__ import annotations

import math
import random

import pytest
import torch

import tucker_ops  # noqa: F401
from tests.ops.problems import relative_rms, tolerance
from tucker_ops.errors import DtypeError, ShapeError, TuckerOpsError
from tucker_ops.ops.reference import block
from tucker_ops.types import conv_output_size

block_op = torch.ops.tucker_ops.tucker_block


def random_call(seed: int, dtype: torch.dtype = torch.float64) -> dict:
    """Arguments of one valid call: up to three sources, some at a fraction of the extents, some with a norm pending."""
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=generator)

    while True:
        ndim = rng.choice([2, 3, 3])
        factors = [rng.choice([1, 2, 2, 3]) for _ in range(ndim)]
        size = [f * rng.choice([1, 2, 3, 5, 7]) for f in factors]
        kernel = rng.choice(
            [(3,) * ndim, (3,) * ndim, (1,) * ndim, (1,) + (3,) * (ndim - 1), (3, 5, 1)[:ndim]]
        )
        stride = rng.choice([(1,) * ndim, (1,) * ndim, (2,) * ndim, (1,) + (2,) * (ndim - 1)])
        padding = tuple(rng.choice([0, k // 2, k // 2, 2]) for k in kernel)
        dilation = tuple(rng.choice([1, 1, 1, 2]) for _ in kernel)
        if min(conv_output_size(tuple(size), kernel, stride, padding, dilation)) >= 1:
            break
    batch = rng.choice([1, 1, 2, 0])
    rank_in, rank_out, out = (rng.choice([1, 3, 8, 9, 16, 17, 24, 40]) for _ in range(3))
    reduced = rng.random() < 0.8
    sources, expand, scale, shift, slope, reduce = [], [], [], [], [], []
    count = rng.choice([1, 1, 2, 3]) if reduced else 1
    side_by_side = count > 1 and rng.random() < 0.5
    widths = [rng.choice([16, 32]) for _ in range(count - 1)] + [rng.choice([1, 8, 13, 16, 40])]
    rank_in = sum(widths) if side_by_side else rank_in
    for i in range(count):
        channels = rng.choice([1, 3, 8, 13, 16, 33, 40]) if reduced else rank_in
        as_it_is = not reduced or (side_by_side and rng.random() < 0.4)
        channels = widths[i] if as_it_is and side_by_side else channels
        coarse = not as_it_is and rng.random() < 0.6
        extents = [n // f for n, f in zip(size, factors, strict=True)] if coarse else size
        ranks = rng.choice([None, None, 1, 3, 8, 17])
        expand.append(None if ranks is None else normal(channels, ranks).to(dtype))
        x = normal(batch, ranks or channels, *extents).to(dtype)
        sources.append(
            x
            if rng.random() < 0.3
            else x.to(memory_format=(torch.channels_last, torch.channels_last_3d)[ndim - 2])
        )
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        scale.append(normal(batch, channels).to(wide) if rng.random() < 0.6 else None)
        shift.append(normal(batch, channels).to(wide) if rng.random() < 0.6 else None)
        slope.append(rng.choice([1.0, 0.01, 0.2]))
        positions = factors if coarse else ()
        rows = widths[i] if side_by_side else rank_in
        reduce.append(None if as_it_is else normal(*positions, rows, channels).to(dtype))
    u_out = normal(out, rank_out).to(dtype) if rng.random() < 0.7 else None
    return {
        "sources": sources,
        "expand": expand,
        "scale": scale,
        "shift": shift,
        "slope": slope,
        "reduce": reduce,
        "in_bias": normal(rank_in).to(dtype) if rng.random() < 0.5 else None,
        "core": normal(rank_out, rank_in, *kernel).to(dtype),
        "stride": list(stride),
        "padding": list(padding),
        "dilation": list(dilation),
        "u_out": u_out,
        "bias": normal(rank_out if u_out is None else out).to(dtype) if rng.random() < 0.5 else None,
        "stats": rng.choice(["none", "channel", "channel" if u_out is not None else "covariance"]),
    }


def in_float64(call: dict) -> dict:
    def wide(value):
        if isinstance(value, torch.Tensor):
            return value.double()
        return (
            [wide(v) for v in value] if isinstance(value, list) and not isinstance(value[0], int) else value
        )

    return {name: wide(value) for name, value in call.items()}


def close_statistics(actual, expected, count: int, dtype: torch.dtype) -> bool:
    """Mean and M2 as a norm needs them: errors relative to the standard deviation and to the variance.

    Values are off by a share of their own size, which averages out over `count` voxels; in bfloat16 intermediates are
    rounded, all voxels' alike.
    """
    (mean, m2), (true_mean, true_m2) = actual, expected
    share = max(1e-3, count**-0.5) if dtype == torch.float32 else 1
    products, true_products = m2, true_m2
    if m2.dim() == 3:
        m2, true_m2 = (m.diagonal(dim1=1, dim2=2) for m in (m2, true_m2))
    size = (true_mean.square() + true_m2 / count).mean().sqrt()
    sigma = (true_m2 / count).sqrt() + share * size
    limit, most = 4 * tolerance(dtype, 1000), true_m2 + count * sigma**2
    if products.dim() == 3:
        # Sums of products, relative to what their two channels could make of them at most.
        most = (most.unsqueeze(1) * most.unsqueeze(2)).sqrt()
        if not torch.equal(products, products.mT):
            return False
    return bool(
        ((mean - true_mean).abs() <= limit * sigma).all()
        and ((products - true_products).abs() <= limit * most).all()
    )


def check(
    call: dict, dtype: torch.dtype, contiguous: bool = False, wide: bool = False, backend: str | None = "cpu"
) -> None:
    values, mean, m2 = block_op(*call.values(), contiguous, wide, backend=backend)
    expected, true_mean, true_m2 = block(**in_float64(call))
    assert values.dtype == (torch.float32 if wide else dtype) and values.shape == expected.shape
    layout = torch.contiguous_format
    if not contiguous:
        layout = (torch.channels_last, torch.channels_last_3d)[values.dim() - 4]
    assert values.is_contiguous(memory_format=layout)
    assert relative_rms(values, expected) <= tolerance(dtype, expected.numel())
    assert mean.shape == true_mean.shape and m2.shape == true_m2.shape
    if expected.numel():
        assert close_statistics((mean, m2), (true_mean, true_m2), math.prod(expected.shape[2:]), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_cpu_blocks_match_float64(isa, dtype, poisoned):
    for seed in range(160):
        try:
            check(random_call(seed, dtype), dtype, contiguous=seed % 3 == 0, wide=seed % 4 == 0)
        except AssertionError as error:
            raise AssertionError(f"{isa} on seed {seed}: {error}") from error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_every_core_runs_blocks(isa, core, dtype, poisoned):
    for seed in range(40):
        try:
            check(random_call(seed, dtype), dtype)
        except AssertionError as error:
            raise AssertionError(f"{isa}, {core} on seed {seed}: {error}") from error


def test_reference_backend_runs_blocks():
    for seed in range(0, 160, 8):
        check(random_call(seed, torch.float32), torch.float32, backend="reference")


@pytest.mark.parametrize("stats", ["channel", "covariance"])
@pytest.mark.parametrize("ratio", [1, 30, 1000])
def test_statistics_survive_a_large_mean(isa, core, ratio, stats):
    """A channel of mean `ratio` standard deviations, one that is constant, and one of zeros."""
    noise = torch.randn(2, 3, 12, 40, 37, generator=torch.Generator().manual_seed(1))
    x = noise * torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1, 1) + torch.tensor([ratio, ratio, 0.0]).view(
        1, 3, 1, 1, 1
    )
    kernel = torch.zeros(3, 3, 3, 3, 3)
    for c in range(3):
        kernel[c, c, 1, 1, 1] = 1.0  # a copy, but through every stage
    call = [
        [x],
        [None],
        [None],
        [None],
        [1.0],
        [None],
        None,
        kernel,
        [1] * 3,
        [1] * 3,
        [1] * 3,
        None,
        None,
        stats,
    ]
    values, mean, m2 = block_op(*call, False, backend="cpu")
    if stats == "covariance":
        deviations = values.double().flatten(2)
        deviations -= deviations.mean(2, keepdim=True)
        products, sigma = deviations @ deviations.mT, deviations.square().sum(2).sqrt()
        limit = 1e-4 * sigma.unsqueeze(1) * sigma.unsqueeze(2) + 1e-12 * ratio**2 * deviations.shape[2]
        assert ((m2 - products).abs() <= limit).all()
        m2 = m2.diagonal(dim1=1, dim2=2)
    flat = values.double().flatten(2)
    assert ((mean - flat.mean(2)).abs() <= 1e-4 * flat.std(2) + 1e-6 * ratio).all()
    variance, expected = m2 / flat.shape[2], flat.var(2, correction=0)
    assert ((variance - expected).abs() <= 1e-4 * expected + 1e-12 * ratio**2).all()


def test_statistics_depend_on_threads_by_rounding_alone(core):
    """Their number decides on the tiles over which sums are merged; for one number every call gives the same bits."""
    # Enough arithmetic that threads share it out.
    x, ones = torch.randn(1, 24, 17, 40, 37), [1] * 3
    call = [[x], [None], [None], [None], [0.01], [torch.randn(16, 24)], None, torch.randn(24, 16, 3, 3, 3)]
    call += [ones, ones, ones, torch.randn(40, 24), None, "channel", False]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 3, 16):
            torch.set_num_threads(threads)
            first, again = (block_op(*call, backend="cpu") for _ in range(2))
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
            results.append(first)
    finally:
        torch.set_num_threads(before)
    values, mean, m2 = results[0]
    sigma = (m2 / values[0, 0].numel()).sqrt()
    for other, other_mean, other_m2 in results[1:]:
        assert torch.equal(other, values)
        assert ((other_mean - mean).abs() <= 1e-6 * sigma).all()
        assert ((other_m2 - m2).abs() <= 1e-6 * m2).all()


def test_a_pending_norm_lets_nan_through():
    x = torch.randn(1, 4, 3, 5, 6)
    x[0, 2, 1, 2, 3] = float("nan")
    reduce, core = torch.randn(2, 4), torch.randn(2, 2, 1, 1, 1)
    call = [
        [x],
        [None],
        [torch.ones(1, 4)],
        [torch.zeros(1, 4)],
        [0.01],
        [reduce],
        None,
        core,
        [1] * 3,
        [0] * 3,
        [1] * 3,
    ]
    values, _, m2 = block_op(*call, None, None, "channel", False)
    assert values.isnan().sum() == 2 and values[0, :, 1, 2, 3].isnan().all()
    assert m2.isnan().all()


def test_zero_padding_comes_after_the_activation():
    """A shift of 5 would leak into the border if zeros were padded before it."""
    x = torch.zeros(1, 1, 3, 3, 3)
    core = torch.ones(1, 1, 3, 3, 3)
    shift = torch.full((1, 1), 5.0)
    values, _, _ = block_op(
        [x],
        [None],
        [None],
        [shift],
        [1.0],
        [None],
        None,
        core,
        [1] * 3,
        [1] * 3,
        [1] * 3,
        None,
        None,
        "none",
        True,
    )
    assert values[0, 0, 1, 1, 1] == 27 * 5 and values[0, 0, 0, 0, 0] == 8 * 5


def test_opcheck():
    for seed in (3, 4, 5, 9):
        call = random_call(seed, torch.float32)
        torch.library.opcheck(
            block_op, (*call.values(), False), test_utils=("test_schema", "test_faketensor")
        )


def test_it_has_no_derivative_and_says_so():
    call = random_call(3, torch.float32)
    call["core"].requires_grad_()
    values, _, _ = block_op(*call.values(), False)
    with pytest.raises(TuckerOpsError, match="no derivative"):
        values.sum().backward()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"sources": []}, ShapeError, "at least one source"),
        ({"slope": []}, ShapeError, "slope has 0 entries"),
        ({"stats": "all"}, ShapeError, "stats must be one of"),
        ({"reduce": [torch.zeros(2, 3)]}, ShapeError, "reduce of source 0"),
        ({"reduce": [torch.zeros(8, 2, 4)]}, ShapeError, "with 3 factors"),
        (
            {name: [None] * 2 for name in ("expand", "scale", "shift")}
            | {"slope": [1.0] * 2, "sources": [torch.zeros(1, 4, 3, 3, 3)] * 2}
            | {"reduce": [torch.zeros(2, 4), torch.zeros(2, 1, 1, 2, 4)]},
            ShapeError,
            "must have the same extents",
        ),
        ({"reduce": [None]}, ShapeError, r"sources of \[4\] rows fit no core of 2 inputs"),
        (
            {name: [None] * 2 for name in ("expand", "scale", "shift")}
            | {"slope": [1.0] * 2, "sources": [torch.zeros(1, 4, 3, 3, 3)] * 2}
            | {"reduce": [torch.zeros(2, 4), torch.zeros(1, 4)]},
            ShapeError,
            r"rows fit no core",
        ),
        ({"scale": [torch.zeros(1, 3)]}, ShapeError, "scale of source 0"),
        ({"scale": [torch.zeros(1, 4).double()]}, DtypeError, "scale and shift"),
        ({"in_bias": torch.zeros(5)}, ShapeError, "in_bias"),
        ({"u_out": torch.zeros(5, 3)}, ShapeError, "u_out"),
        ({"core": torch.zeros(2, 2, 3, 3, 3).double()}, DtypeError, "one dtype"),
        ({"core": torch.zeros(2, 2, 9, 9, 9)}, ShapeError, "does not fit"),
    ],
)
def test_bad_arguments_are_named(change, error, words):
    call = {
        "sources": [torch.zeros(1, 4, 3, 3, 3)],
        "expand": [None],
        "scale": [None],
        "shift": [None],
        "slope": [1.0],
        "reduce": [torch.zeros(2, 4)],
        "in_bias": None,
        "core": torch.zeros(2, 2, 3, 3, 3),
        "stride": [1],
        "padding": [1],
        "dilation": [1],
        "u_out": None,
        "bias": None,
        "stats": "none",
    }
    with pytest.raises(error, match=words):
        block_op(*{**call, **change}.values(), False)
