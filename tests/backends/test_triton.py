"""The Triton backend without a GPU: run by the interpreter, and compiled for four kinds of card.

Whether the code is right on a card is asked in tests/cuda/test_on_gpu.py, whether it is fast by `make gpu`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

import tucker_ops
from tests.backends.test_select import PROBLEM
from tucker_ops.backends import triton as backend
from tucker_ops.backends.triton.config import SHARED_BYTES
from tucker_ops.errors import BackendError

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

from bench.gpu.instructions import Recorder, compiled, disassembled

CAPABILITIES = (80, 90, 100, 120)
# Instructions that keep a register in local memory, outside of loops for all that was seen.
MOST_SPILLS = 8
TENSOR_CORES = ("mma.sync", "wgmma.mma_async", "tcgen05.mma")


@pytest.mark.slow
def test_in_the_interpreter(repo_root):
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/backends/interpreted_triton.py",
    ]
    done = subprocess.run(
        command, cwd=repo_root, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def record(
    recorder, monkeypatch, dtype: torch.dtype, channels: int, ranks: tuple[int, int], variants: bool
) -> None:
    """Everything that runs for one layer: forward, gradient, and blocks as a fused network has them."""
    from tucker_ops.backends.triton import launch

    monkeypatch.setattr(launch, "launch", recorder)

    def empty(*size):
        return torch.empty(size, dtype=dtype)

    rank_in, rank_out = ranks
    x = empty(1, channels, 8, 8, 8).contiguous(memory_format=torch.channels_last_3d)
    coarse = empty(1, channels, 4, 4, 4).contiguous(memory_format=torch.channels_last_3d)
    u_in, core, u_out = empty(rank_in, channels), empty(rank_out, rank_in, 3, 3, 3), empty(channels, rank_out)
    bias, norm = empty(channels), torch.empty(1, channels)
    geometry = [[1] * 3] * 3
    launch.forward(x, u_in, core, u_out, bias, *geometry)
    launch.backward(x, x, u_in, core, u_out, *geometry, [True] * 5)
    if variants:
        # At a stride, and in 2D, where an extent of 1 is compiled in.
        launch.backward(coarse, x, u_in, core, u_out, [2] * 3, *geometry[1:], [True] * 5)
        flat = x[:, :, 0].contiguous(memory_format=torch.channels_last)
        flat_core = empty(rank_out, rank_in, 3, 3)
        launch.forward(flat, u_in, flat_core, u_out, bias, *[[1] * 2] * 3)
        launch.backward(flat, flat, u_in, flat_core, u_out, *[[1] * 2] * 3, [True] * 5)
    # A block after a norm; one that reads a skip connection and what is upsampled; one that stays in rank space.
    pending = ([norm], [norm], [0.01])
    launch.block([x], [None], *pending, [u_in], None, core, *geometry, u_out, bias, "channel", False, False)
    up = empty(2, 2, 2, rank_in, channels)
    twice = ([norm] * 2, [norm] * 2, [0.01] * 2)
    launch.block(
        [x, coarse],
        [None] * 2,
        *twice,
        [u_in, up],
        empty(rank_in),
        core,
        *geometry,
        u_out,
        bias,
        "channel",
        False,
        False,
    )
    narrow = empty(1, rank_out, 8, 8, 8).contiguous(memory_format=torch.channels_last_3d)
    core = core[: backend.MOST_COVARIANCE]
    launch.block(
        [narrow], [u_out], *pending, [u_in], None, core, *geometry, None, None, "covariance", False, False
    )


def examined(*launch):
    result = compiled(*launch)
    return result, disassembled(result.asm["cubin"])


PRECISIONS = {"fp16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32, "fp32": torch.float32}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "capability"),
    # Without tensor cores the code is one for all.
    [(p, c) for p in PRECISIONS for c in CAPABILITIES if p != "fp32" or c == CAPABILITIES[0]],
)
def test_compiles_for(precision, capability, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    setting = torch.backends.cudnn.conv.fp32_precision
    recorder = Recorder()
    try:
        torch.backends.cudnn.conv.fp32_precision = "tf32" if precision == "tf32" else "ieee"
        layers = [(32, (16, 16))]
        if precision == "fp16":
            layers += [(320, (72, 160))] + ([(3, (5, 6))] if capability == CAPABILITIES[0] else [])
        for channels, ranks in layers:
            record(
                recorder, monkeypatch, PRECISIONS[precision], channels, ranks, capability == CAPABILITIES[0]
            )
    finally:
        torch.backends.cudnn.conv.fp32_precision = setting
    assert {name for name, *_ in recorder.launches} == {"reduce_rows", "convolve_rows", "outer_rows"}
    # Most of a compilation runs outside Python's lock.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = {
            launch: pool.submit(examined, kernel, *launch[1:], capability)
            for launch, (kernel, *_) in recorder.launches.items()
        }
    for (name, _, constants, _), job in jobs.items():
        result, code = job.result()
        if precision != "fp32":
            assert any(word in result.asm["ptx"] for word in TENSOR_CORES), f"{name} {constants}"
        assert ("cvt.rna.tf32" in result.asm["ptx"]) == (
            precision == "tf32" or dict(constants).get("HAS_COVARIANCE", False)
        )
        assert result.metadata.shared <= SHARED_BYTES, f"{name} {constants}: {result.metadata.shared}"
        # Ranks that 8 does not divide are read number by number, each at an address of its own.
        if all(value == 8 for key, value in constants if key.startswith("UNIT")):
            assert code.spills <= MOST_SPILLS, f"{name} {constants}: {code.spills}"


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["tf32", "fp32", "fp16"])
def test_there_is_room_for_many_ranks(precision, monkeypatch, tmp_path):
    """Shared memory of the least card, for forward, gradient and what is expanded, up to the most ranks."""
    from tucker_ops.backends.triton import launch

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    setting, recorder = torch.backends.cudnn.conv.fp32_precision, Recorder()
    monkeypatch.setattr(launch, "launch", recorder)
    last, ones = torch.channels_last_3d, [[1] * 3] * 3
    try:
        torch.backends.cudnn.conv.fp32_precision = "tf32" if precision == "tf32" else "ieee"
        for rank, channels in ((96, 96), (128, 33), (512, 320)):
            x = torch.empty(1, channels, 4, 4, 4, dtype=PRECISIONS[precision]).contiguous(memory_format=last)
            weights = [x.new_empty(s) for s in ((rank, channels), (rank, rank, 3, 3, 3), (channels, rank))]
            launch.forward(x, *weights, None, *ones)
            launch.backward(x, x, *weights, *ones, [True, True, False, False, False])
        t = x.new_empty(1, 512, 4, 4, 4).contiguous(memory_format=last)
        narrow = x.new_empty(1, 16, 4, 4, 4).contiguous(memory_format=last)
        expand = x.new_empty(512, 512)
        launch.reduce_into(t, t, launch.DEFAULT.reduce, expand=expand)
        launch.reduce_into(narrow, t, launch.DEFAULT.reduce, expand=expand, matrix=x.new_empty(16, 512))
    finally:
        torch.backends.cudnn.conv.fp32_precision = setting
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = {
            key: pool.submit(compiled, kernel, *key[1:], CAPABILITIES[0])
            for key, (kernel, *_) in recorder.launches.items()
        }
    for key, job in jobs.items():
        assert job.result().metadata.shared <= SHARED_BYTES, (job.result().metadata.shared, key)
    with pytest.raises(BackendError, match="at most 512 ranks"):
        wide = x.new_empty(1, 600, 1, 1, 1).contiguous(memory_format=last)
        launch.reduce_into(t, wide, launch.DEFAULT.reduce, expand=x.new_empty(512, 600))


def test_kernels_start_on_the_card_of_their_tensors(monkeypatch):
    """Triton takes torch's current one, whatever its arguments are."""
    from tucker_ops.backends.triton import launch

    entered = []

    class Guard:
        def __init__(self, tensor):
            self.tensor = tensor

        def __enter__(self):
            entered.append(self.tensor)

        def __exit__(self, *_):
            entered.append(None)

    class Kernel:
        def __getitem__(self, grid):
            assert entered[-1] is x
            return lambda *arguments, **options: None

    x = torch.empty(1)
    monkeypatch.setattr(torch.cuda, "device_of", Guard)
    launch.launch(Kernel(), (1,), (x,), {}, launch.DEFAULT.reduce)
    assert entered == [x, None]


@pytest.mark.slow
def test_what_tuning_tries_compiles(monkeypatch, tmp_path):
    """For the least card, on a layer of 32 channels and rank 16."""
    from tucker_ops.backends.triton import launch
    from tucker_ops.backends.triton.config import CANDIDATES, DEFAULT

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    recorder = Recorder()
    monkeypatch.setattr(launch, "launch", recorder)
    x = torch.empty(1, 32, 8, 8, 8, dtype=torch.float16).contiguous(memory_format=torch.channels_last_3d)
    u_in, core, u_out = (x.new_empty(size) for size in ((16, 32), (16, 16, 3, 3, 3), (32, 16)))
    geometry = [[1] * 3] * 3
    for kernel, candidates in CANDIDATES.items():
        assert getattr(DEFAULT, kernel) not in candidates
        for candidate in candidates:
            configs = replace(DEFAULT, **{kernel: candidate})
            launch.forward(x, u_in, core, u_out, None, *geometry, configs=configs)
            if kernel == "outer":
                launch.backward(x, x, u_in, core, u_out, *geometry, [True] * 5, configs=configs)
    tried = {config for candidates in CANDIDATES.values() for config in candidates}
    # Of the sums, those of the core's weights, which read t through every tap.
    launches = {
        key: kernel
        for key, (kernel, *_) in recorder.launches.items()
        if key[-1] in tried and (key[0] != "outer_rows" or dict(key[2])["KERNEL_D"] == 3)
    }
    assert {config for *_, config in launches} == tried
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = {
            key: pool.submit(compiled, kernel, *key[1:], CAPABILITIES[0]) for key, kernel in launches.items()
        }
    for key, job in jobs.items():
        assert job.result().asm["cubin"] and job.result().metadata.shared <= SHARED_BYTES, key


def test_not_available_without_a_gpu_and_says_so():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    verdict = tucker_ops.backends()["triton"]
    assert not verdict and "no NVIDIA GPU" in verdict.reason
    with pytest.raises(BackendError, match="no NVIDIA GPU"):
        tucker_ops.explain(replace(PROBLEM, device="cuda"), backend="triton")
    with pytest.raises(BackendError, match="computes on cuda"):
        tucker_ops.explain(PROBLEM, backend="triton")


def test_what_is_too_large_to_count_is_declined():
    long = replace(PROBLEM, input_size=(1, 1, 2**27))
    verdict = backend._supports(long)
    assert not verdict and "in a line of voxels" in verdict.reason
    assert backend._supports(replace(PROBLEM, input_size=(2**10, 2**10, 2**10)))
    many = replace(PROBLEM, input_size=(2**11, 2**10, 2**10))
    verdict = backend._supports(many)
    assert not verdict and "voxels an item" in verdict.reason
    narrow = replace(PROBLEM, batch=16, input_size=(2**14, 2**14, 1))
    verdict = backend._supports(narrow)
    assert not verdict and "blocks of voxels" in verdict.reason


def test_old_cards_and_unproven_ones_are_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    assert "needs compute capability 8.0" in backend._available().reason
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    assert backend._available()
    verdict = backend._prefers(PROBLEM)
    assert not verdict and backend.UNPROVEN_VARIABLE in verdict.reason
    monkeypatch.setenv(backend.UNPROVEN_VARIABLE, "1")
    assert backend._prefers(PROBLEM)


def test_where_triton_is_missing(monkeypatch):
    monkeypatch.setattr(backend.PathFinder, "find_spec", lambda name: None)
    backend._installed.cache_clear()
    try:
        assert "pip install triton" in backend._available().reason
    finally:
        backend._installed.cache_clear()
