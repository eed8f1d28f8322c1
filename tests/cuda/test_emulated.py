"""The CUDA kernels, thread by thread on an emulated multiprocessor, against float64.

These are the kernels that nvcc compiles, with the same index maps, fragments and barriers; only single instructions
(mma, ldmatrix, loads) are the host's. What a compiler for the GPU makes of them is asked in test_compiled.py.
"""

from __future__ import annotations

import copy
import ctypes
import itertools
import re

import pytest
import torch

import tucker_ops
from tests.fused.networks import plain_unet, residual_unet
from tests.ops.problems import Case, random_cases, reference, relative_rms, tolerance
from tests.ops.test_tucker_block import check, random_call
from tucker_ops.backends import cuda
from tucker_ops.fused import explain
from tucker_ops.ops.check import problem_of
from tucker_ops.ops.reference import merge
from tucker_ops.types import Problem

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
IDS = ["fp16", "bf16", "fp32"]
# Bits of fraction that TF32 keeps of a factor: 2^-11 each, a product of three.
TF32_TOLERANCE = 1e-3
T4 = cuda.Device(75, 40, 64 * 1024, 64 * 1024)
RTX3090 = cuda.Device(86, 82, 99 * 1024, 100 * 1024)


def error_of(case: Case, dtype: torch.dtype) -> tuple[float, int]:
    tensors = case.tensors(dtype)
    expected = reference(tensors, case.geometry)
    actual = tucker_ops.tucker_conv(*tensors, *case.geometry, backend="emulated")
    assert actual.shape == expected.shape and actual.dtype == dtype
    assert actual.is_contiguous() or case.layout == "channels_last"
    return relative_rms(actual, expected), expected.numel()


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
def test_random_problems_match_float64(emulated, dtype, poisoned):
    for case in random_cases(80):
        error, numel = error_of(case, dtype)
        assert error <= tolerance(dtype, numel), case


# Kernel, stride and extents of a few tiles with ragged edges.
GEOMETRIES = [
    ((3, 3, 3), (1, 1, 1), (4, 13, 37)),
    ((1, 3, 3), (1, 1, 1), (2, 13, 37)),
    ((3, 3, 3), (2, 2, 2), (5, 11, 67)),
    ((1, 3, 3), (1, 2, 2), (2, 11, 67)),
    ((3, 3), (1, 1), (17, 37)),
    ((3, 3), (2, 2), (19, 67)),
]
RANKS = [(8, 16), (16, 16), (32, 16), (16, 32), (32, 32), (9, 24)]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=lambda g: f"k{g[0]}s{g[1]}".replace(" ", ""))
@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
def test_every_form_of_the_one_pass_kernel(emulated, dtype, geometry, poisoned):
    kernel, stride, size = geometry
    padding = tuple(k // 2 for k in kernel)
    ran = 0
    for seed, (rank_in, rank_out) in enumerate(RANKS):
        channels = (40, rank_in, rank_out, 24)
        case = Case(
            seed,
            1,
            channels,
            size,
            kernel,
            stride,
            padding,
            (1,) * len(kernel),
            seed % 2 == 0,
            "channels_last",
        )
        forms = cuda.forms_of(problem_of(*case.tensors(dtype), *case.geometry), cuda.H200)
        for form, chunk in itertools.product(forms, (2, 64) if seed % 2 else (1,)):
            emulated([0, 1, form, chunk])
            error, numel = error_of(case, dtype)
            assert error <= tolerance(dtype, numel), (case, form, chunk)
            ran += 1
    assert ran >= (6 if dtype != torch.float32 else 0 if stride[-1] == 2 else 3)


@pytest.mark.parametrize("first", range(0, 160, 16))
@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
def test_random_blocks_match_float64(emulated, dtype, first, poisoned):
    for seed in range(first, first + 16):
        call = random_call(seed, dtype)
        try:
            check(call, dtype, contiguous=seed % 3 == 0, wide=seed % 4 == 0, backend="emulated")
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error


def test_sources_pending_norms_and_statistics_in_one_pass(emulated, poisoned):
    """What `fuse` asks of the one-pass kernel in a decoder: two sources, one at half the extents, both with a norm."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size):
        return torch.randn(size, generator=generator)

    for dtype, size, kernel, stride in [
        (torch.float16, (6, 14, 38), (3, 3, 3), 1),
        (torch.bfloat16, (2, 26, 34), (1, 3, 3), 1),
        (torch.float16, (4, 26, 34), (3, 3, 3), 2),
        (torch.bfloat16, (2, 26, 34), (1, 3, 3), 2),
    ]:
        factors = [2, 2, 2] if size[0] > 2 else [1, 2, 2]
        below = [n // f for n, f in zip(size, factors, strict=True)]
        layout = torch.channels_last_3d
        call = {
            "sources": [normal(2, 24, *below), normal(2, 16, *size)],
            "expand": [None, None],
            "scale": [normal(2, 24), normal(2, 16)],
            "shift": [normal(2, 24), None],
            "slope": [0.01, 0.2],
            "reduce": [normal(*factors, 16, 24).to(dtype), normal(16, 16).to(dtype)],
            "in_bias": normal(16).to(dtype),
            "core": normal(24, 16, *kernel).to(dtype),
            "stride": [stride if kernel[0] == 3 else 1, stride, stride],
            "padding": [k // 2 for k in kernel],
            "dilation": [1, 1, 1],
            "u_out": normal(40, 24).to(dtype),
            "bias": normal(40).to(dtype),
            "stats": "channel",
        }
        call["sources"] = [s.to(dtype).to(memory_format=layout) for s in call["sources"]]
        problem = Problem(
            batch=2, in_channels=40, rank_in=16, rank_out=24, out_channels=40, input_size=size, kernel_size=kernel,
            stride=tuple(call["stride"]), padding=tuple(call["padding"]), dilation=(1, 1, 1), dtype=dtype,
            device="cuda", layout="channels_last", bias=True,
        )  # fmt: skip
        forms = cuda.forms_of(problem, cuda.H200)
        assert forms
        for form in forms:
            emulated([0, 1, form, 2])
            check(call, dtype, backend="emulated")


@pytest.mark.parametrize("choice", [[0, 1], [0, 0]], ids=["one_pass", "stages"])
def test_statistics_hold_far_from_zero(emulated, choice):
    """|mean| / σ = 1000, where sums of squares in float32 would leave nothing of the variance."""
    x = torch.randn(1, 16, 5, 20, 40).contiguous(memory_format=torch.channels_last_3d)
    core, u_out = torch.randn(16, 16, 3, 3, 3) / 20, torch.randn(16, 16) / 4
    emulated(choice)
    call = (
        [x],
        [None],
        [None],
        [None],
        [1.0],
        [torch.randn(16, 16) / 4],
        None,
        core,
        [1] * 3,
        [1] * 3,
        [1] * 3,
        u_out,
    )
    bias = torch.full((16,), 300.0)
    values, mean, m2 = torch.ops.tucker_ops.tucker_block(*call, bias, "channel", backend="emulated")
    flat = values.double().flatten(2)
    assert (mean - flat.mean(2)).abs().max() < 1e-3 * flat.std(2).min()
    assert ((m2 / flat.shape[2]).sqrt() / flat.std(2, correction=0) - 1).abs().max() < 1e-3
    assert flat.mean(2).abs().min() > 200 * flat.std(2).max()


def cube(seed: int, channels: tuple[int, ...], size: tuple[int, ...]) -> Case:
    """A 3×3×3 convolution as most of nnU-Net's are."""
    return Case(seed, 1, channels, size, *[(3,) * 3, (1,) * 3, (1,) * 3, (1,) * 3], True, "channels_last")


@pytest.mark.parametrize("device", [T4, RTX3090], ids=["sm_75", "sm_86"])
def test_smaller_cards_take_what_fits_them(emulated, device):
    emulated([0], device)
    for rank, channels in [(16, 32), (32, 64), (64, 128)]:
        case = cube(rank, (channels, rank, rank, channels), (3, 13, 35))
        error, numel = error_of(case, torch.float16)
        assert error <= tolerance(torch.float16, numel)


def test_tf32_where_it_is_allowed(emulated):
    case = Case(
        3, 1, (32, 16, 16, 32), (4, 13, 35), (3,) * 3, (1,) * 3, (1,) * 3, (1,) * 3, True, "channels_last"
    )
    for choice in ([1, 1], [1, 0]):
        emulated(choice)
        error, _ = error_of(case, torch.float32)
        # Less exact than float32 proper, and by no more than its 10 bits.
        assert 2e-5 < error <= TF32_TOLERANCE


def test_results_do_not_depend_on_the_run(emulated):
    """Warps take turns in another random order every time; nothing is added up in the order they come."""
    call = random_call(3, torch.float16)
    first, second = (torch.ops.tucker_ops.tucker_block(*call.values(), backend="emulated") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_choice_that_cannot_run_is_refused(emulated):
    case = Case(
        0, 1, (32, 64, 64, 32), (4, 9, 9), (3,) * 3, (1,) * 3, (1,) * 3, (1,) * 3, True, "channels_last"
    )
    tensors = case.tensors(torch.float16)
    for choice, words in (([0, 1], "no form of the one-pass kernel"), ([0, 1, 99, 1], "no form")):
        emulated(choice)
        with pytest.raises(RuntimeError, match=words):
            tucker_ops.tucker_conv(*tensors, *case.geometry, backend="emulated")


def test_norms_from_statistics(emulated_library):
    mean, m2 = torch.randn(2, 5), torch.rand(2, 5) * 40
    m2[0, 0], m2[1, 1] = -1e-6, float("nan")
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        weight, bias = torch.randn(5).to(dtype), torch.randn(5).to(dtype)
        for w, b in ((weight, bias), (None, None), (weight, None)):
            ours = torch.ops.tucker_ops._norm_affine_cuda(mean, m2, w, b, 30, 1e-5)
            theirs = torch.ops.tucker_ops.norm_affine(mean, m2, w, b, 30, 1e-5)
            for a, expected in zip(ours, theirs, strict=True):
                torch.testing.assert_close(a, expected, rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("channels", [9, 16])
@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
def test_merges(emulated_library, dtype, channels):
    layout = torch.channels_last_3d
    values = [torch.randn(2, channels, 3, 4, 5).to(dtype).to(memory_format=layout) for _ in range(3)]
    norms = [torch.randn(2, channels) for _ in range(4)]
    scale, shift = [norms[0], None, norms[1]], [norms[2], norms[3], None]
    ours = torch.ops.tucker_ops._tucker_merge_cuda(values, scale, shift, [0.01, 1.0, 0.2], 0.1)
    expected = merge(
        [v.double() for v in values],
        *([None if t is None else t.double() for t in given] for given in (scale, shift)),
        [0.01, 1.0, 0.2],
        0.1,
    )
    assert relative_rms(ours, expected) <= tolerance(dtype, expected.numel())


FAULTS = [
    "",
    # Which warp goes first is drawn at random: these show in more ways than one.
    "a race|read before it was written",
    "a race",
    "read before it was written",
    r"shared memory: byte \d+ of 256",
    "writes outside every tensor",
    "not aligned",
    "have ended|this lane ended",
    "met at different functions",
    "some warps ended",
]


@pytest.mark.parametrize("which", range(len(FAULTS)))
def test_the_emulated_multiprocessor_finds_faults(emulated_library, which):
    text = ctypes.create_string_buffer(400)
    ctypes.CDLL(str(emulated_library)).tucker_emulated_fault(which, text, ctypes.c_int64(400))
    said = text.value.decode()
    assert re.search(FAULTS[which], said) if which else said == ""


def test_a_fused_network(emulated):
    """All blocks of a U-Net, each with what `fuse` folds into it, on the kernels of the GPU."""
    for build, dtype, limit in ((plain_unet, torch.float16, 5e-3), (residual_unet, torch.float32, 1e-5)):
        network = build(features=(16, 32, 64)).requires_grad_(False)
        network = tucker_ops.compress(network, tucker_ops.CompressionConfig(factor=0.5))
        x = torch.randn(1, 1, 8, 16, 32)
        with torch.no_grad():
            expected = copy.deepcopy(network).double()(x.double())
            fused = tucker_ops.fuse(copy.deepcopy(network).to(dtype))
            actual = fused(x.to(dtype))
        assert all(layer.fused for layer in explain(fused).layers)
        assert relative_rms(actual, expected) <= limit


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
def test_dense_convolutions_of_few_channels(emulated, dtype, poisoned):
    """A network's first layer: taps and channels are summed up together. Small and large maps take other forms."""
    for channels, size, kernel in [(1, (5, 6, 7), 3), (3, (9, 20, 33), 3), (2, (3, 4, 5), 5)]:
        call = {
            "sources": [torch.randn(2, channels, *size).to(dtype)],
            "expand": [None],
            "scale": [torch.randn(2, channels)],
            "shift": [torch.randn(2, channels)],
            "slope": [0.2],
            "reduce": [None],
            "in_bias": None,
            "core": torch.randn(33, channels, *[kernel] * 3).to(dtype),
            "stride": [1, 2, 1],
            "padding": [1, 1, 1],
            "dilation": [1, 1, 1],
            "u_out": None,
            "bias": torch.randn(33).to(dtype),
            "stats": "channel",
        }
        check(call, dtype, backend="emulated")


def test_opcheck_of_the_private_ops(emulated_library):
    """Schemas, fakes and what the kernels return agree, in both layouts of values."""
    call = random_call(3, torch.float32)
    layout = (torch.channels_last, torch.channels_last_3d)[call["core"].dim() - 4]
    call["sources"] = [s.contiguous(memory_format=layout) for s in call["sources"]]
    for contiguous in (False, True):
        arguments = (*call.values(), contiguous, False, cuda.H200.numbers, [0])
        torch.library.opcheck(torch.ops.tucker_ops._tucker_block_cuda.default, arguments)
    values = [torch.randn(1, 8, 3, 4, 5).contiguous(memory_format=torch.channels_last_3d) for _ in range(2)]
    torch.library.opcheck(
        torch.ops.tucker_ops._tucker_merge_cuda.default, (values, [None] * 2, [None] * 2, [0.1, 1.0], 0.01)
    )
    statistics = (torch.randn(1, 8), torch.rand(1, 8), torch.randn(8), None, 60, 1e-5)
    torch.library.opcheck(torch.ops.tucker_ops._norm_affine_cuda.default, statistics)
    torch.library.opcheck(torch.ops.tucker_ops.norm_affine.default, statistics)


def test_norms_of_any_size_are_one_graph():
    """A dynamic extent reaches the op as a symbol, not as the number it was traced with."""

    class Norm(torch.nn.Module):
        def forward(self, x):
            return torch.ops.tucker_ops.norm_affine(x.mean(2), x.var(2), None, None, x.shape[2], 1e-5)

    x = torch.randn(2, 3, 7)
    extent = torch.export.Dim("extent", min=2, max=100)
    exported = torch.export.export(Norm(), (x,), dynamic_shapes=({2: extent},)).module()
    y = torch.randn(2, 3, 50)
    torch.testing.assert_close(exported(y), Norm()(y))


def test_many_blocks_of_statistics_merge_in_two_levels(emulated, poisoned):
    """A large map of few channels leaves thousands of blocks."""
    x = torch.randn(1, 1, 40, 40, 40)
    core = torch.randn(8, 1, 1, 1, 1)
    none = [None]
    call = ([x], none, none, none, [1.0], none, None, core, [1] * 3, [0] * 3, [1] * 3, None, None, "channel")
    values, mean, m2 = torch.ops.tucker_ops.tucker_block(*call, backend="emulated")
    flat = values.double().flatten(2)
    torch.testing.assert_close(mean.double(), flat.mean(2), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(m2.double(), flat.var(2, correction=0) * flat.shape[2], rtol=1e-5, atol=1e-6)
