"""The Triton kernels on a GPU, against float64 on the processor: what the interpreter cannot tell."""

from __future__ import annotations

import functools

import pytest
import torch

import tucker_ops
from tests.cuda.test_on_gpu import TF32_TOLERANCE, blocks_on_gpu, check_conv, on_cpu, on_gpu  # noqa: F401
from tests.ops import test_gradient
from tests.ops.problems import Case, random_cases, reference, relative_rms, tolerance
from tests.ops.test_tucker_block import check, random_call
from tucker_ops.backends import triton
from tucker_ops.ops.reference import three_convs_backward

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
TRITON = functools.partial(tucker_ops.tucker_conv, backend="triton")


@pytest.fixture(autouse=True)
def _available():
    if torch.cuda.is_available() and not triton._available():
        pytest.fail(f"there is a GPU, but {triton._available().reason}")


@pytest.fixture(autouse=True)
def _no_tf32():
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize("dtype", DTYPES)
def test_forward(dtype, poisoned):
    for case in random_cases(60):
        check_conv(case, DTYPES[dtype], TRITON)


@pytest.mark.parametrize("tf32", [False, True], ids=["fp32", "tf32"])
@pytest.mark.parametrize("ranks", [(96, 160), (320, 512)], ids=str)
def test_many_ranks(ranks, tf32):
    """Where registers and shared memory are short, forward and gradient."""
    torch.backends.cudnn.allow_tf32 = tf32
    limit = TF32_TOLERANCE if tf32 else 5e-5
    case = Case(
        0, 1, (64, *ranks, 48), (5, 6, 7), (3,) * 3, (1,) * 3, (1,) * 3, (1,) * 3, True, "channels_last"
    )
    tensors = case.tensors(torch.float32)
    found = on_cpu(TRITON(*on_gpu(tensors), *case.geometry))
    assert relative_rms(found, reference(tensors, case.geometry)) <= limit
    call = test_gradient.call_of(case, torch.float32)
    exact = three_convs_backward(*(t.double() for t in call[:5]), *call[5:], [True] * 5)
    backward = torch.ops.tucker_ops.tucker_conv_backward
    found = backward(*(on_gpu(t) for t in call[:5]), *call[5:], [True] * 5, backend="triton")
    for ours, theirs in zip(map(on_cpu, found), exact, strict=True):
        assert relative_rms(ours, theirs) <= limit


def test_it_runs_on_the_device_of_its_tensors():
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU here")
    before = torch.cuda.current_device()
    for index in range(torch.cuda.device_count()):
        for case in random_cases(10):
            check_conv(case, torch.float16, TRITON, device=f"cuda:{index}")
    assert torch.cuda.current_device() == before


@pytest.mark.parametrize("kept", [False, True], ids=["recomputed", "kept"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients(dtype, kept, poisoned):
    ops = torch.ops.tucker_ops
    for case in random_cases(30, seed=2):
        call = test_gradient.call_of(case, DTYPES[dtype])
        exact = three_convs_backward(*(t.double() for t in call[:5]), *call[5:], [True] * 5)
        tensors, geometry = [on_gpu(t) for t in call[:5]], call[5:]
        stages = ops.tucker_conv_stages(*tensors[1:], None, *geometry, backend="triton")[1:] if kept else ()
        found = ops.tucker_conv_backward(*tensors, *geometry, [True] * 5, *stages, backend="triton")
        for ours, theirs in zip(map(on_cpu, found), exact, strict=True):
            assert relative_rms(ours, theirs) <= tolerance(
                DTYPES[dtype], theirs.numel(), test_gradient.LIMITS
            ), case


@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks(dtype, blocks_on_gpu, poisoned):  # noqa: F811
    for seed in range(40):
        check(
            random_call(seed, DTYPES[dtype]),
            DTYPES[dtype],
            contiguous=seed % 3 == 0,
            wide=seed % 4 == 0,
            backend="triton",
        )


def test_in_a_captured_graph():
    case = Case(
        0, 1, (32, 16, 16, 32), (16, 16, 16), (3,) * 3, (1,) * 3, (1,) * 3, (1,) * 3, True, "channels_last"
    )
    tensors = on_gpu(case.tensors(torch.float16))
    for _ in range(3):
        expected = TRITON(*tensors, *case.geometry)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = TRITON(*tensors, *case.geometry)
    captured.fill_(float("nan"))
    graph.replay()
    assert torch.equal(captured, expected)
