"""Memory and time of the one-pass CPU kernel: neither intermediate exists at full size, and it pays."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
import torch
from torch.nn import functional as F

from tucker_ops.backends import native
from tucker_ops.nn import TuckerConv3d

MEASURE_MEMORY = """
import re, torch, tucker_ops
torch.set_num_threads({threads})

def status(field):
    return int(re.search(field + r":\\s+(\\d+) kB", open("/proc/self/status").read()).group(1)) * 1024

module = tucker_ops.nn.TuckerConv3d(32, 32, 3, (16, 16), padding=1).requires_grad_(False)

def call(x):
    return tucker_ops.tucker_conv(x, module.u_in, module.core, module.u_out, module.bias, 1, 1, backend="{backend}")

call(torch.zeros(1, 32, 8, 8, 8))  # threads and libraries are there before the measurement
x = torch.zeros(1, 32, 128, 128, 128).normal_()
with open("/proc/self/clear_refs", "w") as peak:
    peak.write("5")
before = status("VmRSS")
y = call(x)
print(status("VmHWM") - before - y.numel() * y.element_size())
"""


def extra_peak_bytes(backend: str, threads: int) -> int:
    code = MEASURE_MEMORY.format(backend=backend, threads=threads)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if "clear_refs" in result.stderr:
        pytest.skip(f"this system does not let a process reset its peak memory: {result.stderr[-200:]}")
    assert result.returncode == 0, result.stderr
    return int(result.stdout)


def test_extra_memory_at_32ch_128_cubed():
    if not native.load():
        pytest.skip(native.load().reason)
    threads = 2
    intermediate = 16 * 128**3 * 4
    assert extra_peak_bytes("cpu", threads) <= 0.05 * intermediate + threads * 2e6
    # The same measurement sees the intermediates of three convolutions, so it can fail.
    assert extra_peak_bytes("reference", threads) > intermediate


def test_time_at_32ch_64_cubed():
    """At most 1.2 times three F.conv3d, both in their better layout, least of interleaved repetitions."""
    if not native.load():
        pytest.skip(native.load().reason)
    if not native.isa().startswith(("avx2", "avx512", "amx")):
        pytest.skip(f"the {native.isa()} kernels are a fallback, not a competitor")
    module = TuckerConv3d(32, 32, 3, (16, 16), padding=1).requires_grad_(False)
    calls = {"tucker": [], "three": []}
    for layout in (torch.contiguous_format, torch.channels_last_3d):
        x = torch.randn(1, 32, 64, 64, 64).contiguous(memory_format=layout)
        weights = [module.u_in[..., None, None, None], module.core, module.u_out[..., None, None, None]]
        first, core, last = (w.contiguous(memory_format=layout) for w in weights)
        args = (module.u_in, module.core, module.u_out, module.bias, [1] * 3, [1] * 3, [1] * 3)
        calls["tucker"].append(lambda x=x, args=args: torch.ops.tucker_ops._tucker_conv_cpu(x, *args))
        calls["three"].append(
            lambda x=x, a=first, b=core, c=last: F.conv3d(
                F.conv3d(F.conv3d(x, a), b, None, 1, 1), c, module.bias
            )
        )
    best = {name: [float("inf")] * len(group) for name, group in calls.items()}
    with torch.inference_mode():
        for repetition in range(10):
            for name, group in calls.items():
                for i, call in enumerate(group):
                    start = time.perf_counter()
                    call()
                    if repetition:
                        best[name][i] = min(best[name][i], time.perf_counter() - start)
    ratio = min(best["tucker"]) / min(best["three"])
    print(f"one pass / three convolutions at 32ch@64³ rank 16, fp32: {ratio:.2f}")
    assert ratio <= 1.2
