"""Packed weights are kept from call to call, and never outlive a change of the originals."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import torch

import tucker_ops
from tests.ops.problems import Case, reference, relative_rms, tolerance
from tucker_ops.backends import native

CASE = Case(0, 2, (16, 9, 17, 24), (6, 11, 13), (3, 3, 3), (1,) * 3, (1,) * 3, (1,) * 3, True, "contiguous")
# The core alone is 1.3 MB: compared by several threads.
LARGE = Case(1, 1, (8, 110, 110, 8), (3, 5, 6), (3, 3, 3), (1,) * 3, (1,) * 3, (1,) * 3, True, "contiguous")


@pytest.fixture(autouse=True)
def _needs_the_extension():
    if not native.load():
        pytest.skip(native.load().reason)


def error(tensors, case=CASE) -> float:
    actual = tucker_ops.tucker_conv(*tensors, *case.geometry, backend="cpu")
    return relative_rms(actual, reference(tensors, case.geometry))


@pytest.mark.parametrize("case", [CASE, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("weight", [1, 2, 3, 4], ids=["u_in", "core", "u_out", "bias"])
@pytest.mark.parametrize("element", [0, 7, -1])
def test_a_change_of_one_element_is_seen(case, dtype, weight, element, core):
    tensors = case.tensors(dtype)
    limit = tolerance(dtype, 256)
    assert error(tensors, case) <= limit
    # .data is what version counters miss.
    tensors[weight].data.view(-1)[element] += 40
    assert error(tensors, case) <= limit


def test_changes_under_inference_mode_and_by_load_state_dict():
    layer = tucker_ops.nn.TuckerConv3d(16, 24, 3, (8, 16), padding=1)
    other = tucker_ops.nn.TuckerConv3d(16, 24, 3, (8, 16), padding=1)
    x = torch.randn(1, 16, 6, 7, 8)

    def expected(module):
        return tucker_ops.tucker_conv(
            x, module.u_in, module.core, module.u_out, module.bias, 1, 1, backend="reference"
        )

    with torch.inference_mode():
        for source in (layer, other):
            layer.load_state_dict(source.state_dict())
            torch.testing.assert_close(layer(x), expected(source), rtol=1e-4, atol=1e-5)
        layer.core.mul_(2)
        torch.testing.assert_close(layer(x), expected(layer), rtol=1e-4, atol=1e-5)


def test_weights_that_overlap_in_memory_are_not_kept():
    tensors = CASE.tensors(torch.float32)
    tensors[2] = tensors[2][:1].expand(17, -1, -1, -1, -1)
    assert error(tensors) <= tolerance(torch.float32, 256)
    tensors[2][0] *= 3
    assert error(tensors) <= tolerance(torch.float32, 256)


def test_more_weights_than_are_kept():
    """Three cores of 28 MB, 113 MB each as Winograd points, against a limit of 256 MB."""
    x = torch.randn(1, 4, 2, 8, 8)
    cores = [torch.randn(512, 512, 3, 3, 3) for _ in range(3)]
    u_in, u_out = torch.randn(512, 4), torch.randn(4, 512)
    for _ in range(2):
        for kernel in cores:
            actual = tucker_ops.tucker_conv(x, u_in, kernel, u_out, None, 1, 1, backend="cpu")
            expected = tucker_ops.tucker_conv(x, u_in, kernel, u_out, None, 1, 1, backend="reference")
            assert relative_rms(actual, expected.double()) <= tolerance(torch.float32, actual.numel())


def test_two_threads_at_once(core):
    cases = [Case(i, *list(vars(CASE).values())[1:]) for i in range(4)]
    problems = [case.tensors(torch.float32) for case in cases]
    expected = [reference(tensors, CASE.geometry) for tensors in problems]
    errors = []

    def call(shift: int) -> None:
        for turn in range(60):
            i = (turn + shift) % len(problems)
            actual = tucker_ops.tucker_conv(*problems[i], *CASE.geometry, backend="cpu")
            errors.append(relative_rms(actual, expected[i]))

    threads = [threading.Thread(target=call, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 180 and max(errors) <= tolerance(torch.float32, 256)


FORK = """
import os, torch, tucker_ops
torch.set_num_threads(2)
layer = tucker_ops.nn.TuckerConv3d(16, 16, 3, (8, 8), padding=1).requires_grad_(False)
x = torch.randn(1, 16, 8, 8, 8)
args = (layer.u_in, layer.core, layer.u_out, layer.bias, 1, 1)
before = tucker_ops.tucker_conv(x, *args, backend="cpu")
pid = os.fork()
if not pid:
    torch.set_num_threads(1)  # as torch's DataLoader does: threads do not survive a fork
    same = torch.equal(tucker_ops.tucker_conv(x, *args, backend="cpu"), before)
    layer.core.mul_(2)
    changed = not torch.equal(tucker_ops.tucker_conv(x, *args, backend="cpu"), before)
    os._exit(0 if same and changed else 1)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


def test_a_fork_after_use():
    result = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=120)
    assert result.stdout.strip() == "0", result.stderr
