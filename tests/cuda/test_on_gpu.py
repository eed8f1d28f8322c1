"""The CUDA kernels on a GPU, against float64 on the processor.

`python -m tests.cuda.test_on_gpu` runs the few problems that compute-sanitizer is given.
"""

from __future__ import annotations

import copy
import functools
import itertools
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import tucker_ops
from tests.ops import test_tucker_block
from tests.ops.problems import TOLERANCE, Case, random_cases, reference, relative_rms, tolerance
from tests.ops.test_tucker_block import check, random_call
from tucker_ops.backends import cuda
from tucker_ops.nn import TuckerConv3d
from tucker_ops.ops.check import problem_of
from tucker_ops.ops.reference import memory_format

HAS_GPU = torch.cuda.is_available()
pytestmark = pytest.mark.skipif(not HAS_GPU, reason="no NVIDIA GPU here")

block_op = torch.ops.tucker_ops.tucker_block
TF32_TOLERANCE = 1e-3
# The op must not allocate, wait or tune while a graph is captured, so a few calls come first.
WARM_UPS = 3
GIB = 1 << 30


@dataclass(frozen=True)
class Numbers:
    """What the kernels multiply: float32 by TF32 where that is allowed."""

    name: str
    dtype: torch.dtype
    tf32: bool = False

    def __str__(self) -> str:
        return self.name


NUMBERS = [
    Numbers("fp16", torch.float16),
    Numbers("bf16", torch.bfloat16),
    Numbers("fp32", torch.float32),
    Numbers("tf32", torch.float32, True),
]


@pytest.fixture(params=NUMBERS, ids=str)
def numbers(request, monkeypatch):
    """Runs the test in each kind of number, with TF32 allowed for that kind alone, and its tolerance."""
    given = request.param
    if not cuda._supports_capability(given.dtype, here().capability):
        pytest.skip(cuda._supports_capability(given.dtype, here().capability).reason)
    # The older of torch's switches: it keeps the newer ones in step.
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = given.tf32
    assert cuda.tf32_allowed() == given.tf32
    if given.tf32:
        monkeypatch.setitem(TOLERANCE, torch.float32, TF32_TOLERANCE)
    yield given
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(autouse=True)
def _taken_unasked(monkeypatch):
    """These tests are what makes a card a proven one."""
    monkeypatch.setenv(cuda.UNPROVEN_VARIABLE, "1")


@pytest.fixture(autouse=True)
def _kernels():
    if HAS_GPU and not tucker_ops.backends()["cuda"].ok:
        pytest.fail(f"there is a GPU, but {tucker_ops.backends()['cuda'].reason}")


def here() -> cuda.Device:
    return cuda.device_of(torch.cuda.current_device())


def on_gpu(value, device: str = "cuda"):
    """Tensors, also in lists, as they are but on the GPU: `.cuda()` would change strides that are not dense."""
    if isinstance(value, torch.Tensor):
        moved = torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=device)
        return moved.copy_(value)
    return [on_gpu(v, device) for v in value] if isinstance(value, list) else value


def on_cpu(value):
    return value.cpu() if isinstance(value, torch.Tensor) else value


def check_conv(case: Case, dtype: torch.dtype, *runs, device: str = "cuda") -> None:
    """Each of `runs`, by default backend "cuda", on one problem."""
    tensors = case.tensors(dtype)
    expected = reference(tensors, case.geometry)
    moved, limit = on_gpu(tensors, device), tolerance(dtype, expected.numel())
    for run in runs or (functools.partial(tucker_ops.tucker_conv, backend="cuda"),):
        actual = run(*moved, *(list(g) for g in case.geometry))
        assert actual.shape == expected.shape and actual.dtype == dtype and actual.device == moved[0].device
        assert actual.is_contiguous(memory_format=memory_format(moved[0]))
        error = relative_rms(actual.cpu(), expected)
        assert error <= limit, f"{case}, {run}: relative RMS {error:.1e}, limit {limit:.1e}"


@pytest.fixture
def blocks_on_gpu(monkeypatch):
    """`check` of the CPU's tests, its op run on the GPU."""

    def run(*args, backend):
        return tuple(map(on_cpu, block_op(*map(on_gpu, args), backend=backend)))

    monkeypatch.setattr(test_tucker_block, "block_op", run)


def test_random_problems_match_float64(numbers, poisoned):
    for case in random_cases(160):
        check_conv(case, numbers.dtype)


def test_random_problems_stage_by_stage(numbers, poisoned):
    for case in random_cases(60, seed=3):
        check_conv(case, numbers.dtype, functools.partial(cuda.run_on, here(), [int(numbers.tf32), 0]))


@pytest.mark.parametrize("part", range(4))
def test_random_blocks_match_float64(numbers, part, blocks_on_gpu, poisoned):
    for seed in range(part, 160, 4):
        call = random_call(seed, numbers.dtype)
        try:
            check(call, numbers.dtype, contiguous=seed % 3 == 0, wide=seed % 5 == 0, backend="cuda")
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error


# Kernel, stride and extents of a few tiles with ragged edges.
GEOMETRIES = [
    ((3, 3, 3), (1, 1, 1), (9, 21, 45)),
    ((1, 3, 3), (1, 1, 1), (3, 21, 45)),
    ((3, 3, 3), (2, 2, 2), (9, 19, 67)),
    ((1, 3, 3), (1, 2, 2), (3, 19, 67)),
    ((3, 3), (1, 1), (21, 45)),
    ((3, 3), (2, 2), (19, 67)),
]
RANKS = [(8, 16), (16, 16), (32, 16), (16, 32), (32, 32), (9, 24), (64, 64)]


def of_every_form(numbers: Numbers, geometry, ranks):
    """Cases, each with the choices that force every form of the one-pass kernel, few and many planes a block."""
    kernel, stride, size = geometry
    padding, ones = tuple(k // 2 for k in kernel), (1,) * len(kernel)
    for seed, (rank_in, rank_out) in enumerate(ranks):
        channels = (40, rank_in, rank_out, 24)
        case = Case(seed, 2, channels, size, kernel, stride, padding, ones, seed % 2 == 0, "channels_last")
        problem = problem_of(*case.tensors(numbers.dtype), *case.geometry)
        forms = cuda.forms_of(problem, here(), numbers.tf32)
        yield (
            case,
            [[int(numbers.tf32), 1, form, chunk] for form, chunk in itertools.product(forms, (1, 3, 64))],
        )


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=lambda g: f"k{g[0]}s{g[1]}".replace(" ", ""))
def test_every_form_of_the_one_pass_kernel(numbers, geometry, poisoned):
    ran = 0
    for case, choices in of_every_form(numbers, geometry, RANKS):
        runs = [functools.partial(cuda.run_on, here(), choice) for choice in choices]
        if runs:
            check_conv(case, numbers.dtype, *runs)
        ran += len(runs)
    # Not every form has every stride in float32; the commonest convolution has one in every kind of number.
    assert ran or geometry != GEOMETRIES[0]


@pytest.mark.parametrize("size", [(128, 128, 128), (129, 127, 130)], ids=str)
def test_volumes_of_many_blocks_a_multiprocessor(numbers, size):
    """Against three convolutions in float64 on the GPU: on the processor they take minutes."""
    case = Case(2, 1, (32, 16, 16, 32), size, (3,) * 3, (1,) * 3, (1,) * 3, (1,) * 3, True, "channels_last")
    tensors = on_gpu(case.tensors(numbers.dtype))
    expected = reference(tensors, case.geometry)
    first = tucker_ops.tucker_conv(*tensors, *case.geometry, backend="cuda")
    assert relative_rms(first, expected) <= tolerance(numbers.dtype, expected.numel())
    for _ in range(3):
        assert torch.equal(tucker_ops.tucker_conv(*tensors, *case.geometry, backend="cuda"), first)


@pytest.mark.parametrize("one_pass", [True, False], ids=["one-pass", "stages"])
def test_offsets_beyond_two_to_the_31(one_pass):
    free, _ = torch.cuda.mem_get_info()
    if free < 40 * GIB:
        pytest.skip(f"needs 40 GiB of free GPU memory, there are {free / GIB:.0f}")
    channels, size = 32, (68, 1024, 1024)
    x = torch.empty(1, *size, channels, dtype=torch.float16, device="cuda").normal_().movedim(-1, 1)
    assert x.numel() > 2**31
    small = Case(
        0, 1, (channels, 16, 16, channels), (1, 1, 1), (3,) * 3, (1,) * 3, (1,) * 3, (1,) * 3, True, ""
    )
    _, *weights = on_gpu(small.tensors(torch.float16))
    geometry = [[1] * 3] * 3
    choice = [] if one_pass else [0, 0]
    if one_pass:
        assert cuda.choice_of(problem_of(x, *weights, *geometry), here()).one_pass
    out = cuda.run_on(here(), choice, x, *weights, *geometry)
    far, near = (slice(-6, None), *[slice(-40, None)] * 2), (slice(0, 6), *[slice(0, 40)] * 2)
    for crop, right in ((far, slice(1, None)), (near, slice(0, -1))):
        where = (slice(None), slice(None), *crop)
        # The cut faces of the crop lack their neighbours.
        inside = (slice(None), slice(None), right, right, right)
        expected = reference([x[where], *weights], geometry)[inside]
        assert relative_rms(out[where][inside], expected) <= TOLERANCE[torch.float16]


CASE = Case(
    4, 2, (24, 16, 16, 40), (9, 18, 20), (3,) * 3, (1,) * 3, (1,) * 3, (1,) * 3, True, "channels_last"
)


def test_it_runs_on_the_current_stream():
    tensors = CASE.tensors(torch.float16)
    x, *weights = on_gpu(tensors)
    late = torch.full_like(x, float("nan"))
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        late.copy_(x)
        out = tucker_ops.tucker_conv(late, *weights, *CASE.geometry, backend="cuda")
    stream.synchronize()
    expected = reference(tensors, CASE.geometry)
    assert relative_rms(out.cpu(), expected) <= tolerance(torch.float16, expected.numel())


def test_it_runs_on_the_device_of_its_tensors(blocks_on_gpu):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU here")
    before = torch.cuda.current_device()
    for index in range(torch.cuda.device_count()):
        for case in random_cases(10):
            check_conv(case, torch.float16, device=f"cuda:{index}")
    assert torch.cuda.current_device() == before


def captured(call):
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result


@pytest.mark.parametrize("backend", ["cuda", None])
def test_a_captured_convolution_reads_new_contents(numbers, backend):
    with torch.inference_mode():
        x, *weights = on_gpu(CASE.tensors(numbers.dtype))
        graph, out = captured(lambda: tucker_ops.tucker_conv(x, *weights, *CASE.geometry, backend=backend))
        for seed in range(3):
            new = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).to(numbers.dtype)
            x.copy_(new)
            out.fill_(float("nan"))
            graph.replay()
            expected = reference([new, *map(on_cpu, weights)], CASE.geometry)
            assert relative_rms(out.cpu(), expected) <= tolerance(numbers.dtype, expected.numel())


@pytest.fixture
def network():
    """A U-Net of two stages in half precision, factorised, and its input."""
    from bench.gpu.blocks import networks
    from bench.gpu.turns import Settings
    from bench.gpu.unet import PlainConvUNet

    _, tucker = networks(lambda: PlainConvUNet(features=(32, 64)), Settings(torch.device("cuda")))
    return tucker, torch.randn(1, 1, 32, 32, 32, device="cuda").half()


def test_a_fused_network_is_close_to_float64(network):
    tucker, x = network
    fused = tucker_ops.fuse(copy.copy(tucker))
    explanation = tucker_ops.fused.explain(fused)
    assert explanation.used and all(layer.fused for layer in explanation.layers), str(explanation)
    with torch.inference_mode():
        expected = copy.deepcopy(tucker).double()(x.double())
        assert relative_rms(fused(x), expected) <= 5e-3


def test_a_captured_fused_network_reads_new_contents(network):
    tucker, x = network
    with torch.inference_mode():
        fused = tucker_ops.fuse(copy.copy(tucker))
        graph, out = captured(lambda: fused(x))
        for _ in range(3):
            x.normal_()
            expected = fused(x)
            out.fill_(float("nan"))
            graph.replay()
            assert relative_rms(out, expected.double()) <= 1e-3


def test_compile_in_one_graph(numbers):
    torch._dynamo.reset()
    layers = [TuckerConv3d(8, 16, 3, (8, 8), padding=1), TuckerConv3d(16, 8, 3, (8, 8), stride=2, padding=1)]
    module = torch.nn.Sequential(layers[0], torch.nn.LeakyReLU(0.01), layers[1]).eval()
    module = module.to("cuda", numbers.dtype)
    x = torch.randn(1, 8, 12, 13, 14, device="cuda").to(numbers.dtype)
    with torch.inference_mode():
        expected = copy.deepcopy(module).double()(x.double())
        actual = torch.compile(module, fullgraph=True)(x)
        # Three roundings of what the second convolution reads and makes.
        assert relative_rms(actual, expected) <= 3 * TOLERANCE[numbers.dtype]
        assert actual.stride() == module(x).stride()


def test_compile_a_fused_network_in_one_graph(network):
    torch._dynamo.reset()
    tucker, x = network
    with torch.inference_mode():
        fused = tucker_ops.fuse(copy.copy(tucker))
        expected = fused(x)
        actual = torch.compile(fused, fullgraph=True, backend="aot_eager")(x)
        assert relative_rms(actual, expected.double()) <= 1e-3


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad):
    for case in [case for case in random_cases(40, seed=7) if case.batch][:4]:
        tensors = [
            t if t is None else t.detach().requires_grad_(requires_grad)
            for t in on_gpu(case.tensors(torch.float32))
        ]
        arguments = (*tensors, *(list(g) for g in case.geometry))
        torch.library.opcheck(torch.ops.tucker_ops.tucker_conv, arguments)


def test_opcheck_of_the_private_ops():
    for case in [case for case in random_cases(40, seed=7) if case.batch][:4]:
        x, *weights = on_gpu(case.tensors(torch.float16))
        last = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
        arguments = (x.contiguous(memory_format=last), *weights, *(list(g) for g in case.geometry))
        torch.library.opcheck(torch.ops.tucker_ops._tucker_conv_cuda, (*arguments, here().numbers, []))
    for seed in (3, 4, 5, 9):
        call = on_gpu(list(random_call(seed, torch.float16).values()))
        torch.library.opcheck(block_op, (*call, False), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("stats", ["channel", "covariance"])
@pytest.mark.parametrize("ratio", [1, 1000])
@pytest.mark.parametrize("channels", [3, 16])
def test_statistics_survive_a_large_mean(numbers, channels, ratio, stats):
    """A channel of mean `ratio` standard deviations, one that is constant, one of zeros, and so on again."""
    kinds = torch.arange(channels) % 3
    noise = torch.randn(2, channels, 12, 40, 37, generator=torch.Generator().manual_seed(1))
    spread, mean = (kinds == 0).float(), ratio * (kinds < 2).float()
    x = on_gpu((noise * spread.view(-1, 1, 1, 1) + mean.view(-1, 1, 1, 1)).to(numbers.dtype))
    core = torch.zeros(channels, channels, 3, 3, 3)
    # A copy, but through every stage.
    core[range(channels), range(channels), 1, 1, 1] = 1.0
    ones, none = [1] * 3, [None]
    values, mean, m2 = block_op(
        [x], none, none, none, [1.0], none, None, core.to(x), ones, ones, ones, None, None, stats, False, True,
        backend="cuda",
    )  # fmt: skip
    flat = values.double().flatten(2)
    if stats == "covariance":
        deviations = flat - flat.mean(2, keepdim=True)
        products, sigma = deviations @ deviations.mT, deviations.square().sum(2).sqrt()
        limit = 1e-4 * sigma.unsqueeze(1) * sigma.unsqueeze(2) + 1e-12 * ratio**2 * flat.shape[2]
        assert ((m2 - products).abs() <= limit).all()
        m2 = m2.diagonal(dim1=1, dim2=2)
    assert ((mean - flat.mean(2)).abs() <= 1e-4 * flat.std(2) + 1e-6 * ratio).all()
    variance, expected = m2 / flat.shape[2], flat.var(2, correction=0)
    assert ((variance - expected).abs() <= 1e-4 * expected + 1e-12 * ratio**2).all()


def test_a_call_does_not_wait_for_the_gpu():
    with torch.inference_mode():
        x, *weights = on_gpu(CASE.tensors(torch.float16))
        for _ in range(WARM_UPS):
            tucker_ops.tucker_conv(x, *weights, *CASE.geometry, backend="cuda")
        torch.cuda.synchronize()
        # The card is busy for half a second; whoever waits for it comes back later than that.
        torch.cuda._sleep(1_000_000_000)
        tucker_ops.tucker_conv(x, *weights, *CASE.geometry, backend="cuda")
        done = torch.cuda.Event()
        done.record()
        assert not done.query()
        torch.cuda.synchronize()


SANITIZER_SECONDS = 100


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer_finds_nothing(tool, repo_root):
    program = shutil.which("compute-sanitizer", path=f"{os.environ['PATH']}:/usr/local/cuda/bin")
    if program is None:
        pytest.skip("compute-sanitizer is not installed here")
    command = [
        program,
        "--tool",
        tool,
        "--error-exitcode",
        "99",
        sys.executable,
        "-m",
        "tests.cuda.test_on_gpu",
    ]
    # Each tensor an allocation of its own, so that what lies behind it belongs to nobody.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(
            command, cwd=repo_root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            timeout=SANITIZER_SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        pytest.skip(f"compute-sanitizer's {tool} took more than {SANITIZER_SECONDS} s here")
    lines = done.stdout.splitlines()
    refusal = next((line for line in lines if "not supported" in line.lower()), None)
    if refusal is not None:
        pytest.skip(f"compute-sanitizer's {tool} does not run here: {refusal[-300:]}")
    assert done.returncode == 0 and REDUCED_DONE in lines, "\n".join(lines[-60:])


REDUCED_DONE = "reduced problems ran"


def reduced() -> None:
    """A problem of each form, some random ones and blocks: without comparing, which the tests above do."""
    numbers = NUMBERS[0]
    for geometry in GEOMETRIES[:3]:
        seen = set()
        for case, choices in of_every_form(numbers, geometry, RANKS[1:3]):
            tensors = on_gpu(case.tensors(numbers.dtype))
            for choice in choices:
                if choice[2] not in seen:
                    seen.add(choice[2])
                    cuda.run_on(here(), choice, *tensors, *(list(g) for g in case.geometry))
    for case in random_cases(6):
        for choice in ([], [0, 0]):
            cuda.run_on(
                here(), choice, *on_gpu(case.tensors(numbers.dtype)), *(list(g) for g in case.geometry)
            )
    for seed in range(6):
        block_op(*on_gpu(list(random_call(seed, numbers.dtype).values())), False, backend="cuda")
    torch.cuda.synchronize()
    print(REDUCED_DONE)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    reduced()
