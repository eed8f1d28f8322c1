"""Decomposition, truncation errors and rank policies."""

from __future__ import annotations

import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch

from tucker_ops.decompose import Weighting, decompose, spectrum
from tucker_ops.decompose.ranks import Options, allocate, energy_rank, factor_rank, rank_grid
from tucker_ops.errors import ConfigError, ConversionError, DtypeError, RankError, ShapeError


def decaying(*shape: int, power: float = 1.0) -> torch.Tensor:
    """A kernel whose channel modes have falling singular values, as trained ones do."""
    weight = torch.randn(shape, dtype=torch.float64)
    for mode in (0, 1):
        q, _ = torch.linalg.qr(torch.randn(shape[mode], shape[mode], dtype=torch.float64))
        scales = torch.arange(1, shape[mode] + 1).double() ** -power
        weight = torch.tensordot(q * scales, weight.movedim(mode, 0), 1).movedim(0, mode)
    return weight


def relative(a, b):
    return float(torch.linalg.vector_norm(a.double() - b.double()) / torch.linalg.vector_norm(b.double()))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kernel", [(3, 3, 3), (1, 3), (3, 1, 1), (1, 1), (2, 2, 2), (5, 5)])
def test_shapes_and_reported_error(kernel, transposed):
    weight = decaying(20, 12, *kernel).float()
    channels_in, channels_out = (20, 12) if transposed else (12, 20)
    factors = decompose(weight, (6, 7), transposed=transposed)
    assert factors.ranks == (6, 7)
    assert factors.u_in.shape == (6, channels_in)
    assert factors.u_out.shape == (channels_out, 7)
    assert factors.core.shape == ((6, 7) if transposed else (7, 6)) + kernel
    assert factors.dense().shape == weight.shape
    assert factors.relative_error == pytest.approx(relative(factors.dense(), weight), rel=1e-9)
    assert torch.allclose(factors.u_in @ factors.u_in.T, torch.eye(6), atol=1e-6)


def test_formula_is_three_convolutions():
    weight = decaying(10, 8, 3, 3).float()
    factors = decompose(weight, (4, 5))
    x = torch.randn(2, 8, 9, 9)
    y = torch.nn.functional.conv2d(x, factors.u_in[:, :, None, None])
    y = torch.nn.functional.conv2d(y, factors.core, padding=1)
    y = torch.nn.functional.conv2d(y, factors.u_out[:, :, None, None])
    expected = torch.nn.functional.conv2d(x, factors.dense().float(), padding=1)
    assert relative(y, expected) < 1e-5


def test_agrees_with_plain_tensorly():
    from tensorly.decomposition import partial_tucker

    weight = decaying(24, 16, 3, 3, 3)
    (core, (u_out, u_in)), _ = partial_tucker(weight.numpy(), (7, 5), modes=[0, 1], tol=1e-10)
    expected = np.einsum("or,rsxyz,is->oixyz", u_out, core, u_in)
    factors = decompose(weight, (5, 7), tol=1e-10)
    assert relative(factors.dense(), torch.from_numpy(expected)) < 1e-4


def test_recovers_a_kernel_of_low_rank():
    low = decompose(decaying(16, 12, 3, 3), (3, 4)).dense()
    assert decompose(low, (3, 4)).relative_error < 1e-12


@pytest.mark.parametrize("shape", [(12, 8, 3, 3, 3), (9, 17, 1, 1), (40, 6, 2, 2)])
@pytest.mark.parametrize("transposed", [False, True])
def test_full_rank_is_exact(shape, transposed):
    weight = torch.randn(shape)
    ranks = shape[:2] if transposed else shape[1::-1]
    factors = decompose(weight, ranks, transposed=transposed)
    assert factors.relative_error < 1e-6


@pytest.mark.parametrize(
    "dtype, limit", [(torch.float16, 2e-3), (torch.bfloat16, 1.5e-2), (torch.float64, 1e-12)]
)
def test_keeps_the_dtype_and_counts_its_rounding(dtype, limit):
    weight = torch.randn(16, 12, 3, 3).to(dtype)
    factors = decompose(weight, (12, 16))
    assert {factors.u_in.dtype, factors.core.dtype, factors.u_out.dtype} == {dtype}
    assert factors.relative_error < limit
    assert factors.relative_error == pytest.approx(relative(factors.dense(), weight), rel=1e-6)


@pytest.mark.parametrize("scale", [1e-170, 1e-30, 1e30, 1e170])
def test_extreme_scales(scale):
    weight = decaying(12, 10, 3, 3)
    factors = decompose(weight * scale, (5, 6))
    assert factors.relative_error == pytest.approx(decompose(weight, (5, 6)).relative_error, rel=1e-6)
    assert spectrum(weight * scale).relative_error((5, 6)) == pytest.approx(
        spectrum(weight).relative_error((5, 6)), rel=1e-6
    )


def test_hooi_improves_on_the_truncated_hosvd():
    weight = torch.randn(24, 24, 3, 3, dtype=torch.float64)
    assert decompose(weight, (6, 6)).relative_error < spectrum(weight).relative_error((6, 6))


@pytest.mark.parametrize("transposed", [False, True])
def test_zero_kernel(transposed):
    factors = decompose(torch.zeros(6, 8, 3, 3), (4, 4), transposed=transposed)
    assert factors.relative_error == 0
    assert not factors.dense().any()
    assert spectrum(torch.zeros(6, 8, 3, 3), transposed=transposed).relative_error((4, 4)) == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_kernel_is_refused(bad):
    weight = torch.randn(6, 8, 3, 3)
    weight[1, 2, 0, 0] = bad
    for function in (lambda: decompose(weight, (4, 4)), lambda: spectrum(weight)):
        with pytest.raises(ConversionError, match="1 NaN or infinite"):
            function()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kernel", [(3, 3, 3), (1, 3), (2, 2, 2), (1, 1)])
def test_a_rank_of_the_taps(kernel, transposed):
    weight = decaying(20, 12, *kernel).float()
    taps = int(np.prod(kernel))
    rank = (taps + 1) // 2
    factors = decompose(weight, (6, 7, rank), transposed=transposed)
    assert factors.ranks == (6, 7, rank)
    assert factors.core.shape == ((6, 7) if transposed else (7, 6)) + (rank,)
    assert factors.u_taps.shape == (rank, taps) and factors.u_taps.is_contiguous()
    assert torch.allclose(factors.u_taps @ factors.u_taps.T, torch.eye(rank), atol=1e-6)
    assert factors.dense().shape == weight.shape
    assert factors.relative_error == pytest.approx(relative(factors.dense(), weight), rel=1e-9)
    bound = spectrum(weight, transposed=transposed).relative_error((6, 7, rank))
    assert factors.relative_error <= bound + 1e-6
    everything = (20, 12) if transposed else (12, 20)
    assert decompose(weight, (*everything, taps), transposed=transposed).relative_error < 1e-6
    zero = decompose(torch.zeros_like(weight), (6, 7, rank), transposed=transposed)
    assert zero.ranks == (6, 7, rank) and not zero.dense().any() and zero.relative_error == 0


def test_taps_of_low_rank_are_recovered_and_agree_with_plain_tensorly():
    from tensorly.decomposition import partial_tucker

    weight = decaying(24, 16, 3, 3, 3)
    low = decompose(weight, (5, 7, 4)).dense()
    assert decompose(low, (5, 7, 4)).relative_error < 1e-12
    flat = weight.flatten(2).numpy()
    (core, factors), _ = partial_tucker(flat, (7, 5, 4), modes=[0, 1, 2], tol=1e-10)
    expected = np.einsum("rst,or,is,kt->oik", core, *factors).reshape(weight.shape)
    found = decompose(weight, (5, 7, 4), tol=1e-10).dense()
    assert relative(found, torch.from_numpy(expected)) < 1e-4


def test_a_weighted_rank_of_the_taps_is_nearer_in_that_metric():
    weight = decaying(12, 10, 3, 3)
    roots = [torch.randn(n, n, dtype=torch.float64) for n in (10, 12, 9)]
    parts = [root @ root.T for root in roots]
    weighting = Weighting(*(part / part.trace() for part in parts), energy=1.0)
    weighted = weighting.roots().weighted
    exact = weighted(weight.flatten(2))
    ranks = (4, 5, 3)
    aware, plain = (decompose(weight, ranks, weighting=used) for used in (weighting, None))
    errors = [relative(weighted(found.dense().flatten(2)), exact) for found in (aware, plain)]
    assert errors[0] < 0.9 * errors[1], errors
    assert errors[0] <= spectrum(weight, weighting=weighting).relative_error(ranks) + 1e-9
    assert torch.allclose(aware.u_taps @ aware.u_taps.T, torch.eye(3, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("ranks", [(4, 4, 0), (4, 4, 10), (4, 4, 2.5), (4, 4, 2, 2), (4, 4, "a")])
def test_ranks_of_the_taps_out_of_range(ranks):
    with pytest.raises(RankError, match="R_taps, between 1 and the 9 taps"):
        decompose(torch.randn(6, 8, 3, 3), ranks)


@pytest.mark.parametrize("ranks", [(0, 4), (9, 4), (4, 7), (4,), 4, (4, 2.5), ("a", 2), None])
def test_ranks_out_of_range(ranks):
    with pytest.raises(RankError, match=r"\(8, 6\)"):
        decompose(torch.randn(6, 8, 3, 3), ranks)


def test_other_bad_arguments():
    with pytest.raises(DtypeError, match="int64"):
        decompose(torch.ones(4, 4, 3, 3, dtype=torch.int64), (2, 2))
    with pytest.raises(ShapeError):
        decompose(torch.randn(4), (2, 2))
    with pytest.raises(ConversionError, match="meta"):
        decompose(torch.empty(4, 4, 3, 3, device="meta"), (2, 2))
    with pytest.raises(ConfigError):
        decompose(torch.randn(4, 4, 3, 3), (2, 2), n_iter_max=0)


@pytest.mark.parametrize("transposed", [False, True])
def test_spectrum_is_the_error_of_the_truncated_hosvd(transposed):
    weight = decaying(9, 7, 3, 2)
    kernel = weight.transpose(0, 1) if transposed else weight
    u_out = torch.linalg.svd(kernel.flatten(1)).U
    u_in = torch.linalg.svd(kernel.transpose(0, 1).flatten(1)).U
    found = spectrum(weight, transposed=transposed)
    squared = found.squared_errors()
    taps = kernel.flatten(2)
    u_taps = torch.linalg.svd(taps.flatten(0, 1).T).U
    assert squared.shape == (kernel.shape[1], kernel.shape[0], 6)
    for ranks in itertools.product((1, 3, kernel.shape[1]), (1, 4, kernel.shape[0]), (1, 4, 6)):
        p_in, p_out, p_taps = (
            u[:, :rank] @ u[:, :rank].T for u, rank in zip((u_in, u_out, u_taps), ranks, strict=True)
        )
        expected = relative(torch.einsum("op,pik,ij,kl->ojl", p_out, taps, p_in, p_taps), taps)
        assert found.relative_error(ranks) == pytest.approx(expected, abs=1e-7)
        assert float(squared[tuple(r - 1 for r in ranks)]) == pytest.approx(expected**2, abs=1e-12)
    assert found.relative_error((3, 4)) == found.relative_error((3, 4, 6))
    channels = found.without_taps()
    assert channels.relative_error((3, 4)) == pytest.approx(found.relative_error((3, 4)), rel=1e-12)
    assert torch.allclose(channels.squared_errors()[..., 0], squared[..., -1])
    assert all(map(torch.allclose, channels.share_kept(), found.share_kept()))
    with pytest.raises(RankError, match="summed"):
        channels.relative_error((3, 4, 6))


def test_share_kept_is_that_of_the_singular_values():
    weight = decaying(9, 7, 3, 3)
    kept_in, kept_out = spectrum(weight).share_kept()
    for kept, mode in ((kept_out, weight), (kept_in, weight.transpose(0, 1))):
        energy = torch.linalg.svdvals(mode.flatten(1)).square()
        assert torch.allclose(kept, energy.cumsum(0) / energy.sum())


def test_leaves_the_backend_of_tensorly_alone():
    import tensorly

    before = tensorly.get_backend()
    tensorly.set_backend("pytorch")
    try:
        decompose(torch.randn(6, 8, 3, 3), (4, 4))
        assert tensorly.get_backend() == "pytorch"
    finally:
        tensorly.set_backend(before)


def test_import_needs_no_tensorly():
    code = (
        "import sys, tucker_ops.decompose, tucker_ops.convert\n"
        "found = {'tensorly', 'rich', 'matplotlib', 'nnunetv2'} & set(sys.modules)\n"
        "assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "channels, factor, expected",
    [
        (32, 0.5, 16),
        (40, 0.5, 24),  # 20 lies between 16 and 24: up
        (40, 0.3, 16),  # 12, a tie that binary arithmetic must not lose
        (320, 0.3, 96),
        (64, 0.3, 16),  # 19.2
        (64, 0.32, 24),  # 20.48
        (32, 0.1, 8),
        (5, 0.5, 5),
        (33, 1.0, 32),
        (36, 1.0, 36),  # 40, clamped
    ],
)
def test_factor_rule(channels, factor, expected):
    assert factor_rank(channels, factor, min_rank=8, align=8, rounding="nearest") == expected


@pytest.mark.parametrize(
    "channels, factor, expected",
    [(32, 0.7, 23), (30, 0.7, 21), (320, 0.1, 32), (64, 0.1, 8), (25, 0.5, 13), (1, 0.9, 1)],
)
def test_published_rule(channels, factor, expected):
    assert factor_rank(channels, factor, min_rank=8, align=1, rounding="ceil") == expected


def test_energy_rule_takes_the_least_aligned_rank():
    kept = torch.tensor([0.5, 0.7, 0.8, 0.9, 0.95, 1.0], dtype=torch.float64)
    assert [energy_rank(kept, share, min_rank=1, align=1) for share in (0.5, 0.51, 0.9, 1.0)] == [1, 2, 4, 6]
    assert energy_rank(kept, 0.6, min_rank=1, align=4) == 4
    assert energy_rank(kept, 0.95, min_rank=1, align=4) == 6
    assert energy_rank(kept, 0.1, min_rank=3, align=1) == 3


def test_rank_grid():
    assert rank_grid(33, min_rank=8, align=8) == [8, 16, 24, 32, 33]
    assert rank_grid(20, min_rank=5, align=8) == [5, 8, 16, 20]
    assert rank_grid(4, min_rank=8, align=8) == [4]


def random_options(rng, n):
    cost = np.sort(rng.integers(1, 60, n)).astype(float)
    return Options(cost, np.sort(rng.random(n))[::-1] * rng.random())


@pytest.mark.parametrize("seed", range(20))
def test_allocation_fits_and_is_close_to_the_best(seed):
    rng = np.random.default_rng(seed)
    layers = [random_options(rng, 6) for _ in range(4)]
    floor = sum(layer.cost.min() for layer in layers)
    ceiling = sum(layer.cost.max() for layer in layers)
    budget = float(floor + rng.random() * (ceiling - floor))
    chosen = allocate(layers, budget)

    def total(indices, what):
        return sum(getattr(layer, what)[i] for layer, i in zip(layers, indices, strict=True))

    assert total(chosen, "cost") <= budget
    best = min(
        total(indices, "error")
        for indices in itertools.product(range(6), repeat=4)
        if total(indices, "cost") <= budget
    )
    # Greedy on the hull misses the best by at most what one step saves.
    widest = max(layer.error.max() for layer in layers)
    assert best <= total(chosen, "error") <= best + widest


def test_allocation_with_nothing_to_spend_and_with_everything():
    layers = [Options(np.array([1.0, 3.0]), np.array([0.5, 0.0])) for _ in range(3)]
    assert allocate(layers, 2.9) is None
    assert allocate(layers, 3) == [0, 0, 0]
    assert allocate(layers, 9) == [1, 1, 1]
    assert sum(allocate(layers, 6)) == 1
