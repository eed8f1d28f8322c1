"""The CUDA kernels, thread by thread on an emulated multiprocessor, against float64.

These are the kernels that nvcc compiles, with the same index maps, fragments and barriers; only single instructions
(mma, ldmatrix, loads) are the host's. What a compiler for the GPU makes of them is asked in test_compiled.py.
"""

from __future__ import annotations

import itertools

import pytest
import torch

import tucker_ops
from tests.ops.problems import Case, random_cases, reference, relative_rms, tolerance
from tests.ops.test_tucker_block import check, random_call
from tucker_ops.backends import cuda
from tucker_ops.ops.check import problem_of

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
        case = Case(seed, 1, channels, size, kernel, stride, padding, (1,) * len(kernel), seed % 2 == 0, "channels_last")
        forms = cuda.forms_of(problem_of(*case.tensors(dtype), *case.geometry), cuda.H200)
        for form, chunk in itertools.product(forms, (2, 64) if seed % 2 else (1,)):
            emulated([0, 1, form, chunk])
            error, numel = error_of(case, dtype)
            assert error <= tolerance(dtype, numel), (case, form, chunk)
            ran += 1
    assert ran >= (6 if dtype != torch.float32 else 0 if stride[-1] == 2 else 3)


@pytest.mark.parametrize("seed", range(0, 160, 16))
@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
def test_random_blocks_match_float64(emulated, dtype, seed, poisoned):
    for seed in range(seed, seed + 16):
        call = random_call(seed, dtype)
        try:
            check(call, dtype, contiguous=seed % 3 == 0, wide=seed % 4 == 0, backend="emulated")
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
